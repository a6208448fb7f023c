"""What the calls of one forward of a model share: checks of values, and tables on the device.

Also where the real tokens of its padding mask lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.attention.backends import triton
from fastprefix.options import Options

# The integers that layers share. key_lengths belong to the cache of one layer.
SHARED = ("prefix_index", "prefix_lengths", "cu_seqlens")


class Step:
    """One forward of a model, whose layers hand the same integers to the operator.

    The first layer has their values checked and the tables of the batch made, the others share
    them, and so does the backward. Tensors are known by identity and version, and kept as long as
    the step lives. It should end with the forward, or with the backward that runs layers again:
    nothing of a batch may be left over for the next one.
    """

    def __init__(self) -> None:
        """A step of which nothing is known yet."""
        self._kept: dict[int, Tensor] = {}  # or an id could be that of another tensor
        self._checked: set[Any] = set()
        self._made: dict[Any, Tensor] = {}

    def is_new(self, options: Options, *sizes: int) -> bool:
        """Whether the values of these integers were not asked about before, for the same sizes."""
        key = (*[self._key(getattr(options, name)) for name in SHARED], *sizes)
        new = key not in self._checked
        self._checked.add(key)
        return new

    def as_int32(self, tensor: Tensor) -> Tensor:
        """The integers as int32, converted once."""
        if tensor.dtype is torch.int32:
            return tensor
        return self._once((self._key(tensor), torch.int32), lambda: tensor.to(torch.int32))

    def on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of integers on a device, moved once."""
        if tensor.device == device:
            return tensor
        return self._once((self._key(tensor), device), lambda: tensor.to(device))

    def with_tables(self, tensors: tuple[Tensor, ...], options: Options) -> Options:
        """The options of a call of the triton backend, with the tables of the batch.

        Args:
            tensors: query, key, value, prefix_key and prefix_value.
            options: as the backend reads them.
        """
        if options.prefix_lengths is None and options.cu_seqlens is None:
            return options
        query = tensors[0]
        kind = (
            query.device,
            query.dtype,
            *[x.shape for x in tensors],
            *[
                x if not isinstance(x, Tensor)
                else self._key(x) if name in SHARED
                else ("a tensor", x.dim())
                for name, x in zip(Options._fields, options, strict=True)
            ],
        )  # fmt: skip
        return options._replace(tables=self._once(kind, lambda: triton.tables(tensors, options)))

    def with_spans(self, options: Options) -> Options:
        """The options of a call of the triton backend, with where its mask has real tokens."""
        mask = options.key_padding_mask
        if mask is None:
            return options
        return options._replace(
            spans=self._once(self._key_of_view(mask), lambda: triton.spans(mask))
        )

    def with_known_spans(self, options: Options) -> Options | None:
        """The same if a call with this mask came before, else None. Nothing is checked."""
        mask = options.key_padding_mask
        if mask is None:
            return options
        if type(mask) is not Tensor:
            return None
        spans = self._made.get(self._key_of_view(mask))
        return None if spans is None else options._replace(spans=spans)

    def _once(self, key: Any, make: Any) -> Tensor:
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    def _key_of_view(self, tensor: Tensor) -> Any:
        """The same for the memory of a tensor: layers may make their own views of one mask."""
        self._kept[id(tensor)] = tensor
        version = 0 if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device, version

    def _key(self, tensor: Tensor | None) -> tuple[int, int] | None:
        """What a tensor and its present values are known by."""
        if tensor is None:
            return None
        self._kept[id(tensor)] = tensor
        return id(tensor), 0 if tensor.is_inference() else tensor._version
