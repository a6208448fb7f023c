"""Named prefixes: the dict, what it checks, and threads."""

from __future__ import annotations

import threading

import pytest
import torch

from fastprefix.kv import KVBudget, PrefixBank, PrefixKV, concatenate, interpolate


def make(seed: int = 0, heads: int = 2, P: int = 3) -> PrefixKV:
    """One layer."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, heads, P, 4, generator=generator)
    return PrefixKV((key,), (value,), P)


@pytest.fixture(params=["free", "budget"])
def bank(request, tmp_path) -> PrefixBank:
    """A bank with a budget of one prefix, and one without a budget."""
    budget = KVBudget(make().nbytes, tmp_path / "home") if request.param == "budget" else None
    return PrefixBank(budget)


def test_it_is_a_dict(bank):
    bank["a"], bank["b"] = make(0), make(1)
    assert torch.equal(bank["a"].keys[0], make(0).keys[0])
    assert list(bank) == ["a", "b"]
    assert "a" in bank
    assert len(bank) == 2
    del bank["a"]
    assert list(bank) == ["b"]
    for forget in (lambda: bank["a"], lambda: bank.pop("a"), lambda: bank.__delitem__("a")):
        with pytest.raises(KeyError, match="no prefix 'a'"):
            forget()


def test_all_prefixes_fit_one_model(bank):
    bank["a"] = make(0)
    with pytest.raises(ValueError, match="'b' has layers"):
        bank["b"] = make(1, heads=1)
    assert list(bank) == ["a"]
    bank["a"] = make(1, heads=1)  # the only one may change
    assert bank["a"].shapes == make(1, heads=1).shapes
    with pytest.raises(TypeError, match="PrefixKV"):
        bank["c"] = torch.ones(1)
    with pytest.raises(ValueError, match="name"):
        bank[""] = make()


def test_refused_prefixes_leave_no_trace(bank):
    bank["a"] = make(0)
    wrong = {"pinned": True} if bank.budget is None else {"pinned": True, "priority": 1}
    with pytest.raises((ValueError, RuntimeError)):  # no budget, or one that it does not fit
        bank.add("a", make(1, heads=4), **wrong)
    bank["b"] = make(2)
    assert bank["a"].shapes == bank["b"].shapes
    with pytest.raises(ValueError, match="'c' has layers"):
        bank["c"] = make(1, heads=4)


def test_what_lies_in_a_budget_already_is_heeded(tmp_path):
    KVBudget(10**6, tmp_path).put("a", make(0))
    bank = PrefixBank(KVBudget(10**6, tmp_path))
    with pytest.raises(ValueError, match="'b' has layers"):
        bank["b"] = make(1, heads=4)
    assert list(bank) == ["a"]


def test_rows_load_what_they_name_and_at_most_one_where_they_name_none(tmp_path):
    bank = PrefixBank(KVBudget(make().nbytes, tmp_path))
    for seed, name in enumerate("abc"):
        bank[name] = make(seed)
    assert set(bank.select(["b", None, "b"])) == {"b"}
    before = len(bank.budget.evictions)
    assert len(bank.select([None, None])) == 1
    assert len(bank.budget.evictions) <= before + 1


def test_combinations(bank):
    bank["a"], bank["b"] = make(0), make(1)
    mixed = bank.interpolate({"a": 0.25, "b": 0.75}, "spherical")
    expected = interpolate([make(0), make(1)], [0.25, 0.75], "spherical")
    assert torch.equal(mixed.keys[0], expected.keys[0])
    joined = bank.concatenate(["b", "a"])
    assert torch.equal(joined.values[0], concatenate([make(1), make(0)]).values[0])
    with pytest.raises(KeyError, match="no prefix 'c'"):
        bank.interpolate({"a": 0.5, "c": 0.5})


def test_save_and_load(bank, tmp_path):
    bank["a/b"], bank["ü"] = make(0), make(1)
    bank.save(tmp_path / "saved")
    again = PrefixBank.load(tmp_path / "saved")
    assert sorted(again) == ["a/b", "ü"]
    assert torch.equal(again["ü"].keys[0], make(1).keys[0])
    assert sorted(KVBudget(0, tmp_path / "saved")) == ["a/b", "ü"]
    with pytest.raises(FileNotFoundError, match="holds no prefixes"):
        PrefixBank.load(tmp_path / "nothing")


def test_priorities_need_a_budget():
    with pytest.raises(ValueError, match="no budget"):
        PrefixBank().add("a", make(), priority=1)


def test_threads_share_a_bank(bank):
    for i in range(4):
        bank[f"p{i}"] = make(i)
    wrong: list[object] = []

    def read(i: int) -> None:
        try:
            for step in range(30):
                name = (i + step) % 4
                if not torch.equal(bank[f"p{name}"].keys[0], make(name).keys[0]):
                    wrong.append(name)
        except Exception as error:
            wrong.append(error)

    def write(i: int) -> None:
        try:
            for step in range(30):
                bank[f"extra{i}"] = make(10 + step)
                bank[f"p{step % 4}"] = make(step % 4)
                del bank[f"extra{i}"]
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3) for work in (read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(bank) == ["p0", "p1", "p2", "p3"]
