"""A prefix as one matrix [P, width]: what encoders compute and PEFT's files hold.

A row is one virtual token; along it lie, layer after layer, the key of each head, then the value
of each head. Where all layers have one shape this is PEFT's [P, layers · 2 · Hkv · D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprefix.kv import LayerShape, PrefixKV


def flat_width(shapes: Sequence[LayerShape]) -> int:
    """Numbers that one virtual token holds in all layers."""
    return sum(shape.width for shape in shapes)


def to_prefix_kv(
    flat: Tensor, shapes: Sequence[LayerShape], position_offset: int | None = None
) -> PrefixKV:
    """Views of [P, width] as keys and values; differentiable.

    Args:
        flat: [P, width].
        shapes: the layers' key and value shapes.
        position_offset: P if None.

    Raises:
        ValueError: the width does not fit the shapes.
    """
    if flat.dim() != 2 or flat.shape[1] != flat_width(shapes):
        raise ValueError(
            f"flat: got shape {list(flat.shape)}, takes [P, {flat_width(shapes)}] for these layers"
        )
    P = flat.shape[0]
    sizes = [
        shape.num_heads * size for shape in shapes for size in (shape.key_size, shape.value_size)
    ]
    parts = flat.split(sizes, dim=1)
    heads = [shape.num_heads for shape in shapes for _ in range(2)]
    tensors = [
        part.view(P, num_heads, -1).transpose(0, 1)
        for part, num_heads in zip(parts, heads, strict=True)
    ]
    if position_offset is None:
        position_offset = P
    return PrefixKV(tuple(tensors[0::2]), tuple(tensors[1::2]), position_offset)


def check_start(flat: Tensor, num_virtual_tokens: int, shapes: Sequence[LayerShape]) -> None:
    """Raises ValueError unless flat is [P, width]: an encoder starts from no other shape."""
    expected = (num_virtual_tokens, flat_width(shapes))
    if tuple(flat.shape) != expected:
        raise ValueError(f"flat: got shape {list(flat.shape)}, takes [P, width] = {list(expected)}")


def to_flat(kv: PrefixKV) -> Tensor:
    """The inverse of :func:`to_prefix_kv`: [P, width].

    Raises:
        ValueError: layers have prefixes of different lengths, which one matrix cannot hold.
    """
    P = kv.num_virtual_tokens
    if any(key.shape[1] != P for key in kv.keys):
        raise ValueError("kv: got layers of different prefix lengths, takes one length for all")
    rows = []
    for key, value in zip(kv.keys, kv.values, strict=True):
        rows += [key.transpose(0, 1).reshape(P, -1), value.transpose(0, 1).reshape(P, -1)]
    return torch.cat(rows, dim=1)
