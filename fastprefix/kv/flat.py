"""A prefix as one matrix [P, width], which encoders compute and PEFT's files hold.

Each row is one virtual token. It holds, layer after layer, the keys of all heads and then the
values of all heads. If all layers have the same shape, this is PEFT's [P, layers · 2 · Hkv · D].
Layers without a prefix have no columns. A layer with a shorter prefix leaves its last rows unused.
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
        lengths: the number of virtual tokens of each layer; 0 for a layer without a prefix.

    Raises:
        ValueError: there are not as many lengths as shapes, a length is negative, or none is
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
        """Makes a layout of one length for all layers, or of one length for each."""
        if isinstance(lengths, int):
            lengths = (lengths,) * len(shapes)
        return cls(tuple(shapes), tuple(lengths))

    @property
    def num_virtual_tokens(self) -> int:
        """P, the longest length."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all prefixes have the same length; layers without a prefix do not count."""
        return all(length in (0, self.num_virtual_tokens) for length in self.lengths)

    @property
    def slots(self) -> tuple[int, ...]:
        """The indices of the layers that have a prefix."""
        return tuple(slot for slot, length in enumerate(self.lengths) if length)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of columns of each layer that has a prefix."""
        return tuple(self.shapes[slot].width for slot in self.slots)

    @property
    def width(self) -> int:
        """The number of columns of the matrix."""
        return sum(self.widths)

    @property
    def num_numbers(self) -> int:
        """How many numbers the prefix has in all layers together."""
        pairs = zip(self.shapes, self.lengths, strict=True)
        return sum(shape.width * length for shape, length in pairs)

    def longer(self, num_tokens: int) -> FlatLayout:
        """The layout of prefixes that have so many more tokens (fewer if negative)."""
        lengths = tuple(length + num_tokens if length else 0 for length in self.lengths)
        return FlatLayout(self.shapes, lengths)

    def used(self) -> Tensor:
        """Bool [P, width]: whether the matrix has a number of the prefix in a place."""
        row = torch.arange(self.num_virtual_tokens)[:, None]
        ends = torch.tensor([self.lengths[slot] for slot in self.slots])
        return row < ends.repeat_interleave(torch.tensor(self.widths))

    def check(self, flat: Tensor) -> None:
        """Checks the shape of a matrix.

        Raises:
            ValueError: flat is not [P, width].
        """
        expected = (self.num_virtual_tokens, self.width)
        if tuple(flat.shape) != expected:
            raise ValueError(
                f"flat: got shape {list(flat.shape)}, takes [P, {expected[1]}] with "
                f"P = {expected[0]} for these layers"
            )

    def to_prefix_kv(self, flat: Tensor, position_offset: int | None = None) -> PrefixKV:
        """Returns views of a matrix [P, width] as keys and values, with gradients.

        Args:
            flat: [P, width].
            position_offset: see :class:`PrefixKV`; P if None.

        Raises:
            ValueError: flat has another shape.
        """
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
        """The inverse of :meth:`to_prefix_kv`: [P, width], with zeros in unused places.

        The matrix holds keys and values only, not the biases or gates of heads.

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
    """How many numbers one virtual token has in all layers together."""
    return sum(shape.width for shape in shapes)


@refuses_unknown_arguments
def to_prefix_kv(
    flat: Tensor, shapes: Sequence[LayerShape], position_offset: int | None = None
) -> PrefixKV:
    """Returns views of [P, width] as keys and values of length P in all layers, with gradients.

    Args:
        flat: [P, width].
        shapes: the layers' key and value shapes.
        position_offset: see :class:`PrefixKV`; P if None.

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
        ValueError: layers have different lengths, or length 0. The matrix alone would not say so.
    """
    P = kv.num_virtual_tokens
    if any(key.shape[1] != P for key in kv.keys):
        raise ValueError("kv: got layers of different prefix lengths, takes one length for all")
    return FlatLayout.make(kv.shapes, P).to_flat(kv)
