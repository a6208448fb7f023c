"""Biases and gates of a prefix: what carries them, what combines them, what refuses them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastprefix import KVBudget, PackedPrefixKV, PrefixBank, PrefixKV
from fastprefix.kv import LayerShape, Reweighting, concatenate, interpolate

KINDS = ["bias", "gate"]
HQ = 6


def make(kind, seed=0, P=5):
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(2, P, 4, generator=generator) for _ in range(3)]
    heads = [torch.randn(HQ, generator=generator) for _ in range(3)]
    return PrefixKV(keys, keys, 7, reweighting=Reweighting(kind, heads) if kind else None)


def assert_same(one, other):
    assert one.reweighting.kind == other.reweighting.kind
    for got, expected in zip(one.tensors, other.tensors, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_stores(tmp_path, kind):
    kv = make(kind)
    assert kv.nbytes == make(None).nbytes + 3 * HQ * 4
    kv.save(tmp_path / "kv.safetensors")
    assert_same(PrefixKV.load(tmp_path / "kv.safetensors"), kv)
    bank = PrefixBank(KVBudget(2 * kv.nbytes, folder=tmp_path / "bank"))
    bank["a"], bank["b"], bank["c"] = kv, make(kind, 1), make(None)
    assert_same(bank["a"], kv)
    assert_same(PrefixBank.load(tmp_path / "bank")["b"], make(kind, 1))
    assert bank["c"].reweighting is None
    bank["b"] = kv
    kv.reweighting.heads[0].zero_()
    assert_same(bank["b"], make(kind))


def test_files_from_before_there_were_any(tmp_path):
    make(None).save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as opened:
        about = json.loads(opened.metadata()["fastprefix-kv"])
    del about["reweighting"]
    metadata = {"format": "pt", "fastprefix-kv": json.dumps(about)}
    save_file(load_file(tmp_path / "new"), tmp_path / "old", metadata)
    assert PrefixKV.load(tmp_path / "old").reweighting is None


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_hold_nonsense_are_refused(tmp_path, kind):
    kv = make(kind)
    kv.reweighting.heads[1][2] = float("nan")
    with pytest.raises(ValueError, match=rf"NaN or infinity in layers.1.{kind}"):
        kv.save(tmp_path / "nan")
    make(kind).save(tmp_path / "short")
    with safe_open(tmp_path / "short", "pt") as opened:
        metadata = {"fastprefix-kv": opened.metadata()["fastprefix-kv"]}
    tensors = load_file(tmp_path / "short")
    save_file({**tensors, f"layers.0.{kind}": torch.zeros(5)}, tmp_path / "shape", metadata)
    with pytest.raises(ValueError, match=r"takes \[Hq\], a multiple of the 2"):
        PrefixKV.load(tmp_path / "shape")
    del tensors[f"layers.2.{kind}"]
    save_file(tensors, tmp_path / "missing", metadata)
    with pytest.raises(ValueError, match="not a whole PrefixKV file"):
        PrefixKV.load(tmp_path / "missing")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_dtypes_and_graphs(kind):
    kv = make(kind)
    half = kv.to(dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    assert half.reweighting.heads[0].dtype is torch.float32
    some = kv.select([2, 0])
    assert some.reweighting.heads == (kv.reweighting.heads[2], kv.reweighting.heads[0])
    whole = some.spread([2, 0], [LayerShape(2, 4, 4)] * 4)
    assert [len(heads) for heads in whole.reweighting.heads] == [HQ, 0, HQ, 0]
    assert_same(whole.select([2, 0]), some)
    assert not kv.requires_grad
    kv.reweighting.heads[1].requires_grad_()
    assert kv.requires_grad
    assert not kv.detach().requires_grad


def test_packed_rows_keep_their_own():
    short = make("gate", 2, P=3).select([0, 1]).spread([0, 1], make(None).shapes)
    packed = PackedPrefixKV.pack({"a": make("bias"), "b": make(None), "c": short})
    assert packed.kinds == ("bias", None, "gate")
    assert packed.num_heads == (HQ,) * 3
    for layer in range(3):
        biases, gates = packed.biases[layer], packed.gates[layer]
        assert torch.equal(biases[:, 0], make("bias").reweighting.heads[layer])
        assert not biases[:, 1:].any()
        if layer < 2:
            assert torch.equal(gates[:, 2], short.reweighting.heads[layer])
            assert not gates[:, :2].any()
    assert packed.to(dtype=torch.bfloat16).biases[0].dtype is torch.float32
    other = Reweighting("bias", (torch.zeros(4),) * 3)
    with pytest.raises(ValueError, match="takes the same"):
        PackedPrefixKV.pack({"a": make("bias"), "b": replace(make(None), reweighting=other)})


@pytest.mark.parametrize("method", ["linear", "spherical"])
@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_is_linear(kind, method):
    one, other = make(kind), make(kind, 1)
    assert_same(interpolate([one, other], [1.0, 0.0], method), one)
    assert_same(interpolate([one, other], [0.0, 1.0], method), other)
    mixed = interpolate([one, other], [0.25, 0.75], method)
    for layer, got in enumerate(mixed.reweighting.heads):
        a, b = one.reweighting.heads[layer], other.reweighting.heads[layer]
        torch.testing.assert_close(got, 0.25 * a + 0.75 * b)
    for wrong in (None, *KINDS):
        if wrong != kind:
            with pytest.raises(ValueError, match=r"kvs\[1\]: got reweighting"):
                interpolate([one, make(wrong)], [0.5, 0.5], method)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_prefixes_have_one_for_all(kind):
    one, same = make(kind), make(kind)
    joined = concatenate([one, same])
    assert joined.num_virtual_tokens == 10
    assert joined.reweighting is one.reweighting
    trained = same.map(lambda tensor: tensor.clone().requires_grad_())
    assert concatenate([trained, trained]).reweighting is trained.reweighting
    for wrong in (make(None), make(kind, 1), trained):
        with pytest.raises(ValueError, match=r"kvs\[1\]: got another reweighting"):
            concatenate([one, wrong])


KEYS = (torch.zeros(2, 5, 4),)


@pytest.mark.parametrize(
    ("kind", "heads", "in_window", "error", "message"),
    [
        ("scale", [torch.zeros(6)], False, ValueError, "kind: got 'scale'"),
        (
            "bias",
            [torch.zeros(6).half()],
            False,
            TypeError,
            r"heads\[0\]: got torch.float16, takes",
        ),
        ("bias", [torch.zeros(6, 1)], False, ValueError, r"got shape \[6, 1\], takes \[Hq\]"),
        ("bias", [torch.zeros(5)], False, ValueError, "a multiple of the 2 key/value heads"),
        ("bias", [torch.zeros(0)], False, ValueError, "a multiple of the 2 key/value heads"),
        ("bias", [torch.zeros(6)] * 2, False, ValueError, "got 2 layers, takes 1"),
        ("gate", [torch.zeros(6)], True, ValueError, "got gates with in_window"),
    ],
)
def test_refusals(kind, heads, in_window, error, message):
    with pytest.raises(error, match=message):
        PrefixKV(KEYS, KEYS, 0, in_window, Reweighting(kind, heads))
