"""The tables of a batch, made by PyTorch's operators: the oracle of the kernel that builds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastprefix.kernels.decode_grid import FIXED_PREFIX_SPLITS, PrefixCut


@dataclass(frozen=True)
class PrefixTables:
    """Where packed prefixes and the rows that use them lie. int32, on the device.

    Packed rows are numbered by (batch row in the order of its prefix, head within the group, query
    position), flattened.

    Attributes:
        order: [B], the batch rows sorted by prefix.
        units: [units, 4], for each unit the first packed row, the end of the prefix's packed rows,
            the first key and the end of the keys. Surplus units have no rows.
        rows: [B, 3], for each batch row its first packed row counted from the first one of its
            prefix, the first unit of its prefix, and the number of splits (0: no prefix).
    """

    order: Tensor
    units: Tensor
    rows: Tensor


def build_tables(prefix_index: Tensor, prefix_lengths: Tensor, cut: PrefixCut) -> PrefixTables:
    """Sort the batch by prefix and cut every prefix into units, on the device.

    Args:
        prefix_index: [B], -1 (or any number outside 0 .. N - 1) for no prefix.
        prefix_lengths: [N]. If they add up to more than P, they are cut there.
        cut: tile sizes and bounds.
    """
    device = prefix_index.device
    index, lengths = prefix_index.long(), prefix_lengths.long().clamp(min=0)
    N = lengths.shape[0]
    index = torch.where(index < N, index, -1).clamp(min=-1)
    key_end = lengths.cumsum(0).clamp(max=cut.P)
    key_first = torch.cat([key_end.new_zeros(1), key_end[:-1]])
    lengths = key_end - key_first

    ordered, order = index.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(N + 1, device=device))
    first, end = bounds[:-1], bounds[1:]
    tiles = ((end - first) * cut.packed + cut.rows - 1) // cut.rows
    if cut.free:
        # Units <= tiles + keys of all tiles / split, so this split makes at most tiles + free.
        split = ceil_to((tiles * lengths).sum().expand(N), cut.free, cut.keys)
    else:
        split = ceil_to(lengths, FIXED_PREFIX_SPLITS, cut.keys)
    split = split.clamp(min=cut.shortest)
    splits = (lengths + split - 1) // split
    unit_end = (tiles * splits).cumsum(0)
    unit_first = unit_end - tiles * splits

    unit = torch.arange(cut.units, device=device)
    n = torch.searchsorted(unit_end, unit, right=True)
    real = n < N
    n = n.clamp(max=N - 1)
    unit = unit - unit_first[n]
    i_tile = unit // splits[n].clamp(min=1)
    key = key_first[n] + (unit - i_tile * splits[n]) * split[n]
    row_end = end[n] * cut.packed
    row = torch.where(real, first[n] * cut.packed + i_tile * cut.rows, row_end)
    units = torch.stack([row, row_end, key, torch.minimum(key + split[n], key_end[n])], 1)

    slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    n = index.clamp(min=0)
    count = torch.where(index >= 0, splits[n], 0)
    rows = torch.stack([(slot - first[n]) * cut.packed, unit_first[n], count], 1)
    return PrefixTables(order.int(), units.int(), rows.int())


def ceil_to(total: Tensor, parts: int, step: int) -> Tensor:
    """The smallest multiple of `step` that, `parts` times, is at least the total."""
    return (total + parts * step - 1) // (parts * step) * step


def boundaries(lengths: Tensor) -> Tensor:
    """[N] lengths -> [N + 1] int32: where each begins, and where the last ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


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


def query_tile_table(
    index: Tensor | None, cu_seqlens: Tensor | None, M: int, N: int, Lq: int, rows: int
) -> tuple[Tensor, Tensor]:
    """The query tiles sorted by prefix: (sequence, tile) [tiles, 2] int32, and bounds [N + 1].

    The tiles of prefix n are bounds[n] .. bounds[n + 1]; rows without a prefix come before all.
    """
    if index is None:
        index = torch.zeros(M, dtype=torch.int32)
    sorted_index, order = index.sort(stable=True)
    if cu_seqlens is None:
        total = M * triton.cdiv(Lq, rows)
        counts = torch.full((M,), triton.cdiv(Lq, rows))
    else:
        total = triton.cdiv(Lq, rows) + M
        counts = ((cu_seqlens.diff() + rows - 1) // rows)[order]
    run, tile = expand(counts, total)
    sequence = torch.where(run < 0, -1, order[run.clamp(min=0)])
    first_row = torch.searchsorted(sorted_index, torch.arange(N + 1).int())
    bounds = boundaries(counts)[first_row]
    return torch.stack([sequence, tile], 1).to(torch.int32), bounds
