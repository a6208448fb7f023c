"""The plan of a decode step: tiles, splits, and the tables that sort the batch by prefix.

A plan has two halves. Host integers (`Layout`) follow from shapes alone. Tables (`PrefixTables`)
follow from the contents of `prefix_index` and `prefix_lengths`: they are computed on the device by
`build_tables`, have a size that the host knows in advance, and are never read back. `TABLES` keeps
them, so that the layers of a step, and the steps between two changes of the batch, share one build.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import tilings
from .target import Target, Tile
from .tilings import Row

MAX_QUERY_LENGTH = 16

# Tiles of the decode kernel: [(largest block of the head sizes, tile for 16-bit types, for fp32)].
# `rows` are those of a prefix tile, at most; the sequence tiles of the same launch have at least 16
# and share keys, warps and stages.
#
# The reasons, all static (registers, spills and shared memory from `offline`):
# - 64 rows: wgmma and tcgen05 take no fewer, and 128 would double the registers of the sequence
#   programs, which belong to the same kernel, read most of the bytes and want neighbours.
# - 64 keys: a tile of K and V is 16 to 32 KiB, enough in flight to hide memory with two programs
#   per multiprocessor; a sequence tile of 16 rows has no more registers to fill.
# - 4 warps, because 16 rows feed one MMA in height: more warps only split the keys finer.
# - fp32 without TF32 runs on FMA units with all operands in registers: small tiles.
# sm_80, 164 KiB: three stages cost no registers (cp.async) and hide more latency than two.
AMPERE: list[Row] = [
    (64, Tile(64, 64, 4, 3), Tile(32, 32, 4, 2)),
    (128, Tile(64, 64, 4, 2), Tile(16, 32, 4, 2)),
    (256, Tile(32, 32, 4, 2), Tile(16, 16, 4, 2)),
]
# sm_86, sm_89, sm_12x, 99 KiB: 32 keys from D 128 on keep two programs on a multiprocessor (37 KiB
# and 167 registers). From sm_90 on, ptxas spills at Ampere's fp32 tile for D 128.
AMPERE_SMALL: list[Row] = [
    (64, Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)),
    (128, Tile(64, 32, 4, 2), Tile(16, 16, 4, 2)),
    (256, Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
]
# sm_90 and sm_100, 227 KiB: room for a third stage at D 128.
HOPPER: list[Row] = [
    (64, Tile(64, 64, 4, 3), AMPERE[0][2]),
    (128, Tile(64, 64, 4, 3), AMPERE_SMALL[1][2]),
    (256, Tile(64, 32, 4, 2), AMPERE[2][2]),
]
BLACKWELL: list[Row] = HOPPER
# gfx9: waves of 64 and 64 KiB of LDS; loads go through registers, so one stage.
CDNA: list[Row] = [
    (64, Tile(64, 64, 4, 1), Tile(32, 32, 4, 1)),
    (128, Tile(64, 32, 4, 1), Tile(16, 32, 4, 1)),
    (256, Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
]
# gfx10 to gfx12: WMMA keeps each operand twice per wave, hence the shortest tiles, and fp32 takes
# one score a thread (at D 256 it spills half a KiB all the same).
RDNA: list[Row] = [
    (64, Tile(32, 32, 4, 1), Tile(16, 16, 8, 1)),
    (128, Tile(32, 16, 4, 1), Tile(16, 16, 8, 1)),
    (256, Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
]
TABLE: dict[str, list[Row]] = {
    "ampere": AMPERE,
    "ampere-small": AMPERE_SMALL,
    "hopper": HOPPER,
    "blackwell": BLACKWELL,
    "cdna": CDNA,
    "rdna": RDNA,
    # Small enough that small problems have whole, partial and several tiles.
    "interpreter": [(256, Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))],
}

# Programs per multiprocessor that each phase aims at: as in `tilings.splits`.
WAVES = 2
# Keys per split, at least. A split of 256 keys reads 256 * (D + Dv) * 2 bytes and leaves
# 4 * Dv + 4 per row: below, the merge of 64 rows would move a quarter of what the tiles read.
MIN_SPLIT = 256
# Keys per split with batch_invariant. Long prefixes have longer splits, so that they have
# FIXED_PREFIX_SPLITS at most and the partials of a packed batch stay small.
FIXED_SPLIT = 512
FIXED_PREFIX_SPLITS = 16
# What one more launch costs, in bytes that a multiprocessor could have read meanwhile: about 3 us
# at the 20 bytes per nanosecond that are one multiprocessor's share of an A100's or H100's memory.
LAUNCH_BYTES = 64 * 1024


class Shape(NamedTuple):
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


class PrefixCut(NamedTuple):
    """How prefixes are cut into units, the prefix programs of one KV head. Host integers.

    Attributes:
        P: length of the packed prefixes.
        packed: rows that a sequence contributes to a KV head, Hq / Hkv * Lq.
        rows: rows of a tile.
        keys: keys of a tile, of which splits are multiples.
        units: exact for a shared prefix, an upper bound for packed ones.
        splits: splits of a shared prefix; 0 if packed (the table says).
        split: keys per split of a shared prefix; 0 if packed.
        shortest: keys per split of packed prefixes, at least.
        free: by how many units splits may exceed tiles; 0 if split lengths are fixed.
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
class Layout:
    """Grids and tiles of both launches, in host integers.

    Attributes:
        tile: keys, warps and stages of both phases; rows of a prefix tile.
        block: the power of two that holds a head of queries and keys.
        value_block: the same for values.
        prefix: how prefixes are cut; `units` is 0 if there are none.
        sequence_rows: rows of a sequence tile.
        first_key: no row's window reaches below this sequence key.
        sequence_splits: splits of a sequence.
        sequence_split: keys per split of a sequence.
        programs: of the first launch, both phases together.
        partial_rows: rows of the partial results of both phases together.
        merge_tile: rows and warps of the second launch.
        merge_programs: of the second launch.
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


@dataclass(frozen=True)
class PrefixTables:
    """Where packed prefixes and the rows that use them lie. int32, on the device.

    Packed rows are (batch row in the order of its prefix, head within the group, query position),
    flattened.

    Attributes:
        order: [B], the batch rows sorted by prefix.
        units: [prefix_units, 4]: first packed row, end of the prefix's packed rows, first key and
            end of the keys. Surplus units have no rows.
        rows: [B, 3]: a batch row's first packed row counted from the first of its prefix, its
            prefix's first unit, its number of splits (0: no prefix).
    """

    order: Tensor
    units: Tensor
    rows: Tensor


@dataclass(frozen=True)
class DecodePlan:
    """A layout, and tables if the prefixes are packed. Serves every layer of equal shape."""

    shape: Shape
    target: Target
    layout: Layout
    tables: PrefixTables | None


def split_lengths(target: Target) -> tuple[int, int]:
    """MIN_SPLIT and FIXED_SPLIT; shorter in the interpreter, so that small problems are split."""
    return (32, 64) if target.family == "interpreter" else (MIN_SPLIT, FIXED_SPLIT)


def choose(shape: Shape, target: Target) -> Tile:
    """The tile for a shape; prefix rows shrink to what the rows of a prefix fill on average.

    Not with batch_invariant: another tile may compile to other instructions.
    """
    block = tilings.block_size(max(shape.D, shape.Dv))
    for largest, half, single in TABLE[target.family]:
        if block <= largest:
            tile = single if shape.dtype == torch.float32 else half
            if shape.batch_invariant:
                return tile
            prefixes = 1 if shape.N is None else max(1, min(shape.N, shape.B))
            rows = triton.cdiv(shape.B * (shape.Hq // shape.Hkv) * shape.Lq, prefixes)
            return tile._replace(rows=min(tile.rows, max(16, triton.next_power_of_2(rows))))
    raise ValueError(f"head size {max(shape.D, shape.Dv)} exceeds {tilings.MAX_HEAD_SIZE}")


def round_up(length: int, step: int) -> int:
    """The next multiple of step."""
    return triton.cdiv(length, step) * step


def cut_prefixes(shape: Shape, target: Target, tile: Tile, wanted: int) -> PrefixCut:
    """Units of a KV head: its tiles of rows, split along P until there are `wanted`."""
    packed = shape.Hq // shape.Hkv * shape.Lq
    shortest, fixed = split_lengths(target)
    units = splits = split = free = 0
    if shape.P and shape.N is None:
        tiles = triton.cdiv(shape.B * packed, tile.rows)
        if shape.batch_invariant:
            split = max(fixed, round_up(triton.cdiv(shape.P, FIXED_PREFIX_SPLITS), tile.keys))
        else:
            splits = max(1, min(wanted // max(1, tiles), triton.cdiv(shape.P, shortest)))
            split = round_up(triton.cdiv(shape.P, splits), tile.keys)
        splits = triton.cdiv(shape.P, split)
        units = tiles * splits
    elif shape.P and shape.N:
        # Every prefix in use adds less than one tile of rows that its rows do not fill.
        used = min(shape.N, shape.B)
        tiles = (shape.B * packed + used * (tile.rows - 1)) // tile.rows
        if shape.batch_invariant:
            shortest = fixed
            units = tiles * min(FIXED_PREFIX_SPLITS, triton.cdiv(shape.P, fixed))
        else:
            free = wanted
            units = min(tiles + free, tiles * triton.cdiv(shape.P, shortest))
    return PrefixCut(shape.P, packed, tile.rows, tile.keys, units, splits, split, shortest, free)


@functools.lru_cache(maxsize=1024)
def layout_of(shape: Shape, target: Target) -> Layout:
    """Tiles and splits of a shape on a target.

    Each phase is cut until it has `WAVES` programs per multiprocessor or its splits reach
    `MIN_SPLIT`. With batch_invariant, split lengths are constants of the device instead.
    """
    tile = choose(shape, target)
    wanted = triton.cdiv(WAVES * target.multiprocessors, shape.Hkv)
    cut = cut_prefixes(shape, target, tile, wanted)

    shortest, fixed = split_lengths(target)
    first_key = 0
    if shape.sliding_window is not None:
        first_key = max(0, shape.Lk - shape.Lq - shape.sliding_window + 1)
    seen = shape.Lk - first_key
    rows = min(tile.rows, max(16, triton.next_power_of_2(cut.packed)))
    if shape.batch_invariant:
        length = fixed
        splits = triton.cdiv(shape.Lk, length)
        if shape.sliding_window is not None:
            # Splits start at the row's first real token, so a window may begin inside of one.
            splits = min(splits, triton.cdiv(seen, length) + 1)
    else:
        programs = shape.B * triton.cdiv(cut.packed, rows)
        splits = max(1, min(wanted // max(1, programs), triton.cdiv(seen, shortest)))
        length = max(shortest, round_up(triton.cdiv(seen, splits), tile.keys))
        splits = triton.cdiv(seen, length)
    value_block = tilings.block_size(shape.Dv)
    merged = min(16, max(1, triton.next_power_of_2(cut.packed)))
    # A warp for every four rows of 128: enough threads for 16-byte loads, enough programs.
    merge_tile = Tile(merged, 1, max(1, min(4, merged * value_block // 512)), 1)
    sequences = shape.B * shape.Hkv
    return Layout(
        tile=tile,
        block=tilings.block_size(shape.D),
        value_block=value_block,
        prefix=cut,
        sequence_rows=rows,
        first_key=first_key,
        sequence_splits=splits,
        sequence_split=length,
        programs=shape.Hkv * cut.units + sequences * triton.cdiv(cut.packed, rows) * splits,
        partial_rows=shape.Hkv * cut.units * cut.rows + sequences * splits * cut.packed,
        merge_tile=merge_tile,
        merge_programs=sequences * triton.cdiv(cut.packed, merged),
    )


def partial_bytes(layout: Layout, value_head_size: int) -> int:
    """Size of the partial results: one fp32 row of Dv and one lse for each row and split.

    That is Hkv * (units * rows + B * sequence_splits * packed) * (Dv + 1) * 4 bytes. Both phases
    split only until the device is full, so a KV head has at most one prefix partial per row of a
    tile plus `WAVES` tiles per multiprocessor, whatever P is. With batch_invariant a row has up to
    `FIXED_PREFIX_SPLITS` of them, and one for every `FIXED_SPLIT` sequence keys.
    """
    return layout.partial_rows * (value_head_size + 1) * 4


def build_tables(prefix_index: Tensor, prefix_lengths: Tensor, cut: PrefixCut) -> PrefixTables:
    """Sort the batch by prefix and cut every prefix into units, on the device.

    Args:
        prefix_index: [B], -1 (or anything outside 0 .. N - 1) for no prefix.
        prefix_lengths: [N]. Whatever they say, no key from P on is read.
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
    """The smallest multiple of step of which `parts` reach the total."""
    return (total + parts * step - 1) // (parts * step) * step


class TableCache:
    """Tables by the identity and the version of `prefix_index` and `prefix_lengths`.

    The version is the counter that every in-place operation of PyTorch raises. A change that it
    does not see (the replay of a CUDA graph, a foreign kernel, `.data`) needs an explicit plan;
    tensors made in `torch.inference_mode` have no version and are never cached. Nothing is kept
    alive: entries hold weak references and go with their tensors. Tables belong to the stream that
    built them; those built while a CUDA graph is captured serve that capture only, so that
    replaying the graph computes them anew. Thread-safe.
    """

    SIZE = 32

    def __init__(self) -> None:
        """An empty cache."""
        self._lock = threading.RLock()  # reentrant: a weak reference may die inside
        self._entries: OrderedDict[Any, Any] = OrderedDict()
        self._captured: OrderedDict[Any, Any] = OrderedDict()

    def get(self, prefix_index: Tensor, prefix_lengths: Tensor, cut: PrefixCut) -> PrefixTables:
        """What `build_tables` returns for these arguments."""
        if prefix_index.is_inference() or prefix_lengths.is_inference():
            return build_tables(prefix_index, prefix_lengths, cut)
        tensors = (prefix_index, prefix_lengths)
        stream, capturing = 0, False
        if prefix_index.is_cuda:
            stream = torch.cuda.current_stream(prefix_index.device).cuda_stream
            capturing = torch.cuda.is_current_stream_capturing()
        key = (*((id(t), t._version) for t in tensors), stream, cut)
        with self._lock:
            if not capturing:
                self._captured.clear()
            entries = self._captured if capturing else self._entries
            found = entries.get(key)
            if found is not None and all(r() is t for r, t in zip(found[0], tensors, strict=True)):
                entries.move_to_end(key)
                return found[1]
            tables = build_tables(*tensors, cut)

            def forget(_: Any) -> None:
                with self._lock:
                    entries.pop(key, None)

            entries[key] = (tuple(weakref.ref(t, forget) for t in tensors), tables)
            while len(entries) > self.SIZE:
                entries.popitem(last=False)
            return tables

    def __len__(self) -> int:
        """Entries alive."""
        with self._lock:
            return len(self._entries) + len(self._captured)


TABLES = TableCache()


def shape_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_lengths: Tensor | None,
    sliding_window: int | None,
    batch_invariant: bool,
) -> Shape:
    """The shape that a plan for these operands is made for.

    A window that hides nothing is none, except with batch_invariant: one row's instructions must
    not depend on whether the others are longer than the window.
    """
    B, Hq, Lq, D = query.shape
    Lk = key.shape[2]
    if sliding_window is not None and sliding_window >= max(Lk, Lq):
        sliding_window = max(Lk, Lq) if batch_invariant else None
    return Shape(
        B, Hq, key.shape[1], Lq, Lk, prefix_key.shape[1],
        None if prefix_lengths is None else prefix_lengths.shape[0],
        D, value.shape[3], query.dtype, sliding_window, batch_invariant,
    )  # fmt: skip


def decode_plan(
    shape: Shape,
    target: Target,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    *,
    cached: bool = True,
) -> DecodePlan:
    """The plan of a shape; the tables of packed prefixes come from `TABLES` if `cached`."""
    layout = layout_of(shape, target)
    tables = None
    if prefix_index is not None and prefix_lengths is not None and layout.prefix.units:
        get = TABLES.get if cached else build_tables
        tables = get(prefix_index, prefix_lengths, layout.prefix)
    return DecodePlan(shape, target, layout, tables)


def two_phase_pays(shape: Shape, target: Target) -> bool:
    """Whether decode runs in two phases rather than in the one-pass forward kernel.

    The model: every multiprocessor reads at the same rate, so a kernel takes as long as the bytes
    that its busiest multiprocessor reads. One pass has B * Hkv programs (for short queries), each
    of which reads its prefix and its sequence alone; two phases spread the sequences, and one
    reading of the prefix per tile of rows, over all multiprocessors (in splits), write and read the
    partial results, and start one kernel more (`LAUNCH_BYTES`). So short prefixes and small
    batches, where the second launch costs more than all the bytes, stay with one pass.

    With batch_invariant the answer must not depend on the batch: always two phases.
    """
    if shape.batch_invariant:
        return True
    if not shape.B or not shape.Lq:
        return False
    layout = layout_of(shape, target)
    cut = layout.prefix
    key_bytes = (shape.D + shape.Dv) * shape.dtype.itemsize
    prefix = shape.P if shape.N is None else triton.cdiv(shape.P, max(1, shape.N))
    seen = shape.Lk - layout.first_key
    tiles = triton.cdiv(shape.B * cut.packed, cut.rows)
    waves = triton.cdiv(shape.B * shape.Hkv, target.multiprocessors)
    one_pass = waves * (prefix + seen) * key_bytes
    spread = shape.Hkv * (tiles * prefix + shape.B * seen) * key_bytes
    spread += 2 * partial_bytes(layout, shape.Dv)
    longest = max(min(prefix, cut.split or cut.shortest), min(seen, layout.sequence_split))
    busiest = max(spread // target.multiprocessors, longest * key_bytes)
    return busiest + LAUNCH_BYTES < one_pass
