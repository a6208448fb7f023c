"""What layers keep of a prompt besides: carried by a prefix, never mixed."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastprefix import KVBudget, PrefixBank, PrefixKV
from fastprefix.kv import LayerState, PackedPrefixKV, concatenate, interpolate


def states(seed=0):
    torch.manual_seed(seed)
    return (
        LayerState(0, {"conv.0": torch.randn(6, 4), "recurrent.0": torch.randn(2, 3, 3)}),
        LayerState(2, {"conv.0": torch.randn(6, 4), "conv.1": torch.randn(2, 2).double()}),
    )


def prompt(length=3, seed=0, dtype=torch.float32, kept=states):
    torch.manual_seed(100 + seed)
    keys, values = torch.randn(2, 2, length, 4), torch.randn(2, 2, length, 4)
    carried = kept and kept(seed)
    return PrefixKV(tuple(keys.to(dtype)), tuple(values.to(dtype)), length, True, states=carried)


def same(one, other):
    pairs = zip(one.tensors, other.tensors, strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_a_file_holds_them(tmp_path):
    kv = prompt(dtype=torch.bfloat16)
    kv.save(tmp_path / "a.safetensors")
    loaded = PrefixKV.load(tmp_path / "a.safetensors")
    assert same(kv, loaded)
    assert len(loaded.tensors) == 8
    assert [one.layer for one in loaded.states] == [0, 2]
    assert list(loaded.states[1].tensors) == ["conv.0", "conv.1"]


def test_files_that_know_no_states_still_load(tmp_path):
    kv = prompt(kept=None)
    kv.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        (key,) = file.metadata().keys() - {"format", "fastprefix-sha256"}
        about = json.loads(file.metadata()[key])
    del about["states"]
    save_file(tensors, tmp_path / "old.safetensors", {"format": "pt", key: json.dumps(about)})
    loaded = PrefixKV.load(tmp_path / "old.safetensors")
    assert loaded.states is None
    assert same(kv, loaded)


def test_a_state_that_is_not_finite_is_not_written(tmp_path):
    kv = prompt()
    kv.states[0].tensors["recurrent.0"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN .* states.0.recurrent.0"):
        kv.save(tmp_path / "a.safetensors")


def test_they_count_and_move_and_keep_their_dtype():
    kv = prompt()
    extra = sum(x.nbytes for one in kv.states for x in one.tensors.values())
    assert kv.nbytes == prompt(kept=None).nbytes + extra
    half = kv.to(dtype=torch.bfloat16)
    assert half.keys[0].dtype == torch.bfloat16
    assert half.states[0].tensors["recurrent.0"].dtype == torch.float32
    assert half.states[1].tensors["conv.1"].dtype == torch.float64
    apart = kv.detach()
    kv.states[0].tensors["conv.0"].zero_()
    assert apart.states[0].tensors["conv.0"].abs().max() > 0
    doubled = apart.map(lambda x: 2 * x)
    ratio = doubled.states[1].tensors["conv.0"] / apart.states[1].tensors["conv.0"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0))


def test_attention_layers_are_selected_and_states_stay():
    kv = prompt()
    chosen = kv.select([1])
    assert chosen.num_layers == 1
    assert chosen.states == kv.states == chosen.spread([1], kv.shapes).states


def test_copies_and_pickles():
    kv = prompt()
    assert same(copy.deepcopy(kv), kv)
    assert same(pickle.loads(pickle.dumps(kv)), kv)


def test_several_prompts_keep_them_apart():
    packed = PackedPrefixKV.pack(
        {"a": prompt(3, 0), "b": prompt(5, 1), "c": prompt(2, 2, kept=None)}
    )
    a, b, none = packed.to("cpu", torch.bfloat16).states
    assert none is None
    for got, seed in ((a, 0), (b, 1)):
        for one, want in zip(got, states(seed), strict=True):
            assert all(torch.equal(one.tensors[name], x) for name, x in want.tensors.items())


def test_states_are_neither_averaged_nor_joined():
    kvs = [prompt(3, 0), prompt(3, 1)]
    with pytest.raises(ValueError, match="a prompt's state cannot be averaged"):
        interpolate(kvs, [0.5, 0.5])
    assert interpolate(kvs, [0.0, 1.0]) is kvs[1]
    assert same(concatenate(kvs[:1]), kvs[0])
    learned = [PrefixKV(kv.keys, kv.values, 3, states=kv.states) for kv in kvs]
    with pytest.raises(ValueError, match="a prompt's state cannot be joined"):
        concatenate(learned)


def test_a_bank_with_a_budget_brings_them_back(tmp_path):
    kvs = {name: prompt(seed=seed) for seed, name in enumerate("abc")}
    bank = PrefixBank(KVBudget(kvs["a"].nbytes, folder=tmp_path))
    for name, kv in kvs.items():
        bank.add(name, kv)
    assert all(same(bank[name], kv) for name, kv in kvs.items())
    again = KVBudget(kvs["a"].nbytes, folder=tmp_path)
    assert same(again.get("b"), kvs["b"])
    assert again.resident_bytes == kvs["b"].nbytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: (), "at least one, or None"),
        (lambda: states()[:1] * 2, "takes each once"),
        (lambda: (states()[0], 3), "takes LayerState objects"),
        (lambda: (LayerState(-1, {"conv.0": torch.ones(1)}),), "from 0"),
        (lambda: (LayerState(0, {}),), "at least one"),
        (lambda: (LayerState(0, {"conv.0": torch.ones(1).long()}),), "floating-point"),
        (lambda: (LayerState(0, {"conv.0": torch.ones(1, device="meta")}),), "meta, takes cpu"),
    ],
)
def test_what_are_no_states_is_refused(wrong, message):
    kv = prompt(kept=None)
    with pytest.raises((ValueError, TypeError), match=message):
        PrefixKV(kv.keys, kv.values, 3, states=wrong())
