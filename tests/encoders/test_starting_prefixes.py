"""Orthogonal starts, and prefixes of another length."""

import pytest
import torch

from fastprefix import PrefixKV
from fastprefix.encoders import orthogonal, resize
from fastprefix.kv import FlatLayout, LayerShape


def kv_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(2, length, 4, generator=generator) for length in lengths]
    values = [torch.randn(2, length, 3, generator=generator) for length in lengths]
    return PrefixKV(keys, values, 3, in_window=True)


def test_orthogonal_tokens_in_every_layer():
    layout = FlatLayout((LayerShape(2, 8, 8), LayerShape(2, 8, 6), LayerShape(1, 4, 4)), (7, 3, 0))
    kv = layout.to_prefix_kv(orthogonal(layout, 0.5))
    for tensor, length in ((kv.keys[0], 7), (kv.values[0], 7), (kv.keys[1], 3), (kv.values[1], 3)):
        tokens = tensor.transpose(0, 1).flatten(1)
        norm = 0.25 * tokens.shape[1]
        torch.testing.assert_close(tokens @ tokens.T, norm * torch.eye(length))


def test_more_tokens_than_numbers_have_orthogonal_columns():
    layout = FlatLayout.make((LayerShape(1, 4, 4),), 9)
    key = layout.to_prefix_kv(orthogonal(layout, 0.5)).keys[0][0]
    torch.testing.assert_close(key.T @ key, 0.25 * 9 * torch.eye(4))
    assert key.square().mean().sqrt().item() == pytest.approx(0.5)


def test_cut():
    kv = kv_of((5, 5))
    for method in ("pad", "repeat"):
        short = resize(kv, (3, 0), method)
        assert short.position_offset == 3
        assert not short.in_window
        for got, whole in ((short.keys, kv.keys), (short.values, kv.values)):
            assert torch.equal(got[0], whole[0][:, :3])
            assert got[1].shape[1] == 0


def test_pad_puts_random_tokens_behind():
    kv = kv_of((5, 0))
    long = resize(kv, 400, "pad", pad_std=0.3)
    assert torch.equal(long.keys[0][:, :5], kv.keys[0])
    for new in (long.keys[0][:, 5:], long.values[1]):
        assert new.std().item() == pytest.approx(0.3, rel=0.1)


def test_repeat_starts_over():
    kv = kv_of((3,))
    long = resize(kv, 8, "repeat")
    assert torch.equal(long.values[0], kv.values[0][:, [0, 1, 2, 0, 1, 2, 0, 1]])


@pytest.mark.parametrize("length", [1, 2, 4, 5, 9, 23])
def test_resample_is_linear_interpolation(length):
    kv = kv_of((5,))
    got = resize(kv, length, "resample").keys[0]
    expected = torch.nn.functional.interpolate(
        kv.keys[0].transpose(1, 2), length, mode="linear", align_corners=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[:, 0], kv.keys[0][:, 0])
    if length > 1:
        torch.testing.assert_close(got[:, -1], kv.keys[0][:, -1])


def test_resample_of_one_token_repeats_it():
    kv = kv_of((1,))
    assert torch.equal(resize(kv, 3, "resample").keys[0], kv.keys[0].expand(-1, 3, -1))


def test_same_length_changes_nothing():
    kv = kv_of((5, 2))
    for method in ("pad", "repeat", "resample"):
        same = resize(kv, (5, 2), method)
        assert all(got is x for got, x in zip(same.keys, kv.keys, strict=True))


def test_refusals():
    with pytest.raises(ValueError, match="method: got 'stretch'"):
        resize(kv_of((5,)), 3, "stretch")
    for method in ("repeat", "resample"):
        with pytest.raises(ValueError, match="kv: got a layer without a prefix"):
            resize(kv_of((5, 0)), (5, 5), method)
    with pytest.raises(ValueError, match="lengths: got 3"):
        resize(kv_of((5, 5)), (5, 5, 5))
