"""What is written together is there together, whenever the process is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprefix import files
from fastprefix.files import partial_folders
from fastprefix_testing import interruptions

NAMES = ("a.txt", "b.txt", "inside/c.txt", "inside/d.txt")


def write(folder: Path, text: str) -> None:
    with files.written_together(folder) as partial:
        (partial / "inside").mkdir()
        for name in NAMES:
            (partial / name).write_text(text)


def listing(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folder(ram_path):
    """Holds files of an earlier saving, and one of somebody else."""
    write(ram_path / "folder", "old")
    (ram_path / "folder" / "inside" / "notes.txt").write_text("mine")
    return ram_path / "folder"


def state(folder: Path) -> str:
    """Whose the files are; "old", "new" or a mixture."""
    found = listing(folder)
    assert found.pop("inside/notes.txt") == "mine"
    return " and ".join(sorted({found[name] for name in NAMES}))


def test_whenever_it_is_killed(folder):
    steps = interruptions.steps_of(lambda: write(folder, "old"))
    assert steps > 20
    seen = set()
    for step in range(steps):
        write(folder, "old")
        interruptions.killed_at(step, lambda: write(folder, "new"))
        files.finish(folder)
        seen.add(state(folder))
    assert seen == {"old", "new"}
    write(folder, "newest")
    assert state(folder) == "newest"
    assert list(listing(folder)) == sorted([*NAMES, "inside/notes.txt"]), "nothing is left over"
    assert not list(folder.glob(".fastprefix-*"))


def test_a_block_that_raises_changes_nothing(folder, ram_path):
    def fail(place):
        with files.written_together(place) as partial:
            (partial / "a.txt").write_text("new")
            raise RuntimeError("no")

    before = listing(ram_path)
    for place in (folder, ram_path / "more"):
        with pytest.raises(RuntimeError, match="no"):
            fail(place)
    assert listing(ram_path) == before
    assert not (ram_path / "more").exists()


def test_a_file_where_a_folder_belongs(folder):
    before = listing(folder)
    (folder / "other").write_text("a file")

    def save():
        with files.written_together(folder) as partial:
            (partial / "a.txt").write_text("new")
            (partial / "other").mkdir()

    with pytest.raises(FileExistsError, match=r"other is a file, takes none or a folder"):
        save()
    assert listing(folder) == {**before, "other": "a file"}


def test_what_a_living_process_writes_is_left_alone(folder):
    """What a dead process with the same number, or an older version, began is removed."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living, dead, mine = (
        folder / f".fastprefix-{partial_folders._HOST}-{number}-{'0' * 32}.partial"
        for number in (child.pid, 2**22 + 1, os.getpid())
    )
    elsewhere = folder / f".fastprefix-00000000-1-{'0' * 32}.partial"
    older = folder / ".fastprefix-abcd1234.partial"
    try:
        for one in (living, dead, mine, elsewhere, older):
            one.mkdir()
        with files.written_together(folder) as partial:
            files.remove_leftovers(folder)
            assert partial.exists()
            assert set(folder.glob(".fastprefix-*")) == {living, elsewhere, partial}
        os.utime(elsewhere, (0, 0))
        files.remove_leftovers(folder)
        assert set(folder.glob(".fastprefix-*")) == {living}
    finally:
        child.communicate(b"\n")
    files.remove_leftovers(folder)
    assert not list(folder.glob(".fastprefix-*"))


@pytest.mark.parametrize("link", ["whole", "inside it", "its place"])
def test_nothing_is_moved_through_a_link(tmp_path, link):
    """A folder from elsewhere may claim that a saving of it was not ended."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    (outside / "inside").mkdir(parents=True)
    (outside / "inside" / "mine.txt").write_text("mine")
    (folder / "inside").mkdir(parents=True)
    whole = folder / f".fastprefix-{'0' * 8}-1-{'0' * 32}.whole"
    if link == "whole":
        whole.symlink_to(outside)
    elif link == "inside it":
        whole.mkdir()
        (whole / "inside").symlink_to(outside / "inside")
    else:
        (whole / "inside").mkdir(parents=True)
        (whole / "inside" / "planted.txt").write_text("theirs")
        (folder / "inside").rmdir()
        (folder / "inside").symlink_to(outside / "inside")
    if link == "whole":
        files.finish(folder)
    else:
        with pytest.raises(ValueError, match="cannot be put there"):
            files.finish(folder)
    assert listing(outside) == {"inside/mine.txt": "mine"}


def test_a_folder_that_cannot_be_ended_says_so(folder, monkeypatch):
    whole = folder / f".fastprefix-{'0' * 8}-1-{'0' * 32}.whole"
    whole.mkdir()
    (whole / "a.txt").write_text("new")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ValueError, match=r"^folder: .*not put in their places.*Permission denied$"):
        files.finish(folder)


def test_errors_name_the_file_and_no_number(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.written_whole(tmp_path / "no" / "a"):
        pass
    assert str(caught.value) == (
        f"file: {tmp_path / 'no' / 'a'} cannot be written: No such file or directory"
    )
    assert caught.value.errno == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"^file: .*folder cannot be written: ") as caught:
        files.write_safetensors(tmp_path / "folder", {"x": torch.zeros(2)}, {})
    assert "rrno" not in str(caught.value)
    assert "os error" not in str(caught.value)


def test_tensors_of_all_kinds_come_back(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    tensors = {
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "bytes": torch.randn(5).to(torch.float8_e4m3fn),
        "bfloat16": torch.randn(3, 3).bfloat16(),
        "integers": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "across": torch.randn(3, 4).T,
        "one": shared,
        "part of it": shared[1:],
        "again": shared,
    }
    files.write_safetensors(tmp_path / "file", tensors, {"about": "x"})
    found, metadata = files.read_safetensors(tmp_path / "file")
    assert metadata == {"format": "pt", "about": "x"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double()), name
    old = found["one"].clone()
    with open(tmp_path / "file", "r+b") as raw:  # memory of its own
        raw.write(bytes((tmp_path / "file").stat().st_size))
    assert torch.equal(found["one"], old)


def test_sealed_objects():
    value = {"a": [1, 2.5, None], "b": {"c": "ü"}, "d": (1, 2)}
    sealed = files.sealed(value)
    assert files.unsealed(sealed) == value
    assert files.unsealed(value) == value, "of an older version"
    for changed in ({**sealed, "a": 1}, {**sealed, "more": 1}, {**sealed, "sha256": "0" * 64}):
        with pytest.raises(ValueError, match="damaged"):
            files.unsealed(changed)
