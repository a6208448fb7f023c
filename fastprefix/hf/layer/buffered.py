"""Causal masks over buffers of keys, in a few bytes for each row in place of [B, 1, Lq, Lk].

A static cache hands its whole buffer to each layer, with the keys in use in front. A standard
causal mask then says three things: how many keys are in use, which of them are padding, and whether
the layer's sliding window applies. :func:`pack` writes them into one tensor, and :func:`unpack`
reads them in the layer. Models pass this tensor on as they pass any mask of four dimensions, and
``generate()`` may make it before the model runs. No step waits for the device.

The tensor is [B, 1, 1, n], int32, or int64 if the window applies. As int32 it holds for each row: a
number that tells it from a user's mask, the number of keys in use, and the padding mask in bytes,
or nothing without padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_HEAD = 2
_SIGN = int.from_bytes(b"fpfx", "little")
# The padding ends with a whole number of int64.
_BYTES = 8


class Buffered(NamedTuple):
    """What a packed mask says.

    Attributes:
        key_lengths: int32 [B], the keys in use. Causality aligns queries to the last of them.
        key_padding_mask: bool [B, Lk], True = real token; None without padding.
        windowed: whether the layer's sliding window hides keys as well.
    """

    key_lengths: Tensor
    key_padding_mask: Tensor | None
    windowed: bool

    def dense(self, query: Tensor, Lk: int, window: int | None) -> Tensor:
        """The same as a bool mask [B, 1, Lq, Lk], for a query [B, Hq, Lq, D]."""
        Lq, device = query.shape[2], query.device
        newest = torch.arange(Lq, device=device) + (self.key_lengths[:, None] - Lq)
        ahead = torch.arange(Lk, device=device) - newest[..., None]  # [B, Lq, Lk]
        seen = ahead <= 0
        if self.windowed and window is not None:
            seen = seen & (ahead > -window)
        if self.key_padding_mask is not None:
            seen = seen & self.key_padding_mask[:, None]
        return seen[:, None]


def pack(key_lengths: Tensor, key_padding_mask: Tensor | None, windowed: bool) -> Tensor:
    """The mask tensor of :class:`Buffered`'s fields."""
    lengths = key_lengths.to(torch.int32)
    words = torch.stack([torch.full_like(lengths, _SIGN), lengths], 1)
    if key_padding_mask is not None:
        padding = F.pad(key_padding_mask, (0, -key_padding_mask.shape[1] % _BYTES))
        words = torch.cat([words, padding.view(torch.int32)], 1)
    packed = words.contiguous()[:, None, None]
    return packed.view(torch.int64) if windowed else packed


def is_packed(mask: Tensor | None) -> bool:
    """Whether a mask is one that :func:`pack` made.

    The sign is read where that waits for nothing: on the CPU, outside the compiler.
    """
    if mask is None or mask.dim() != 4 or mask.dtype not in (torch.int32, torch.int64):
        return False
    if mask.shape[1:3] != (1, 1) or mask.shape[3] * mask.element_size() < _HEAD * 4:
        return False
    if torch.compiler.is_compiling() or mask.device.type != "cpu" or mask.shape[0] == 0:
        return True
    return mask.stride(-1) == 1 and int(mask[0, 0, 0].view(torch.int32)[0]) == _SIGN


def unpack(mask: Tensor, Lk: int) -> Buffered:
    """What a packed mask says to a layer with Lk keys.

    Raises:
        ValueError: the mask is for another number of keys.
    """
    words = mask[:, 0, 0].view(torch.int32)
    padding = None
    if words.shape[1] > _HEAD:
        columns = words.shape[1] - _HEAD
        if columns != -(-Lk // _BYTES) * _BYTES // 4:
            raise ValueError(f"attention mask: got {4 * columns} columns for a layer of {Lk} keys")
        padding = words[:, _HEAD:].view(torch.bool)[:, :Lk]
    return Buffered(words[:, 1], padding, mask.dtype is torch.int64)
