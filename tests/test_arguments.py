"""Unknown keyword arguments are refused by name, with the nearest one that is taken."""

import inspect

import pytest

from fastprefix.arguments import refuses_unknown_arguments, unknown_argument


class Thing:
    @refuses_unknown_arguments
    def save(self, folder, selected_adapters=None, *, is_main_process=True):
        """Saves."""
        return folder, selected_adapters, is_main_process

    @classmethod
    @refuses_unknown_arguments
    def load(cls, model_id, is_trainable=False):
        return cls, model_id, is_trainable


def test_the_nearest_name_is_told():
    with pytest.raises(TypeError, match=r"^save: got selected_adapter, did you mean selected_adap"):
        Thing().save("a", selected_adapter=["x"])
    with pytest.raises(TypeError, match=r"^load: got is_trainble, did you mean is_trainable\?$"):
        Thing.load("a", is_trainble=True)


def test_without_a_near_name_all_are_told():
    with pytest.raises(TypeError, match=r"^save: got colour, takes folder, selected_adapters, is_"):
        Thing().save("a", colour=1)
    assert str(unknown_argument("f", "x", [])) == "f: got x, takes none"


def test_right_names_and_positions_pass():
    assert Thing().save("a", ["x"], is_main_process=False) == ("a", ["x"], False)
    assert Thing().save(folder="a") == ("a", None, True)
    assert Thing.load("a", True) == (Thing, "a", True)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'folder'"):
        Thing().save()


def test_the_function_shows_its_own_signature():
    assert list(inspect.signature(Thing().save).parameters) == [
        "folder",
        "selected_adapters",
        "is_main_process",
    ]
    assert Thing.save.__doc__ == "Saves."
