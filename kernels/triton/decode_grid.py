"""The grid of a decode step: tiles, splits and numbers of programs, and when two phases pay.

Everything here is an integer on the host and follows from shapes alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import tilings
from .integers import cdiv, next_power_of_2
from .target import Target, Tile

MAX_QUERY_LENGTH = 16
# How many programs per multiprocessor each phase should have, as in `tilings.splits`.
WAVES = 2
# The fewest keys of a split. A split of 256 keys reads 256 * (D + Dv) * 2 bytes and writes
# 4 * Dv + 4 bytes per row. With fewer keys, the merge of 64 rows would move more than a quarter of
# the bytes that the tiles read.
MIN_SPLIT = 256
# Keys per split with batch_invariant. Long prefixes have longer splits: no more than
# FIXED_PREFIX_SPLITS, so that the partial results of a packed batch stay small.
FIXED_SPLIT = 512
FIXED_PREFIX_SPLITS = 16
# The cost of one more launch, in bytes that a multiprocessor could read meanwhile: a launch takes
# about 3 us, and on an A100 or H100 one multiprocessor's share of the memory bandwidth is about 20
# bytes per nanosecond.
LAUNCH_BYTES = 64 * 1024


class DecodeShape(NamedTuple):
    """Everything on the host that a plan depends on. N is None for one prefix shared by all."""

    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    P: int
    N: int | None
    D: int
    Dv: int
    dtype: torch.dtype
    sliding_window: int | None
    batch_invariant: bool


def shape_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_lengths: Tensor | None,
    sliding_window: int | None,
    batch_invariant: bool,
) -> DecodeShape:
    """The shape that a plan for these operands is made for.

    A window that hides nothing is dropped. With batch_invariant it stays: the instructions for one
    row must not depend on whether other rows are longer than the window.
    """
    B, Hq, Lq, D = query.shape
    Lk = key.shape[2]
    if sliding_window is not None and sliding_window >= max(Lk, Lq):
        sliding_window = max(Lk, Lq) if batch_invariant else None
    return DecodeShape(
        B, Hq, key.shape[1], Lq, Lk, prefix_key.shape[1],
        None if prefix_lengths is None else prefix_lengths.shape[0],
        D, value.shape[3], query.dtype, sliding_window, batch_invariant,
    )  # fmt: skip


class PrefixCut(NamedTuple):
    """How prefixes are cut into units. A unit is the work of one prefix program of a KV head.

    Attributes:
        P: length of all packed prefixes together.
        packed: rows that a sequence contributes to a KV head, Hq / Hkv * Lq.
        rows: rows of a tile.
        keys: keys of a tile. The length of a split is a multiple of it.
        units: how many units there are; for packed prefixes an upper bound.
        splits: splits of a shared prefix. 0 for packed ones, whose table has the numbers.
        split: keys per split of a shared prefix; 0 for packed ones.
        shortest: the fewest keys per split of packed prefixes.
        free: how many units more than tiles of rows there may be; 0 if split lengths are fixed.
    """

    P: int
    packed: int
    rows: int
    keys: int
    units: int
    splits: int
    split: int
    shortest: int
    free: int


@dataclass(frozen=True)
class DecodeGrid:
    """Grids and tiles of both launches.

    Attributes:
        tile: keys, warps and stages of both phases, and rows of a prefix tile.
        block: the power of two that holds a head of queries and keys.
        value_block: the power of two that holds a head of values.
        prefix: how prefixes are cut; `units` is 0 if there are none.
        sequence_rows: rows of a sequence tile.
        first_key: the first sequence key that any row's window may contain.
        sequence_splits: splits of a sequence.
        sequence_split: keys per split of a sequence.
        programs: programs of the first launch, for both phases together.
        partial_rows: rows of the partial results of both phases together.
        merge_tile: rows and warps of the second launch.
        merge_programs: programs of the second launch.
    """

    tile: Tile
    block: int
    value_block: int
    prefix: PrefixCut
    sequence_rows: int
    first_key: int
    sequence_splits: int
    sequence_split: int
    programs: int
    partial_rows: int
    merge_tile: Tile
    merge_programs: int


def split_lengths(target: Target) -> tuple[int, int]:
    """MIN_SPLIT and FIXED_SPLIT. In the interpreter they are shorter: tests have small problems."""
    return (32, 64) if target.family == "interpreter" else (MIN_SPLIT, FIXED_SPLIT)


def _tile(shape: DecodeShape, target: Target) -> Tile:
    """The tile of a step. Its rows are chosen for the average number of rows of a prefix."""
    prefixes = 1 if shape.N is None else max(1, min(shape.N, shape.B))
    rows = cdiv(shape.B * (shape.Hq // shape.Hkv) * shape.Lq, prefixes)
    head_size = max(shape.D, shape.Dv)
    work = tilings.Work(target, head_size, shape.dtype, full_tile=shape.batch_invariant)
    return tilings.choose_tile("decode", work, rows)


def round_up(length: int, step: int) -> int:
    """The next multiple of step."""
    return cdiv(length, step) * step


def cut_prefixes(shape: DecodeShape, target: Target, tile: Tile, wanted: int) -> PrefixCut:
    """The units of a KV head: its tiles of rows, split along P until there are `wanted` units."""
    packed = shape.Hq // shape.Hkv * shape.Lq
    shortest, fixed = split_lengths(target)
    units = splits = split = free = 0
    if shape.P and shape.N is None:
        tiles = cdiv(shape.B * packed, tile.rows)
        if shape.batch_invariant:
            split = max(fixed, round_up(cdiv(shape.P, FIXED_PREFIX_SPLITS), tile.keys))
        else:
            splits = max(1, min(wanted // max(1, tiles), cdiv(shape.P, shortest)))
            split = round_up(cdiv(shape.P, splits), tile.keys)
        splits = cdiv(shape.P, split)
        units = tiles * splits
    elif shape.P and shape.N:
        # Each prefix in use has at most one tile that its rows do not fill.
        used = min(shape.N, shape.B)
        tiles = (shape.B * packed + used * (tile.rows - 1)) // tile.rows
        if shape.batch_invariant:
            shortest = fixed
            units = tiles * min(FIXED_PREFIX_SPLITS, cdiv(shape.P, fixed))
        else:
            free = wanted
            units = min(tiles + free, tiles * cdiv(shape.P, shortest))
    return PrefixCut(shape.P, packed, tile.rows, tile.keys, units, splits, split, shortest, free)


@functools.lru_cache(maxsize=1024)
def grid_of(shape: DecodeShape, target: Target) -> DecodeGrid:
    """Tiles and splits of a shape on a target.

    Each phase is split until it has `WAVES` programs per multiprocessor, or until a split has only
    `MIN_SPLIT` keys. With batch_invariant the lengths of splits are constants instead.
    """
    tile = _tile(shape, target)
    wanted = cdiv(WAVES * target.multiprocessors, shape.Hkv)
    cut = cut_prefixes(shape, target, tile, wanted)

    shortest, fixed = split_lengths(target)
    first_key = 0
    if shape.sliding_window is not None:
        first_key = max(0, shape.Lk - shape.Lq - shape.sliding_window + 1)
    seen = shape.Lk - first_key
    rows = min(tile.rows, max(16, next_power_of_2(cut.packed)))
    if shape.batch_invariant:
        length = fixed
        splits = cdiv(shape.Lk, length)
        if shape.sliding_window is not None:
            # Splits start at the row's first real token, so a window may begin inside a split.
            splits = min(splits, cdiv(seen, length) + 1)
    else:
        programs = shape.B * cdiv(cut.packed, rows)
        splits = max(1, min(wanted // max(1, programs), cdiv(seen, shortest)))
        length = max(shortest, round_up(cdiv(seen, splits), tile.keys))
        splits = cdiv(seen, length)
    value_block = tilings.block_size(shape.Dv)
    merged = min(16, max(1, next_power_of_2(cut.packed)))
    # A warp for four rows of 128 values: enough threads for 16-byte loads, and enough programs.
    merge_tile = Tile(merged, 1, max(1, min(4, merged * value_block // 512)), 1)
    sequences = shape.B * shape.Hkv
    return DecodeGrid(
        tile=tile,
        block=tilings.block_size(shape.D),
        value_block=value_block,
        prefix=cut,
        sequence_rows=rows,
        first_key=first_key,
        sequence_splits=splits,
        sequence_split=length,
        programs=shape.Hkv * cut.units + sequences * cdiv(cut.packed, rows) * splits,
        partial_rows=shape.Hkv * cut.units * cut.rows + sequences * splits * cut.packed,
        merge_tile=merge_tile,
        merge_programs=sequences * cdiv(cut.packed, merged),
    )


def partial_bytes(grid: DecodeGrid, value_head_size: int) -> int:
    """Size of the partial results: one fp32 row of Dv and one lse for each row and split.

    This is Hkv * (units * rows + B * sequence_splits * packed) * (Dv + 1) * 4 bytes. Both phases
    split only until the device is full. So whatever P is, a KV head has at most one prefix partial
    for each row of a tile, and `WAVES` tiles of partials per multiprocessor. With batch_invariant a
    row has up to `FIXED_PREFIX_SPLITS` prefix partials, and one for every `FIXED_SPLIT` sequence
    keys.
    """
    return grid.partial_rows * (value_head_size + 1) * 4


def two_phase_pays(shape: DecodeShape, target: Target) -> bool:
    """Whether decode should run in two phases, rather than in the one-pass forward kernel.

    The answer comes from a model. Every multiprocessor reads at the same rate, so the time of a
    kernel is the bytes that its busiest multiprocessor reads.

    - One pass has B * Hkv programs (for short queries). Each of them reads a whole prefix and a
      whole sequence.
    - Two phases cut this work into splits and spread them over all multiprocessors. The prefix is
      read once per tile of rows. They also write and read partial results, and launch one more
      kernel (`LAUNCH_BYTES`).

    So short prefixes and small batches stay with one pass, because the second launch would cost
    more than reading all their bytes.

    With batch_invariant the answer must not depend on the batch, so it is always two phases.
    """
    if shape.batch_invariant:
        return True
    if not shape.B or not shape.Lq:
        return False
    grid = grid_of(shape, target)
    cut = grid.prefix
    key_bytes = (shape.D + shape.Dv) * shape.dtype.itemsize
    prefix = shape.P if shape.N is None else cdiv(shape.P, max(1, shape.N))
    seen = shape.Lk - grid.first_key
    tiles = cdiv(shape.B * cut.packed, cut.rows)
    waves = cdiv(shape.B * shape.Hkv, target.multiprocessors)
    one_pass = waves * (prefix + seen) * key_bytes
    spread = shape.Hkv * (tiles * prefix + shape.B * seen) * key_bytes
    spread += 2 * partial_bytes(grid, shape.Dv)
    longest = max(min(prefix, cut.split or cut.shortest), min(seen, grid.sequence_split))
    busiest = max(spread // target.multiprocessors, longest * key_bytes)
    return busiest + LAUNCH_BYTES < one_pass
