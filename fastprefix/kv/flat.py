"""A prefix as one matrix [P, width]: what encoders compute and PEFT's files hold.

A row is one virtual token; along it lie, layer after layer, the key of each head, then the value
of each head. Where all layers have one shape this is PEFT's [P, layers · 2 · Hkv · D]. Layers
without a prefix have no columns; a layer whose prefix is shorter leaves its last rows unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprefix.arguments import methods_refuse_unknown_arguments, refuses_unknown_arguments
from fastprefix.kv.prefix import PrefixKV
from fastprefix.kv.shapes import LayerShape


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class FlatLayout:
    """Where the numbers of a prefix lie in its flat matrix.

    Attributes:
        shapes: key and value shapes of a model's attention layers.
        lengths: how many virtual tokens each has; 0 for a layer without a prefix.

    Raises:
        ValueError: the numbers of shapes and lengths differ, a length is negative, or none is
            positive.
    """

    shapes: tuple[LayerShape, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.shapes):
            raise ValueError(
                f"lengths: got {len(self.lengths)} of them, takes one for each of the "
                f"{len(self.shapes)} attention layers"
            )
        if min(self.lengths) < 0 or max(self.lengths) < 1:
            raise ValueError(
                f"lengths: got {list(self.lengths)}, takes 0 or more each, and 1 or more at least "
                "once"
            )

    @classmethod
    def make(cls, shapes: Sequence[LayerShape], lengths: int | Sequence[int]) -> FlatLayout:
        """One length for all layers, or one for each."""
        if isinstance(lengths, int):
            lengths = (lengths,) * len(shapes)
        return cls(tuple(shapes), tuple(lengths))

    @property
    def num_virtual_tokens(self) -> int:
        """P, the longest of the lengths."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all layers that have a prefix have one of the same length."""
        return all(length in (0, self.num_virtual_tokens) for length in self.lengths)

    @property
    def slots(self) -> tuple[int, ...]:
        """Indices of the layers that have a prefix."""
        return tuple(slot for slot, length in enumerate(self.lengths) if length)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each layer that has a prefix."""
        return tuple(self.shapes[slot].width for slot in self.slots)

    @property
    def width(self) -> int:
        """Columns of the flat matrix."""
        return sum(self.widths)

    @property
    def num_numbers(self) -> int:
        """Numbers of the prefix in all layers."""
        pairs = zip(self.shapes, self.lengths, strict=True)
        return sum(shape.width * length for shape, length in pairs)

    def longer(self, num_tokens: int) -> FlatLayout:
        """With so many more tokens (fewer if negative) wherever there is a prefix."""
        lengths = tuple(length + num_tokens if length else 0 for length in self.lengths)
        return FlatLayout(self.shapes, lengths)

    def used(self) -> Tensor:
        """[P, width] bool: True where the flat matrix holds a number of the prefix."""
        row = torch.arange(self.num_virtual_tokens)[:, None]
        ends = torch.tensor([self.lengths[slot] for slot in self.slots])
        return row < ends.repeat_interleave(torch.tensor(self.widths))

    def check(self, flat: Tensor) -> None:
        """Raises ValueError unless flat is [P, width]."""
        expected = (self.num_virtual_tokens, self.width)
        if tuple(flat.shape) != expected:
            raise ValueError(
                f"flat: got shape {list(flat.shape)}, takes [P, {expected[1]}] with "
                f"P = {expected[0]} for these layers"
            )

    def to_prefix_kv(self, flat: Tensor, position_offset: int | None = None) -> PrefixKV:
        """Views of [P, width] as keys and values; differentiable. position_offset: P if None."""
        self.check(flat)
        columns = dict(zip(self.slots, flat.split(self.widths, dim=1), strict=True))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for slot, (shape, length) in enumerate(zip(self.shapes, self.lengths, strict=True)):
            rows = columns[slot][:length] if length else flat.new_empty(0, shape.width)
            sizes = (shape.num_heads * shape.key_size, shape.num_heads * shape.value_size)
            for part, tensors in zip(rows.split(sizes, dim=1), (keys, values), strict=True):
                tensors.append(part.unflatten(1, (shape.num_heads, -1)).transpose(0, 1))
        if position_offset is None:
            position_offset = self.num_virtual_tokens
        return PrefixKV(tuple(keys), tuple(values), position_offset)

    def to_flat(self, kv: PrefixKV) -> Tensor:
        """The inverse of :meth:`to_prefix_kv`: [P, width], zeros where a layer is shorter.

        Of the keys and values alone: a bias or a gate of each head has no place in it.

        Raises:
            ValueError: kv has other layers or lengths.
        """
        got = FlatLayout(kv.shapes, tuple(key.shape[1] for key in kv.keys))
        if got != self:
            raise ValueError(
                f"kv: got layers of {list(got.lengths)} tokens and shapes {list(set(got.shapes))}, "
                f"takes {list(self.lengths)} and {list(set(self.shapes))}"
            )
        columns = []
        for slot in self.slots:
            rows = torch.cat([tensor.transpose(0, 1).flatten(1) for tensor in kv.layer(slot)], 1)
            missing = self.num_virtual_tokens - rows.shape[0]
            columns.append(torch.nn.functional.pad(rows, (0, 0, 0, missing)))
        return torch.cat(columns, dim=1)


@refuses_unknown_arguments
def flat_width(shapes: Sequence[LayerShape]) -> int:
    """Numbers that one virtual token holds in all layers."""
    return sum(shape.width for shape in shapes)


@refuses_unknown_arguments
def to_prefix_kv(
    flat: Tensor, shapes: Sequence[LayerShape], position_offset: int | None = None
) -> PrefixKV:
    """Views of [P, width] as keys and values of the same length in all layers; differentiable.

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
    return FlatLayout.make(shapes, flat.shape[0]).to_prefix_kv(flat, position_offset)


@refuses_unknown_arguments
def to_flat(kv: PrefixKV) -> Tensor:
    """The inverse of :func:`to_prefix_kv`: [P, width].

    Raises:
        ValueError: layers have prefixes of different lengths, or none, which one matrix alone
            does not tell.
    """
    P = kv.num_virtual_tokens
    if any(key.shape[1] != P for key in kv.keys):
        raise ValueError("kv: got layers of different prefix lengths, takes one length for all")
    return FlatLayout.make(kv.shapes, P).to_flat(kv)
