"""Several processes on a KVBudget's folder, kills and a full disk: nothing is lost or mixed up."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fastprefix.files import partial_folders
from fastprefix.kv import KVBudget, PrefixBank, PrefixKV
from fastprefix_testing import interruptions


def make(number: int, P: int = 4) -> PrefixKV:
    """A prefix all of whose numbers are the same."""
    x = torch.full((2, P, 8), float(number))
    return PrefixKV((x, x), (-x, -x), number)


ONE = make(0).nbytes


def number_of(kv: PrefixKV) -> int:
    """Which prefix it is, if it is one and not a mixture."""
    assert all(bool((key == kv.position_offset).all()) for key in kv.keys)
    assert all(bool((value == -kv.position_offset).all()) for value in kv.values)
    return kv.position_offset


def test_each_sees_what_the_other_does(tmp_path):
    one, two = KVBudget(3 * ONE, tmp_path), KVBudget(2 * ONE, tmp_path)
    one.put("a", make(1), priority=3)
    assert "a" in two
    assert list(two) == ["a"]
    assert len(two) == 1
    assert number_of(two.get("a")) == 1
    two.put("a", make(2))
    assert number_of(one.get("a")) == 2, "resident, but another file by now"
    one.put("b", make(3, P=9))
    assert two.shapes("b") == make(3, P=9).shapes
    two.remove("a")
    assert "a" not in one
    with pytest.raises(KeyError, match=r"no prefix 'a'; there are \['b'\]"):
        one.get("a")
    assert one.resident_names == ("b",)
    assert list(one) == list(two) == ["b"]


def test_priorities_and_pins_of_several(tmp_path):
    """One process' index keeps what the other wrote into it."""
    one, two = KVBudget(9 * ONE, tmp_path), KVBudget(9 * ONE, tmp_path)
    one.put("a", make(1), priority=5)
    two.put("b", make(2), pinned=True)
    one.set_priority("a", 6)
    two.put("c", make(3), priority=7)
    one.remove("b")
    one.put("d", make(4), pinned=True)
    found = KVBudget(9 * ONE, tmp_path)
    told = {name: (found._entries[name].priority, found._entries[name].pinned) for name in found}
    assert told == {"a": (6, False), "c": (7, False), "d": (0, True)}
    assert found.resident_names == ("d",)


def test_a_pinned_prefix_that_grew_elsewhere(tmp_path):
    one, two = KVBudget(2 * ONE, tmp_path), KVBudget(9 * ONE, tmp_path)
    one.put("a", make(1), pinned=True)
    two.put("a", make(2, P=16))
    assert number_of(one.get("a")) == 2, "loaded for the caller alone"
    assert one.resident_bytes == 0
    one.put("b", make(3))
    assert one.resident_names == ("b",)


_WORKER = """
    import random, sys, torch
    from fastprefix.kv import KVBudget, PrefixKV
    folder, seed = sys.argv[1], int(sys.argv[2])
    draw = random.Random(seed)
    torch.set_num_threads(1)
    first = torch.zeros(2, 4, 8)
    budget = KVBudget(3 * PrefixKV((first, first), (first, first), 0).nbytes, folder)
    sys.stdin.readline()
    for i in range(40):
        name = f"p{draw.randrange(5)}"
        what = draw.random()
        if what < 0.45:
            number = 1000 * seed + 10 * i + int(name[1:])
            x = torch.full((2, 4, 8), float(number))
            budget.put(name, PrefixKV((x, x), (-x, -x), number), priority=draw.randrange(3))
        elif what < 0.55 and seed == 2:
            try:
                budget.remove(name)
            except KeyError:
                pass
        else:
            try:
                kv = budget.get(name)
            except KeyError:
                continue
            assert all((key == kv.position_offset).all() for key in kv.keys)
            assert all((value == -kv.position_offset).all() for value in kv.values)
            assert kv.position_offset % 10 == int(name[1:]), "another name's prefix"
        assert budget.resident_bytes <= budget.max_bytes
    x = torch.full((2, 4, 8), float(seed))
    budget.put(f"last of {seed}", PrefixKV((x, x), (-x, -x), seed), priority=seed)
"""


def test_two_processes_at_once(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WORKER), str(tmp_path), str(seed)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for seed in (1, 2)
    ]
    ended = [worker.communicate("go\n") for worker in workers]
    for worker, (_, errors) in zip(workers, ended, strict=True):
        assert worker.returncode == 0, errors
    budget = KVBudget(3 * ONE, tmp_path)
    for name in budget:
        number = number_of(budget.get(name))
        if name.startswith("p"):
            assert number % 10 == int(name[1:])
    for seed in (1, 2):
        assert number_of(budget.get(f"last of {seed}")) == seed
        assert budget._entries[f"last of {seed}"].priority == seed
    assert not list(tmp_path.glob(".fastprefix-*"))


def test_a_bank_whose_prefixes_go_away(tmp_path):
    bank = PrefixBank(KVBudget(9 * ONE, tmp_path))
    bank["a"], bank["b"] = make(1), make(2)
    KVBudget(9 * ONE, tmp_path).remove("a")
    assert number_of(bank["b"]) == 2
    assert list(bank) == ["b"]
    with pytest.raises(KeyError, match="no prefix 'a'"):
        bank["a"]


def test_opening_a_folder_leaves_what_another_is_writing(tmp_path):
    """The partial file of a living process is not a leftover."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = tmp_path / f".fastprefix-{partial_folders._HOST}-{child.pid}-{'1' * 32}.partial"
    theirs.mkdir()
    KVBudget(ONE, tmp_path)
    assert theirs.exists()
    child.communicate(b"\n")
    KVBudget(ONE, tmp_path)
    assert not theirs.exists()


def state(folder: Path) -> dict[str, tuple[int, int]]:
    budget = KVBudget(9 * ONE, folder)
    return {name: (number_of(budget.get(name)), budget._entries[name].priority) for name in budget}


@pytest.mark.parametrize("name", ["a", "new"], ids=["replaced", "new"])
def test_a_put_that_is_killed_anywhere(ram_path, name):
    tmp_path = ram_path
    folder = tmp_path / "folder"
    KVBudget(9 * ONE, folder).put("a", make(1), priority=1)
    KVBudget(9 * ONE, folder).put("b", make(2), priority=2)
    shutil.copytree(folder, tmp_path / "template")

    def put() -> None:
        budget.put(name, make(3), priority=3)

    def again() -> None:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "template", folder)

    before = state(folder)
    budget = KVBudget(9 * ONE, folder)
    steps = interruptions.steps_of(put)
    after = state(folder)
    assert after[name] == (3, 3)
    seen = set()
    for step in range(steps):
        again()
        interruptions.killed_at(step, put)
        found = state(folder)
        assert found["b"] == (2, 2)
        # the file takes its name before the index tells its priority
        allowed = [before.get(name), (3, before.get(name, (0, 0))[1]), (3, 3)]
        assert found.get(name) in allowed, step
        seen.add(found.get(name))
        assert {**found, name: None} == {**before, name: None}
    assert {before.get(name), (3, 3)} <= seen
    again()
    for nbytes in (0, 1, 100, 700, 1000):
        assert interruptions.killed_at_byte(nbytes, put)
        assert state(folder) == before


@pytest.mark.parametrize("how", ["tmpfs", "limit"])
def test_a_put_without_room(tmp_path, how):
    if how == "tmpfs" and not interruptions.can_mount(tmp_path):
        pytest.skip("no disk of one's own here")
    folder = tmp_path / "prefixes"
    folder.mkdir()

    def before(folder: Path) -> None:
        budget = KVBudget(10**6, folder)
        budget.put("a", make(1), priority=1)
        budget.put("b", make(2), priority=2)

    def put(folder: Path) -> None:
        KVBudget(10**6, folder).put("a", make(3, P=100), priority=3)

    told = {}
    for room in (0, 200, 4096, 8192, 12288, 10**5):
        for path in folder.iterdir():
            path.unlink()
        told[room], found = interruptions.without_room(folder, how, before, put, state, room)
        assert found["b"] == (2, 2)
        if told[room] is None:
            assert found["a"] == (3, 3)
        else:
            assert found["a"] == (1, 1)
            assert told[room].startswith(f"file: {folder}/")
            assert "cannot be written: " in told[room]
            assert "rror" not in told[room].replace("file: ", "")
    assert told[200] is not None
    assert told[10**5] is None
    reasons = {"tmpfs": "No space left on device", "limit": "File too large"}
    assert told[4096] is not None
    assert told[4096].endswith(f"a.safetensors cannot be written: {reasons[how]}")


def test_never_more_than_max_bytes(tmp_path, monkeypatch):
    """Not for a moment: room is made before a prefix is brought in, or copied."""
    budget = KVBudget(3 * ONE, tmp_path)
    most = []
    load, copied = PrefixKV.load.__func__, PrefixKV.map

    def watched_load(cls, file, device="cpu"):
        most.append(budget.resident_bytes + ONE)
        return load(cls, file, device)

    def watched_copy(self, change):
        most.append(budget.resident_bytes + self.nbytes)
        return copied(self, change)

    monkeypatch.setattr(PrefixKV, "load", classmethod(watched_load))
    monkeypatch.setattr(PrefixKV, "map", watched_copy)
    draw = random.Random(0)
    for i in range(8):
        budget.put(f"p{i}", make(i), pinned=i == 4)
    for i in range(60):
        budget.get(f"p{draw.randrange(8)}")
        budget.put(f"p{draw.randrange(8)}", make(i), pinned=False)
    assert len(most) > 60
    assert max(most) == budget.max_bytes


NAMES = [
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "NUL\0",
    "CON",
    "con.safetensors",
    "index.json",
    ".fastprefix-00000000-1-x.partial",
    "~",
    "$HOME",
    "a\nb",
    " ",
    "x" * 200,
    "\N{LATIN SMALL LETTER U WITH DIAERESIS}",
    "u\N{COMBINING DIAERESIS}",
    "%2e%2e%2fx",
    "A",
    "a",
    "\N{RIGHT-TO-LEFT OVERRIDE}x",
    "*",
    "[a]?",
]


def test_names_never_lead_out_of_the_folder(tmp_path):
    folder = tmp_path / "deep" / "prefixes"
    bank = PrefixBank(KVBudget(5 * ONE, folder))
    for i, name in enumerate(NAMES):
        bank[name] = make(i)
    plain = PrefixBank()
    for i, name in enumerate(NAMES):
        plain[name] = make(i)
    plain.save(tmp_path / "deep" / "saved")
    for again in (
        PrefixBank(KVBudget(5 * ONE, folder)),
        PrefixBank.load(tmp_path / "deep" / "saved"),
    ):
        assert sorted(again) == sorted(NAMES)
        assert [number_of(again[name]) for name in NAMES] == list(range(len(NAMES)))
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"prefixes", "saved"}
    for name in NAMES:
        del bank[name]
    assert {path.name for path in folder.iterdir()} == {"index.json", "index.lock"}


def test_links_are_replaced_and_not_followed(tmp_path):
    """Nothing is written, or deleted, where a link in the folder leads."""
    outside = tmp_path / "outside.safetensors"
    make(7).save(outside)
    content = outside.read_bytes()
    folder = tmp_path / "prefixes"
    folder.mkdir()
    (folder / "a.safetensors").symlink_to(outside)
    (folder / "index.json").symlink_to(tmp_path / "elsewhere.json")
    budget = KVBudget(5 * ONE, folder)
    budget.put("a", make(1))
    assert not (folder / "a.safetensors").is_symlink()
    (folder / "b.safetensors").symlink_to(outside)
    budget.remove("b")
    assert outside.read_bytes() == content
    assert not (tmp_path / "elsewhere.json").exists()
    (folder / "index.lock").unlink()
    (folder / "index.lock").symlink_to(tmp_path / "elsewhere.lock")
    with pytest.raises(OSError, match=r"^file: .*index\.lock cannot be written: "):
        budget.put("a", make(2))
    assert not (tmp_path / "elsewhere.lock").exists()
    assert number_of(budget.get("a")) == 1
