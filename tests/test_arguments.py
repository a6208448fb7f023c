"""Unknown keyword arguments are refused by name, with the nearest one that is taken."""

import importlib
import inspect

import pytest
import torch
from transformers import TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    prefix_attention,
)
from fastprefix.arguments import refuses_unknown_arguments, unknown_argument
from fastprefix.tuning.trainer import PrefixSeq2SeqTrainer, PrefixTrainer

PUBLIC = (
    "", ".kv", ".hf", ".tuning", ".tuning.callbacks", ".tuning.trainer", ".encoders", ".tasks",
)  # fmt: skip


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


def test_the_operator_tells_it_too():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(TypeError, match=r"^prefix_attention: got causal, did you mean is_"):
        prefix_attention(x, x, x, causal=True)


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


def public_callables():
    """Everything public that takes arguments by name, and names them all."""
    for part in PUBLIC:
        module = importlib.import_module(f"fastprefix{part}")
        own = [
            n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
        ]
        for name in getattr(module, "__all__", [n for n in own if not n.startswith("_")]):
            found = getattr(module, name)
            if inspect.isfunction(found):
                yield name, found
            if inspect.isclass(found) and not issubclass(found, Exception):
                if not inspect.isabstract(found):
                    yield name, found
                for method in dir(found):
                    function = inspect.getattr_static(found, method)
                    function = getattr(function, "__func__", function)
                    ours = _module_of(function).startswith("fastprefix.")
                    if inspect.isfunction(function) and ours and not method.startswith("_"):
                        yield f"{name}.{method}", getattr(found, method)


def _module_of(thing):
    return getattr(thing, "__module__", None) or ""


def takes(function):
    """The names that a function takes; none if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [name for name in named if name != "self"]


CALLABLES = {name: function for name, function in public_callables() if takes(function)}


def test_the_walk_finds_what_people_call():
    known = {"PrefixConfig", "PrefixKV", "PrefixKV.load", "use_prefix", "fit"}
    known |= {"KVBudget", "KVBudget.put", "PrefixTuningModel", "Collator", "interpolate"}
    known |= {"PrefixTuningModel.set_adapter", "StopOnCollapse", "PrefixTrainingArguments"}
    assert known <= set(CALLABLES)
    assert len(CALLABLES) > 80


@pytest.mark.parametrize("name", CALLABLES)
def test_everything_public_tells_the_nearest_name(name):
    function = CALLABLES[name]
    for right in takes(function):
        with pytest.raises(TypeError, match=rf"got {right}_, did you mean {right}\?$"):
            function(**{f"{right}_": None})


# What a tuned model's calls would hand on to the base, which takes any name and does nothing.


@pytest.fixture(scope="module", params=["prefix", "prompt"])
def tuned(request):
    if request.param == "prefix":
        return PrefixTuningModel(tiny.build("llama"), PrefixConfig(num_virtual_tokens=2)).eval()
    return PromptTuningModel(tiny.build("llama"), PromptConfig(num_virtual_tokens=2)).eval()


MISSPELT = {
    "atention_mask": "attention_mask",
    "attn_mask": "attention_mask",
    "attention_masks": "attention_mask",
    "position_id": "position_ids",
    "input_embeds": "inputs_embeds",
    "label": "labels",
    "past_key_value": "past_key_values",
    "output_hidden_state": "output_hidden_states",
    "num_item_in_batch": "num_items_in_batch",
}


@pytest.mark.parametrize("wrong", MISSPELT)
def test_a_forward_refuses_what_its_base_would_swallow(tuned, wrong):
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(
        TypeError, match=f"^forward: got {wrong}, did you mean {MISSPELT[wrong]}\\?$"
    ):
        tuned(input_ids=ids, **{wrong: ids})


@pytest.mark.parametrize(
    "wrong", ["prefix_name", "prefix_index", "adapter_names", "infix_position"]
)
def test_names_that_are_meant_for_us_are_never_lost(tuned, wrong):
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=f"^forward: got {wrong}, "):
        tuned(input_ids=ids, **{wrong: ["default", None]})
    with pytest.raises(TypeError, match=f"^generate: got {wrong}, "):
        tuned.generate(input_ids=ids, **{wrong: ["default", None]})


def test_generate_tells_the_nearest_of_its_options(tuned):
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"^generate: got max_new_token, did you mean max_new_tok"):
        tuned.generate(input_ids=ids, max_new_token=2)
    with pytest.raises(TypeError, match=r"^generate: got atention_mask, did you mean attention_"):
        tuned.generate(input_ids=ids, atention_mask=ids)


def test_what_flows_through_forwards_is_let_through(tuned):
    """Transformers' own keyword arguments, those of other models, and those nobody knows.

    Of the last two a prefix model's attention layers refuse, by name, what reaches them.
    """
    ids = torch.ones(1, 3, dtype=torch.long)
    plain = tuned(input_ids=ids).logits
    more = {
        "use_cache": True, "output_hidden_states": True, "return_dict": True, "return_loss": False,
        "num_items_in_batch": torch.tensor(2), "logits_to_keep": 0, "cache_position": None,
        "token_type_ids": None, "input_embeds": None,
    }  # fmt: skip
    if isinstance(tuned, PromptTuningModel):
        more |= {"mm_token_type_ids": ids, "pixel_attention_mask": ids, "something": 1}
    torch.testing.assert_close(tuned(input_ids=ids, **more).logits, plain)
    allowed = tuned.generate(
        input_ids=ids, max_new_tokens=2, do_sample=False,
        prefix_allowed_tokens_fn=lambda row, seen: [5],
    )  # fmt: skip
    assert (allowed[:, -2:] == 5).all()


def test_prefill_tells_the_nearest_input_of_the_model():
    ids = torch.ones(1, 3, dtype=torch.long)
    wrong = r"^prefill of a LlamaForCausalLM: got atention_mask, did you mean attention_mask\?$"
    with pytest.raises(TypeError, match=wrong):
        PrefixKV.prefill(tiny.build("llama"), ids, atention_mask=ids)
    with pytest.raises(TypeError, match=r"got pixel_values, takes input_ids, attention_mask"):
        PrefixKV.prefill(tiny.build("llama"), ids, pixel_values=ids)


@pytest.mark.parametrize("kind", [PrefixTrainer, PrefixSeq2SeqTrainer])
def test_trainers_tell_the_nearest_option(tmp_path, kind):
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(num_virtual_tokens=2))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(TypeError, match=r"got train_data_set, did you mean train_dataset\?$"):
        kind(tuned, arguments, train_data_set=[])
