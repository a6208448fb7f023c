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
from .target import Splitting, Target, Tile

MAX_QUERY_LENGTH = 64
# Splits have at least this many keys, or half or a quarter of them where that is faster.
LONGEST_SHORTEST = 256
# Keys per split with batch_invariant. Long prefixes have longer splits: no more than
# FIXED_PREFIX_SPLITS, so that the partial results of a packed batch stay small.
FIXED_SPLIT = 512
FIXED_PREFIX_SPLITS = 16


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

    A window that hides nothing yet stays one. So a text that grows past its window runs the same
    kernels as before.
    """
    B, Hq, Lq, D = query.shape
    Lk = key.shape[2]
    if sliding_window is not None:
        sliding_window = min(sliding_window, max(Lk, Lq))
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
        shortest: the fewest keys per split; with batch_invariant the keys of a sequence's split.
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


def splitting_of(shape: DecodeShape, target: Target) -> Splitting:
    """What was tuned on the device for these heads, or the default."""
    name, _ = tilings.row("decode", target.family, max(shape.D, shape.Dv), shape.dtype)
    return target.splittings.get(name, Splitting())


def split_lengths(shape: DecodeShape, target: Target) -> list[int]:
    """The fewest keys that a split may have: one of these, the longest first.

    In the interpreter they are an eighth, as its problems are small.
    """
    part = 8 if target.family == "interpreter" else 1
    if shape.batch_invariant:
        return [FIXED_SPLIT // part]
    shortest = splitting_of(shape, target).shortest
    lengths = [LONGEST_SHORTEST]
    while lengths[-1] > shortest:
        lengths.append(lengths[-1] // 2)
    return [length // part for length in lengths]


def _tile(shape: DecodeShape, target: Target) -> Tile:
    """The tile of a step. Its rows are chosen for the average number of rows of a prefix."""
    prefixes = 1 if shape.N is None else max(1, min(shape.N, shape.B))
    rows = cdiv(shape.B * (shape.Hq // shape.Hkv) * shape.Lq, prefixes)
    return tilings.choose_tile("decode", _work(shape, target), rows)


def _work(shape: DecodeShape, target: Target) -> tilings.Work:
    """What the choice of a tile depends on."""
    head_size = max(shape.D, shape.Dv)
    return tilings.Work(target, head_size, shape.dtype, full_tile=shape.batch_invariant)


def round_up(length: int, step: int) -> int:
    """The next multiple of step."""
    return cdiv(length, step) * step


def cut_prefixes(shape: DecodeShape, tile: Tile, wanted: int, shortest: int) -> PrefixCut:
    """The units of a KV head: its tiles of rows, split along P until there are `wanted` units.

    No split has fewer keys than `shortest`, unless the prefix has.
    """
    packed = shape.Hq // shape.Hkv * shape.Lq
    units = splits = split = free = 0
    if shape.P and shape.N is None:
        tiles = cdiv(shape.B * packed, tile.rows)
        if shape.batch_invariant:
            split = max(shortest, round_up(cdiv(shape.P, FIXED_PREFIX_SPLITS), tile.keys))
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
            units = tiles * min(FIXED_PREFIX_SPLITS, cdiv(shape.P, shortest))
        else:
            free = wanted
            units = min(tiles + free, tiles * cdiv(shape.P, shortest))
    return PrefixCut(shape.P, packed, tile.rows, tile.keys, units, splits, split, shortest, free)


@functools.lru_cache(maxsize=1024)
def grid_of(shape: DecodeShape, target: Target) -> DecodeGrid:
    """Tiles and splits of a shape on a target.

    Each phase is split until it has `Splitting.waves` programs per multiprocessor, or until a split
    has only the fewest keys: the one of `split_lengths` with which the busiest multiprocessor moves
    the fewest bytes. With batch_invariant the lengths of splits are constants instead.
    """
    grids = [_grid(shape, target, length) for length in split_lengths(shape, target)]
    return min(grids, key=lambda grid: bytes_of_a_step(shape, target, grid))


def _grid(shape: DecodeShape, target: Target, shortest: int) -> DecodeGrid:
    """The grid whose splits have at least `shortest` keys."""
    tile = _tile(shape, target)
    wanted = cdiv(splitting_of(shape, target).waves * target.multiprocessors, shape.Hkv)
    cut = cut_prefixes(shape, tile, wanted, shortest)

    first_key = 0
    if shape.sliding_window is not None:
        first_key = max(0, shape.Lk - shape.Lq - shape.sliding_window + 1)
    rows = min(tile.rows, max(16, next_power_of_2(cut.packed)))
    wanted //= max(1, shape.B * cdiv(cut.packed, rows))
    splits, length = _cut_sequences(shape, cut, shape.Lk - first_key, wanted)
    value_block = tilings.block_size(shape.Dv)
    merge_tile = _merge_tile(shape, target, cut.packed)
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
        merge_programs=sequences * cdiv(cut.packed, merge_tile.rows),
    )


def _cut_sequences(shape: DecodeShape, cut: PrefixCut, seen: int, wanted: int) -> tuple[int, int]:
    """How many splits a sequence has, and the keys of each; `seen` is how many keys are read."""
    length = cut.shortest
    if shape.batch_invariant:
        splits = cdiv(shape.Lk, length)
        if shape.sliding_window is not None:
            # Splits start at the row's first real token, so a window may begin inside a split.
            splits = min(splits, cdiv(seen, length) + 1)
        return splits, length
    splits = max(1, min(wanted, cdiv(seen, length)))
    length = max(length, round_up(cdiv(seen, splits), cut.keys))
    return cdiv(seen, length), length


def _merge_tile(shape: DecodeShape, target: Target, packed: int) -> Tile:
    """The tile of the merge: fewer rows where its programs would not fill the device."""
    rows = min(16, max(1, next_power_of_2(packed)))
    sequences = shape.B * shape.Hkv
    while (
        not shape.batch_invariant
        and rows > 1
        and sequences * cdiv(packed, rows) < target.multiprocessors
    ):
        rows //= 2
    # A warp for four rows of 128 values: enough threads for 16-byte loads, and enough programs.
    return Tile(rows, 1, max(1, min(4, rows * tilings.block_size(shape.Dv) // 512)), 1)


def partial_bytes(grid: DecodeGrid, value_head_size: int) -> int:
    """Size of the partial results: one fp32 row of Dv and one lse for each row and split.

    This is Hkv * (units * rows + B * sequence_splits * packed) * (Dv + 1) * 4 bytes. Both phases
    split only until the device is full, however short splits may be. So whatever P is, a KV head
    has at most one prefix partial for each row of a tile, and `Splitting.waves` tiles of partials
    per multiprocessor. With batch_invariant a row has up to `FIXED_PREFIX_SPLITS` prefix partials,
    and one for every `FIXED_SPLIT` sequence keys.
    """
    return grid.partial_rows * (value_head_size + 1) * 4


def bytes_of_a_step(shape: DecodeShape, target: Target, grid: DecodeGrid) -> int:
    """The bytes that the busiest multiprocessor moves in both launches, by a model.

    In the first one, these are its share of everything that is read and of the partial results, but
    at least those of the longest program. In the merge, they are its share of the partial results,
    but at least those of one program.
    """
    cut, packed = grid.prefix, grid.prefix.packed
    key_bytes = (shape.D + shape.Dv) * shape.dtype.itemsize
    row_bytes = (shape.Dv + 1) * 4
    prefix, seen = _mean_prefix(shape), shape.Lk - grid.first_key
    used = 1 if shape.N is None else min(shape.N, shape.B)
    tiles = max(used, cdiv(shape.B * packed, cut.rows))
    # For packed prefixes the device cuts; this is what it does if they are equally long.
    split = cut.split or max(cut.shortest, cdiv(tiles * prefix, max(1, cut.free)))
    prefix_splits = cdiv(prefix, max(1, split))
    row_tiles = cdiv(packed, grid.sequence_rows)

    read = shape.Hkv * (tiles * prefix + shape.B * row_tiles * seen) * key_bytes
    rows = tiles * prefix_splits * cut.rows + shape.B * grid.sequence_splits * packed
    written = shape.Hkv * rows * row_bytes
    longest = max(
        min(prefix, split) * key_bytes + min(prefix, 1) * cut.rows * row_bytes,
        min(seen, grid.sequence_split) * key_bytes + min(grid.sequence_rows, packed) * row_bytes,
    )
    merged = (prefix_splits + grid.sequence_splits) * grid.merge_tile.rows * row_bytes
    share = written // target.multiprocessors
    return max(read // target.multiprocessors + share, longest) + max(share, merged)


def _mean_prefix(shape: DecodeShape) -> int:
    """The length of a prefix, if all are equally long."""
    return shape.P if shape.N is None else cdiv(shape.P, max(1, shape.N))


def two_phase_pays(shape: DecodeShape, target: Target) -> bool:
    """Whether decode should run in two phases, rather than in the one-pass forward kernel.

    The answer comes from a model. Every multiprocessor reads at the same rate, so the time of a
    kernel is the bytes that its busiest multiprocessor moves.

    - One pass has a program for each tile of rows of a sequence (one tile for short queries) and
      KV head. Each of them reads a whole prefix and a whole sequence.
    - Two phases cut this work into splits and spread them over all multiprocessors. The prefix is
      read once per tile of rows. They also write and read partial results (`bytes_of_a_step`), and
      launch one more kernel (`Splitting.launch_bytes`).

    So short prefixes and small batches stay with one pass, because the second launch would cost
    more than reading all their bytes.

    With batch_invariant the answer must not depend on the batch, so it is always two phases.
    """
    if shape.batch_invariant:
        return True
    if not shape.B or not shape.Lq:
        return False
    grid = grid_of(shape, target)
    key_bytes = (shape.D + shape.Dv) * shape.dtype.itemsize
    tile = tilings.choose_tile("forward", _work(shape, target), grid.prefix.packed)
    programs = shape.B * shape.Hkv * cdiv(grid.prefix.packed, tile.rows)
    waves = cdiv(programs, target.multiprocessors)
    one_pass = waves * (_mean_prefix(shape) + shape.Lk - grid.first_key) * key_bytes
    launch = splitting_of(shape, target).launch_bytes
    return bytes_of_a_step(shape, target, grid) + launch < one_pass
