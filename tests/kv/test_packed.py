"""PackedPrefixKV: prefixes end to end, and what does not go together."""

import pytest
import torch

from fastprefix import PackedPrefixKV, PrefixKV


def prefix(lengths, *, offset=None, heads=2, dtype=torch.float32, in_window=False):
    """A prefix of one length a layer; values are wider than keys."""
    keys = tuple(torch.randn(heads, P, 8, dtype=dtype).requires_grad_() for P in lengths)
    values = tuple(torch.randn(heads, P, 4, dtype=dtype).requires_grad_() for P in lengths)
    return PrefixKV(keys, values, max(lengths) if offset is None else offset, in_window)


def test_each_prefix_lies_where_its_length_says():
    members = {"a": prefix((3, 5)), "empty": prefix((0, 0)), "b": prefix((4, 1), offset=9)}
    packed = PackedPrefixKV.pack(members)
    assert packed.names == ("a", "empty", "b")
    assert packed.longest == (4, 5)
    assert packed.position_offsets.tolist() == [5, 0, 9, 0]
    assert packed.shapes == members["a"].shapes
    for layer in range(2):
        key, value = packed.layer(layer)
        lengths = packed.prefix_lengths[layer].tolist()
        parts = zip(members.values(), key.split(lengths, 1), value.split(lengths, 1), strict=True)
        for kv, own_key, own_value in parts:
            assert torch.equal(own_key, kv.keys[layer])
            assert torch.equal(own_value, kv.values[layer])


def test_layers_of_the_same_lengths_share_them():
    same = PackedPrefixKV.pack({"a": prefix((3, 3, 2)), "b": prefix((4, 4, 4))})
    assert same.prefix_lengths[0] is same.prefix_lengths[1]
    assert same.prefix_lengths[2].tolist() == [2, 4]
    moved = same.to(dtype=torch.float64)
    assert moved.keys[0].dtype == torch.float64
    assert moved.prefix_lengths[0] is moved.prefix_lengths[1]


def test_gradients_flow_to_each_member():
    members = {"a": prefix((3, 5)), "b": prefix((4, 1))}
    packed = PackedPrefixKV.pack(members)
    (packed.keys[0][:, 3:].sum() + 2 * packed.values[1][:, :5].sum()).backward()
    assert torch.equal(members["b"].keys[0].grad, torch.ones(2, 4, 8))
    assert torch.equal(members["a"].keys[0].grad, torch.zeros(2, 3, 8))
    assert torch.equal(members["a"].values[1].grad, torch.full((2, 5, 4), 2.0))


def test_index_of_rows():
    packed = PackedPrefixKV.pack({"a": prefix((3,)), "b": prefix((4,))})
    assert packed.index(["b", None, "a", "b"]).tolist() == [1, -1, 0, 1]
    for rows in (["a", "c"], [0], [True]):
        with pytest.raises(ValueError, match=r"rows: got .*, takes one of \['a', 'b'\]"):
            packed.index(rows)
    with pytest.raises(ValueError, match="rows: got no names"):
        packed.index([])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (prefix((3,)), "shapes"),
        (prefix((3, 3), heads=1), "shapes"),
        (prefix((3, 3), dtype=torch.float64), "dtype torch.float64, takes torch.float32"),
    ],
    ids=["layers", "heads", "dtype"],
)
def test_prefixes_that_do_not_go_together(other, message):
    with pytest.raises(ValueError, match=rf"kv: got 'b' with {message}.*of 'a'"):
        PackedPrefixKV.pack({"a": prefix((3, 3)), "b": other})


def test_what_is_no_prefix():
    with pytest.raises(TypeError, match="kv: got Tensor for 'b'"):
        PackedPrefixKV.pack({"a": prefix((3,)), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="at least one"):
        PackedPrefixKV.pack({})
