"""The tables of a batch with several prefixes or packed sequences, in one piece of memory.

They follow from the contents of `prefix_index`, `prefix_lengths` and `cu_seqlens`, so the device
builds them (:mod:`~fastprefix.kernels.table_kernels`). The host knows only their sizes. A call
builds them in scratch memory, or gets them as its option `tables`, which layers of one shape share.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.options import Options

from . import launch, table_kernels
from .arguments import BatchTables
from .decode_grid import FIXED_PREFIX_SPLITS, PrefixCut
from .integers import cdiv
from .problem import Problem
from .target import Tile

# Tables begin at multiples of this many integers: 16 bytes, of which Triton asks.
ALIGNMENT = 4


class Layout(NamedTuple):
    """What the sizes of a batch's tables follow from.

    Attributes:
        M: sequences.
        N: prefixes.
        length: Lq, of all packed sequences together.
        P: of all prefixes together.
        group: query heads per key head.
        packed: whether sequences are packed.
        cut: how decoding cuts prefixes; None for a call that is no decoding or has no several.
        forward: rows of a tile, of packed sequences; so is the next.
        dq: the same for dQ.
        dkv: keys of a tile, of packed sequences.
        prefix_keys: keys of a tile of the prefix's gradient.
        prefix_rows: its rows.
    """

    M: int
    N: int
    length: int
    P: int
    group: int
    packed: bool
    cut: PrefixCut | None
    forward: int
    dq: int
    dkv: int
    prefix_keys: int
    prefix_rows: int

    def shapes(self) -> BatchTables:
        """The shape of each table; None for tables that nothing reads."""
        M, N, length, cut = self.M, self.N, self.length, self.cut
        rows = length * self.group
        query_tiles = cdiv(length, self.prefix_rows)
        return BatchTables(
            order=None if cut is None else (M,),
            units=None if cut is None else (cut.units, 4),
            rows=None if cut is None else (M, 3),
            starts=(N + 1,),
            forward=(cdiv(rows, self.forward) + M, 2) if self.packed else None,
            dq=(cdiv(rows, self.dq) + M, 2) if self.packed else None,
            dkv=(cdiv(length, self.dkv) + M, 2) if self.packed else None,
            key_tiles=(cdiv(self.P, self.prefix_keys) + N, 2),
            query_tiles=(query_tiles + M if self.packed else query_tiles * M, 2),
            bounds=(N + 1,),
        )

    def size(self) -> int:
        """How many integers all tables take."""
        return sum(_space(shape) for shape in self.shapes() if shape is not None)

    def views(self, memory: Tensor) -> BatchTables:
        """The tables in their memory, int32 of :meth:`size`."""
        found: list[Tensor | None] = []
        end = 0
        for shape in self.shapes():
            if shape is None:
                found.append(None)
            else:
                found.append(memory[end : end + math.prod(shape)].view(shape))
                end += _space(shape)
        return BatchTables(*found)

    def programs(self) -> int:
        """Of the launch that fills all tables, in the order in which the kernel counts them."""
        each = table_kernels.RUNS.value
        runs, prefixes = cdiv(self.M, each), cdiv(self.N, each)
        sums = cdiv(self.N + 1, each)
        cut = self.cut
        decoding = 0 if cut is None else runs + cdiv(cut.units, table_kernels.UNITS.value)
        return decoding + 2 * sums + prefixes + runs + (3 * runs if self.packed else 0)


def _space(shape: tuple[int, ...]) -> int:
    return cdiv(math.prod(shape), ALIGNMENT) * ALIGNMENT


def layout_of(problem: Problem, cut: PrefixCut | None) -> Layout | None:
    """The layout of a call's tables; None if it has neither several prefixes nor packed sequences.

    Args:
        problem: the call.
        cut: of its forward, if that is a decoding step in two phases.
    """
    options = problem.options
    if options.prefix_lengths is None and options.cu_seqlens is None:
        return None
    _, _, _, Lq, _, P = problem.sizes
    several = options.prefix_lengths is not None and cut is not None and cut.units > 0
    prefix = problem.tile("dprefix")
    return Layout(
        problem.sequences, problem.prefixes, Lq, P, problem.group, options.cu_seqlens is not None,
        cut if several else None, problem.tile("forward").rows, problem.tile("dq").rows,
        problem.tile("dkv").keys, prefix.keys, prefix.rows,
    )  # fmt: skip


def tables_of(problem: Problem, cut: PrefixCut | None) -> BatchTables | None:
    """The tables of a call: those it was given, or new ones; None if it needs none.

    Args:
        problem: the call.
        cut: see :func:`layout_of`.

    Raises:
        ValueError: the tables that it was given have another layout.
    """
    layout, memory = layout_of(problem, cut), problem.options.tables
    if layout is None:
        return None
    size = layout.size()
    if memory is None:
        memory = launch.scratch((size,), problem.query.device, torch.int32)
        tables = layout.views(memory)
        tables_launch(problem.options, layout, tables).run()
        return tables
    if memory.numel() != size:
        raise ValueError(f"tables: got {memory.numel()} integers, takes {size} for this call")
    return layout.views(memory)


def tables_launch(options: Options, layout: Layout, tables: BatchTables) -> launch.Launch:
    """The launch that fills the tables."""
    cut = layout.cut
    packed, rows, keys, units, shortest, parts = 1, 1, 1, 0, 1, 1
    if cut is not None:
        packed, rows, keys, units, shortest = (
            cut.packed, cut.rows, cut.keys, cut.units, cut.shortest
        )  # fmt: skip
        parts = cut.free or FIXED_PREFIX_SPLITS
    return launch.Launch(
        table_kernels.prefix_attn_tables_kernel,
        (layout.programs(),),
        {
            "index": options.prefix_index, "lengths": options.prefix_lengths,
            "cu": options.cu_seqlens, "tables": tables,
            "M": layout.M, "N": layout.N, "length": layout.length, "P": layout.P,
            "group": layout.group, "packed": packed, "cut_rows": rows, "cut_keys": keys,
            "n_units": units, "shortest": shortest, "parts": parts,
            "forward_rows": layout.forward, "dq_rows": layout.dq, "dkv_keys": layout.dkv,
            "prefix_keys": layout.prefix_keys, "prefix_rows": layout.prefix_rows,
        },
        {"FREE": cut is not None and cut.free > 0},
        Tile(rows=32, keys=128, warps=4, stages=1),
    )  # fmt: skip
