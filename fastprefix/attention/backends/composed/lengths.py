"""Calls with key_lengths: the keys in use, as views of the longer buffer.

The flash kernel must not see the rest of the buffer: it multiplies hidden values by weights of 0,
and 0 times NaN is NaN. So the part behind every row's keys is cut off here. If rows differ in their
lengths, :func:`fastprefix.attention.backends.composed.parts.pieces` makes one call for each run of
rows of equal length. Where the host does not read the lengths, copies get zeros in place of the
rest, and a mask hides it.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.kernels import kernels_of
from fastprefix.options import Options


def without_unused(
    query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor, Options]:
    """The keys, values and options of a call, without the columns that no row uses.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        options: of the call, with or without key_lengths.

    Returns:
        Views of both, and options without key_lengths if all rows use the same number of keys, Lq
        at least. Where the host does not read values, copies of both and the same options.
    """
    if options.key_lengths is None:
        return key, value, options
    limited = options.key_lengths.clamp(0, key.shape[2])
    options = options._replace(key_lengths=limited)
    if not kernels_of(query).host_reads:
        column = torch.arange(key.shape[2], device=key.device)
        unused = (column >= limited[:, None])[:, None, :, None]
        return key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0), options
    lengths: list[int] = limited.tolist()
    most, mask, padding = max(lengths, default=0), options.attn_mask, options.key_padding_mask
    if mask is not None and mask.dim() > 0 and mask.shape[-1] > 1:
        mask = mask[..., :most]
    equal = min(lengths, default=0) == most >= query.shape[2]
    options = options._replace(
        key_lengths=None if equal else limited,
        key_padding_mask=None if padding is None else padding[:, :most],
        attn_mask=mask,
    )
    return key[:, :, :most], value[:, :, :most], options


def with_unused(grad: Tensor | None, whole: Tensor) -> Tensor | None:
    """The gradient of a whole buffer from that of its keys in use; zeros for the rest."""
    if grad is None or grad.shape[2] == whole.shape[2]:
        return grad
    padded = whole.new_zeros(whole.shape)
    padded[:, :, : grad.shape[2]] = grad
    return padded


def runs(key_lengths: Tensor) -> list[tuple[slice, int]]:
    """Rows that follow each other and use the same number of keys, and that number."""
    found, start = [], 0
    for length, rows in groupby(key_lengths.tolist()):
        end = start + len(list(rows))
        found.append((slice(start, end), length))
        start = end
    return found
