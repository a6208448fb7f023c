"""What is evicted, what comes back, and what is left when the process is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from fastprefix.kv import KVBudget, KVBudgetError, LayerShape, PrefixKV, plan_kv_bytes

SHAPES = (LayerShape(2, 8, 4), LayerShape(1, 6, 6))


def make(seed: int = 0, P: int = 4, dtype: torch.dtype = torch.float32) -> PrefixKV:
    """A prefix of 4 x 36 numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: LayerShape, size: int) -> torch.Tensor:
        return torch.randn(shape.num_heads, P, size, generator=generator).to(dtype)

    return PrefixKV(
        tuple(draw(s, s.key_size) for s in SHAPES),
        tuple(draw(s, s.value_size) for s in SHAPES),
        position_offset=P + 1,
        in_window=bool(seed % 2),
    )


ONE = make().nbytes


def same(a: PrefixKV, b: PrefixKV) -> bool:
    """Bit for bit, with what they mean."""
    return (a.position_offset, a.in_window, a.dtype) == (
        b.position_offset,
        b.in_window,
        b.dtype,
    ) and all(
        torch.equal(x, y) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
    )


def test_the_lowest_priority_leaves_first_then_what_was_unused_longest(tmp_path):
    budget = KVBudget(3 * ONE, tmp_path)
    budget.put("low", make(1), priority=-1)
    budget.put("old", make(2))
    budget.put("new", make(3))
    budget.get("low")
    assert [e.name for e in budget.put("x", make(4))] == ["low"]
    budget.get("old")
    (gone,) = budget.put("y", make(5))
    assert (gone.name, gone.nbytes, gone.priority) == ("new", ONE, 0)
    assert Path(gone.target).is_file()
    assert [e.name for e in budget.evictions] == ["low", "new"]
    assert budget.resident_names == ("old", "x", "y")
    assert budget.resident_bytes == 3 * ONE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eviction_and_return_lose_nothing(tmp_path, dtype):
    kvs = {f"task {i}/ü*": make(i, dtype=dtype) for i in range(6)}
    budget = KVBudget(2 * make(dtype=dtype).nbytes, tmp_path)
    for name, kv in kvs.items():
        budget.put(name, kv)
    for name in random.Random(0).choices(list(kvs), k=30):
        assert same(budget.get(name), kvs[name])
        assert budget.resident_bytes <= budget.max_bytes
    assert len(budget) == 6
    assert set(budget) == set(kvs)


def test_what_was_put_is_a_copy(tmp_path):
    kv = make()
    before = kv.keys[0].clone()
    budget = KVBudget(ONE, tmp_path)
    budget.put("a", kv)
    kv.keys[0].zero_()
    assert torch.equal(budget.get("a").keys[0], before)


def test_pinned_prefixes_stay(tmp_path):
    budget = KVBudget(2 * ONE, tmp_path)
    budget.put("pin", make(0), priority=-9, pinned=True)
    budget.put("a", make(1))
    assert [e.name for e in budget.put("b", make(2))] == ["a"]
    with pytest.raises(ValueError, match="pinned"):
        budget.evict("pin")
    budget.pin("b")
    with pytest.raises(KVBudgetError, match="pinned"):
        budget.put("c", make(3), pinned=True)
    assert "c" not in budget
    assert not (tmp_path / "c.safetensors").exists()
    with pytest.raises(KVBudgetError):
        budget.pin("a")
    # what no longer fits is still handed out
    assert same(budget.get("a"), make(1))
    assert budget.resident_names == ("pin", "b")
    budget.unpin("pin")
    budget.get("a")
    assert "pin" not in budget.resident_names


def test_larger_than_the_budget(tmp_path):
    budget = KVBudget(ONE - 1, tmp_path)
    assert budget.put("a", make()) == []
    assert budget.resident_bytes == 0
    assert same(budget.get("a"), make())
    with pytest.raises(KVBudgetError, match="is pinned"):
        budget.put("a", make(1), pinned=True)
    assert same(budget.get("a"), make())


def test_a_folder_is_found_again(tmp_path):
    first = KVBudget(3 * ONE, tmp_path)
    first.put("a", make(1), priority=5)
    first.put("b", make(2), pinned=True)
    first.put("c", make(3))
    first.put("b", make(4), pinned=True)
    first.remove("c")
    again = KVBudget(ONE, tmp_path)
    assert set(again) == {"a", "b"}
    assert again.resident_names == ("b",)
    assert same(again.get("b"), make(4))
    again.unpin("b")
    assert [e.priority for e in again.evictions] == []
    again.get("a")
    assert again.resident_names == ("a",)
    again.get("b")
    assert again.evictions[-1].priority == 5
    again.pin("b")
    with pytest.raises(KVBudgetError, match="max_bytes"):
        KVBudget(ONE - 1, tmp_path)


def test_evict_by_hand_and_priorities(tmp_path):
    budget = KVBudget(2 * ONE, tmp_path)
    budget.put("a", make(0))
    budget.put("b", make(1))
    budget.set_priority("a", 1)
    assert [e.name for e in budget.put("c", make(2))] == ["b"]
    eviction = budget.evict("a")
    assert eviction is not None
    assert eviction.name == "a"
    assert budget.evict("a") is None


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="max_bytes"):
        KVBudget(-1, tmp_path)
    with pytest.raises(ValueError, match="folder"):
        KVBudget(1)
    budget = KVBudget(ONE, tmp_path)
    with pytest.raises(KeyError, match="no prefix 'a'"):
        budget.get("a")
    with pytest.raises(ValueError, match="name"):
        budget.put("", make())
    kv = make()
    kv.keys[0].requires_grad_()
    with pytest.raises(ValueError, match="detach"):
        budget.put("a", kv)
    assert len(budget) == 0


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (b"x", TypeError, "name: got bytes"),
        ("x" * 244, ValueError, "255"),
        ("\N{CJK UNIFIED IDEOGRAPH-4E00}" * 28, ValueError, "255"),
        ("\ud800", ValueError, "UTF-8"),
    ],
)
def test_names_that_no_file_can_have_are_refused(tmp_path, name, error, said):
    budget = KVBudget(ONE, tmp_path)
    with pytest.raises(error, match=said):
        budget.put(name, make())
    budget.put("x" * 243, make(1))  # and nothing is amiss afterwards
    assert same(KVBudget(ONE, tmp_path).get("x" * 243), make(1))


def test_what_could_not_be_loaded_is_not_put(tmp_path):
    budget = KVBudget(ONE, tmp_path)
    budget.put("a", make())
    bad = make(1)
    bad.values[0][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        budget.put("a", bad)
    budget.evict("a")
    assert same(budget.get("a"), make())


@pytest.mark.parametrize("text", ["", "[]", '{"a": null}', '{"a": {}}', "\xff"])
def test_an_index_that_is_none_is_named(tmp_path, text):
    KVBudget(ONE, tmp_path).put("a", make())
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json does not hold"):
        KVBudget(ONE, tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 40, -1])
def test_a_file_cut_short_is_named_when_the_folder_is_opened(tmp_path, keep):
    KVBudget(ONE, tmp_path).put("a", make())
    file = tmp_path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a whole PrefixKV file"):
        KVBudget(ONE, tmp_path)


_KILLED = """
    import sys, torch
    from fastprefix.kv import KVBudget, PrefixKV
    budget = KVBudget(200_000, sys.argv[1])
    for i in range(100000):
        x = torch.full((2, 64, 64), float(i))
        kv = PrefixKV((x,), (-x,), i)
        budget.put(f"p{i % 7}", kv)  # new names and replaced ones, each of which evicts
        print(i, flush=True)
"""


@pytest.mark.parametrize("round_", range(3))
def test_a_killed_process_loses_nothing_that_it_had_put(tmp_path, round_):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    last = -1
    for line in process.stdout:
        last = int(line)
        if last >= 20 + round_:
            break
    # whatever it is doing now
    threading.Event().wait(0.0007 * (round_ + 1))
    process.send_signal(signal.SIGKILL)
    last = max([last, *map(int, process.stdout.read().split())])
    process.wait()
    (tmp_path / "holiday.zip.partial").write_bytes(b"somebody else's")
    budget = KVBudget(200_000, tmp_path)
    assert sorted(budget) == [f"p{j}" for j in range(7)]
    for j in range(7):
        kv = budget.get(f"p{j}")
        newest = max(i for i in range(last + 1) if i % 7 == j)
        # the one after the last that was reported may be in place already
        following = {last + 1} if (last + 1) % 7 == j else set()
        assert kv.position_offset in {newest, *following}
        assert (kv.keys[0] == kv.position_offset).all()
        assert (kv.values[0] == -kv.position_offset).all()
    files = {f"p{j}.safetensors" for j in range(7)}
    others = {"index.json", "index.lock", "holiday.zip.partial"}
    assert {one.name for one in tmp_path.iterdir()} == files | others


def test_threads_share_a_budget(tmp_path):
    kvs = {f"t{i}": make(i) for i in range(8)}
    budget = KVBudget(3 * ONE, tmp_path)
    for name, kv in kvs.items():
        budget.put(name, kv)
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            name = draw.choice(list(kvs))
            what = draw.random()
            if what < 0.7:
                if not same(budget.get(name), kvs[name]):
                    wrong.append(name)
            elif what < 0.85:
                budget.put(name, kvs[name], priority=draw.randrange(3))
            else:
                budget.evict(name)
            if budget.resident_bytes > budget.max_bytes:
                wrong.append("too much")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(same(budget.get(name), kv) for name, kv in kvs.items())


def test_the_plan_is_what_the_prefixes_then_take():
    plan = plan_kv_bytes(SHAPES, {"a": 4, "b": 0, "c": 7}, torch.float32, batch_size=16)
    assert plan.nbytes == {"a": make().nbytes, "b": 0, "c": make(P=7).nbytes}
    assert plan.total == make().nbytes + make(P=7).nbytes
    assert plan.expanded["a"] == 16 * make().nbytes
    assert (
        plan_kv_bytes(SHAPES, {"a": 4}, torch.bfloat16).total == make(dtype=torch.bfloat16).nbytes
    )
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        plan_kv_bytes(SHAPES, {"a": -1}, torch.float32)
