"""Small tables that tell the programs of a ragged problem where they work.

All are made on the device from tensors on the device, with sizes that the host knows, so nothing
waits for anything; programs past the end of a table's real rows find -1 there and stop.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def boundaries(lengths: Tensor) -> Tensor:
    """[N] lengths -> [N + 1] int32: where each begins, and where the last ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def query_ranks(key_padding_mask: Tensor, Lq: int) -> Tensor:
    """[B, Lq] int32: how many real tokens come before each query; queries stand at the end."""
    real = key_padding_mask.to(torch.int32)
    before = torch.nn.functional.pad(real.cumsum(1) - real, (max(Lq - real.shape[1], 0), 0))
    return before[:, before.shape[1] - Lq :].to(torch.int32).contiguous()


def expand(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For `total` items in runs of `counts` [N]: the run that each is in, and its place there.

    Both [total]; items past the sum of the counts are in run -1.
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
        boundaries: [N + 1], where the runs begin and the last one ends.
        length: of the axis; bounds the number of tiles without asking the device.
        rows: per tile.
        group: each run counts that many times its length.
    """
    runs = boundaries.shape[0] - 1
    counts = (boundaries.diff() * group + rows - 1) // rows
    run, tile = expand(counts, triton.cdiv(length * group, rows) + runs)
    return torch.stack([run, tile], 1).to(torch.int32)
