"""The flat matrix [P, width]: there and back, and PEFT's layout."""

import pytest
import torch

from fastprefix import PrefixKV
from fastprefix.kv import LayerShape, flat_width, to_flat, to_prefix_kv

SAME = (LayerShape(2, 16, 16),) * 3
MIXED = (LayerShape(2, 16, 16), LayerShape(4, 8, 24), LayerShape(1, 32, 8))
P = 5


@pytest.mark.parametrize("shapes", [SAME, MIXED], ids=["same", "mixed"])
def test_there_and_back(shapes):
    flat = torch.randn(P, flat_width(shapes))
    kv = to_prefix_kv(flat, shapes)
    assert kv.shapes == shapes
    assert kv.num_virtual_tokens == kv.position_offset == P
    assert torch.equal(to_flat(kv), flat)


def test_width_is_keys_and_values_of_all_layers():
    assert flat_width(SAME) == 3 * 2 * 2 * 16
    assert flat_width(MIXED) == 2 * 32 + 4 * 32 + 40


def test_layout_is_that_of_peft():
    """PEFT: view(B, P, layers * 2, Hkv, D), permute([2, 0, 3, 1, 4]), split in pairs."""
    flat = torch.randn(P, flat_width(SAME))
    pairs = flat[None].view(1, P, 6, 2, 16).permute(2, 0, 3, 1, 4).split(2)
    kv = to_prefix_kv(flat, SAME)
    for layer, (key, value) in enumerate(pairs):
        assert torch.equal(kv.keys[layer], key[0])
        assert torch.equal(kv.values[layer], value[0])


def test_row_is_a_token_and_holds_key_then_value_of_each_layer():
    kv = to_prefix_kv(torch.arange(2 * flat_width(MIXED)).view(2, -1).double(), MIXED)
    start = flat_width(MIXED)  # of the second token
    for key, value in zip(kv.keys, kv.values, strict=True):
        for tensor in (key, value):
            row = tensor[:, 1].flatten()  # heads one after the other
            assert torch.equal(row, torch.arange(start, start + row.numel()).double())
            start += row.numel()


def test_views_share_memory_and_pass_gradients():
    flat = torch.randn(P, flat_width(MIXED), requires_grad=True)
    kv = to_prefix_kv(flat, MIXED)
    assert all(t.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for t in kv.keys)
    weights = torch.randn_like(flat)
    (to_flat(kv) * weights).sum().backward()
    assert torch.equal(flat.grad, weights)


@pytest.mark.parametrize("offset", [0, 3, 100])
def test_position_offset(offset):
    assert to_prefix_kv(torch.zeros(P, flat_width(SAME)), SAME, offset).position_offset == offset


@pytest.mark.parametrize("shape", [(P, 191), (P, 193), (192,), (1, P, 192), (192, P)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"flat: got shape .*takes \[P, 192\]"):
        to_prefix_kv(torch.zeros(shape), SAME)


def test_ragged_prefixes_are_refused():
    long, short = torch.zeros(2, 5, 4), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="lengths"):
        to_flat(PrefixKV((long, short), (long, short), 5))
