"""Small tables that tell the programs of a ragged problem where they work.

They are made on the device from tensors on the device, and the host knows their sizes. So the host
never waits for the device. Rows that a table has in excess hold -1; their programs stop at once.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def boundaries(lengths: Tensor) -> Tensor:
    """[N] lengths -> [N + 1] int32: where each begins, and where the last ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def query_ranks(key_padding_mask: Tensor, key_lengths: Tensor | None, Lq: int) -> Tensor:
    """[B, Lq] int32: how many real tokens come before each query.

    The queries are the last Lq tokens, or of a buffer the last ones in use.

    Args:
        key_padding_mask: [B, Lk], True for real tokens.
        key_lengths: [B], how many of the Lk tokens are in use; None for all.
        Lq: how many queries.
    """
    real = key_padding_mask.to(torch.int32)
    if key_lengths is not None:
        Lk = real.shape[1]
        position = torch.arange(Lq, device=real.device) + key_lengths.clamp(0, Lk)[:, None] - Lq
        before = torch.nn.functional.pad(real.cumsum(1), (1, 0))  # [B, Lk + 1]
        return before.gather(1, position.clamp(min=0).long()).to(torch.int32)
    before = torch.nn.functional.pad(real.cumsum(1) - real, (max(Lq - real.shape[1], 0), 0))
    return before[:, before.shape[1] - Lq :].to(torch.int32).contiguous()


def expand(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The run that each item is in, and its place there: two tensors [total].

    Items past the sum of the counts are in run -1.

    Args:
        counts: [N], the lengths of the runs, which follow each other.
        total: how many items there are.
    """
    ends = counts.cumsum(0)
    item = torch.arange(total, device=counts.device)
    run = torch.searchsorted(ends, item, right=True)
    inside = run < counts.shape[0]
    safe = run.clamp(max=counts.shape[0] - 1)
    place = item - (ends - counts)[safe]
    return torch.where(inside, run, -1), place


def tiles(boundaries: Tensor, length: int, rows: int, group: int = 1) -> Tensor:
    """Tiles of runs packed along an axis: [tiles, 2] int32 (run, tile inside it; -1: none).

    Args:
        boundaries: [N + 1], where the runs begin, and where the last one ends.
        length: length of the axis. It bounds the number of tiles without asking the device.
        rows: rows per tile.
        group: how many times the rows of a run count, for heads that are packed into rows.
    """
    runs = boundaries.shape[0] - 1
    counts = (boundaries.diff() * group + rows - 1) // rows
    run, tile = expand(counts, triton.cdiv(length * group, rows) + runs)
    return torch.stack([run, tile], 1).to(torch.int32)
