"""PrefixKV: what it refuses, what it says of itself, and its files."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastprefix import PrefixKV
from fastprefix.kv import LayerShape


def make(dtype=torch.float32, P=5, offset=7):
    keys = [torch.randn(2, P, 4, dtype=torch.float64).to(dtype) for _ in range(3)]
    values = [torch.randn(2, P, 6, dtype=torch.float64).to(dtype) for _ in range(3)]
    return PrefixKV(keys, values, offset)


def assert_same(one, other):
    assert one.position_offset == other.position_offset
    assert one.dtype == other.dtype
    for got, expected in zip(one.keys + one.values, other.keys + other.values, strict=True):
        assert torch.equal(got, expected)


def test_what_it_says_of_itself():
    kv = make(torch.bfloat16)
    assert kv.num_layers == 3
    assert kv.num_virtual_tokens == 5
    assert kv.position_offset == 7
    assert kv.shapes == (LayerShape(2, 4, 6),) * 3
    assert kv.dtype == torch.bfloat16
    assert kv.device == torch.device("cpu")
    assert kv.nbytes == 3 * 2 * 5 * (4 + 6) * 2
    assert not kv.requires_grad
    key, value = kv.layer(1)
    assert key is kv.keys[1]
    assert value is kv.values[1]


def test_sequences_become_tuples_and_tensors_are_not_copied():
    key = torch.randn(2, 5, 4)
    kv = PrefixKV([key], [key], 0)
    assert isinstance(kv.keys, tuple)
    assert kv.keys[0] is key


def test_length_is_the_longest_of_the_layers():
    tensors = [torch.zeros(2, length, 4) for length in (3, 6, 0)]
    assert PrefixKV(tensors, tensors, 0).num_virtual_tokens == 6


T = torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("keys", "values", "offset", "error", "message"),
    [
        ([], [], 0, ValueError, "keys, values: got 0 and 0"),
        ([T, T], [T], 0, ValueError, "got 2 and 1"),
        ([T], [T[0]], 0, ValueError, r"values\[0\]: got shape \[5, 4\]"),
        ([T[None]], [T[None]], 0, ValueError, r"keys\[0\]"),
        ([T], [T[:, :4]], 0, ValueError, r"values\[0\]"),
        ([T], [T[:1]], 0, ValueError, r"values\[0\]"),
        ([T, T], [T, T.double()], 0, ValueError, r"values\[1\]: got torch.float64"),
        ([T, T.half()], [T, T.half()], 0, ValueError, r"keys\[1\]: got torch.float16"),
        ([T], [T.to("meta")], 0, ValueError, r"values\[0\].*meta"),
        ([T.long()], [T.long()], 0, TypeError, r"keys\[0\]"),
        ([T], [None], 0, TypeError, r"values\[0\]"),
        ([[1.0]], [T], 0, TypeError, r"keys\[0\]"),
        ([T], [T], -1, ValueError, "position_offset: got -1"),
        ([T], [T], 2.5, TypeError, r"position_offset: got 2\.5"),
    ],
)
def test_refusals_name_what_is_wrong(keys, values, offset, error, message):
    with pytest.raises(error, match=message):
        PrefixKV(keys, values, offset)


def test_to_converts_or_is_itself():
    kv = make()
    assert kv.to() is kv
    assert kv.to("cpu", torch.float32) is kv
    half = kv.to(dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.position_offset == kv.position_offset
    assert torch.equal(half.keys[2], kv.keys[2].half())
    assert kv.to("meta").device.type == "meta"


def test_gradients_flow_through_to_and_stop_at_detach():
    key = torch.randn(2, 5, 4, requires_grad=True)
    kv = PrefixKV([key.transpose(1, 2)], [key.transpose(1, 2)], 1)
    assert kv.requires_grad
    kv.to(dtype=torch.float64).values[0].sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))
    cut = kv.detach()
    assert not cut.requires_grad
    assert cut.keys[0].is_contiguous()
    assert cut.position_offset == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_file_round_trip_is_bitwise(tmp_path, dtype):
    kv = make(dtype)
    kv.save(tmp_path / "kv.safetensors")
    assert_same(PrefixKV.load(str(tmp_path / "kv.safetensors")), kv)
    assert [file.name for file in tmp_path.iterdir()] == ["kv.safetensors"]


def test_strided_trained_and_empty_prefixes_round_trip(tmp_path):
    base = torch.randn(3, 5, 2, 4, requires_grad=True)
    strided = base.transpose(1, 2)
    for number, kv in enumerate(
        (
            PrefixKV(strided, strided, 0),
            PrefixKV([base[0].transpose(0, 1)[:, ::2]], [base[0].transpose(0, 1)[:, 1:4]], 2),
            PrefixKV([strided[0][:, :0]], [strided[0][:, :0]], 0),
            PrefixKV([strided[0], strided[0][:, :2]], [strided[0], strided[0][:, :2]], 5),
        )
    ):
        file = tmp_path / f"{number}.safetensors"
        kv.save(file)
        assert_same(PrefixKV.load(file), kv)


def test_saving_over_a_file_replaces_it(tmp_path):
    file = tmp_path / "kv.safetensors"
    make(P=3).save(file)
    kv = make(P=4)
    kv.save(file)
    assert_same(PrefixKV.load(file), kv)


def test_saving_over_the_file_it_was_loaded_from(tmp_path):
    file = tmp_path / "kv.safetensors"
    kv = make()
    kv.save(file)
    PrefixKV.load(file).save(file)
    assert_same(PrefixKV.load(file), kv)


def test_missing_file(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            PrefixKV.load(path)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_file_cut_short(tmp_path, keep):
    file = tmp_path / "kv.safetensors"
    make().save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"kv\.safetensors is not a whole PrefixKV file"):
        PrefixKV.load(file)


def test_another_safetensors_file(tmp_path):
    file = tmp_path / "kv.safetensors"
    make().save(file)
    save_file(load_file(file), file)  # the tensors without the metadata
    with pytest.raises(ValueError, match="not a whole PrefixKV file"):
        PrefixKV.load(file)


@pytest.mark.parametrize("name", ["layers.1.key", "layers.2.value"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none(tmp_path, name, value):
    file = tmp_path / "kv.safetensors"
    kv = make()
    kv.save(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    layer = int(name.split(".")[1])
    (kv.keys if name.endswith("key") else kv.values)[layer][1, 2, 3] = value
    with pytest.raises(ValueError, match=f"kv holds a NaN or infinity in {name}"):
        kv.save(file)
    assert torch.isfinite(PrefixKV.load(file).keys[1]).all()  # what was there before stayed
    tensors = load_file(file)
    tensors[name][1, 2, 3] = value
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"kv\.safetensors.*damaged or changed"):
        PrefixKV.load(file)
    del metadata["fastprefix-sha256"]  # as of a file from before there was one
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"kv\.safetensors.*{name}"):
        PrefixKV.load(file)


def test_numbers_of_8_bits_round_trip(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        kv = make(dtype)
        kv.save(tmp_path / "kv.safetensors")
        again = PrefixKV.load(tmp_path / "kv.safetensors")
        assert torch.equal(again.keys[0].float(), kv.keys[0].float())


def test_a_loaded_prefix_is_not_the_file(tmp_path):
    file = tmp_path / "kv.safetensors"
    kv = make()
    kv.save(file)
    loaded = PrefixKV.load(file)
    with file.open("r+b") as opened:  # in place: the same file, other bytes
        opened.seek(-200, os.SEEK_END)
        opened.write(bytes(200))
    assert_same(loaded, kv)


def test_threads_may_save_to_one_file(tmp_path):
    file = tmp_path / "kv.safetensors"
    kvs = [make(P=P) for P in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda kv: kv.save(file), kvs * 4))
    assert PrefixKV.load(file).num_virtual_tokens in range(1, 9)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]


def test_tensors_that_do_not_fit_name_the_file(tmp_path):
    file = tmp_path / "kv.safetensors"
    make().save(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["layers.1.value"] = torch.zeros(2, 4, 6)  # one token short
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"kv\.safetensors"):
        PrefixKV.load(file)


def test_layers_that_share_a_block_are_saved_each(tmp_path):
    key, value = torch.randn(2, 2, 3, 4).unbind()
    kv = PrefixKV((key, key, value), (value, key[:, :], value), 3)
    kv.save(tmp_path / "kv.safetensors")
    again = PrefixKV.load(tmp_path / "kv.safetensors")
    for got, want in zip((*again.keys, *again.values), (*kv.keys, *kv.values), strict=True):
        assert torch.equal(got, want)
