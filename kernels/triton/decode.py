"""Decode: few queries per sequence, in two launches. The first has all tiles, the second merges.

The kernels are in :mod:`~fastprefix.kernels.decode_kernels`, their tiles and splits in
:mod:`~fastprefix.kernels.decode_grid`, and the tables that sort a batch by prefix in
:mod:`~fastprefix.kernels.tables`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprefix.options import Options

from . import decode_grid, launch
from .arguments import BatchTables, DecodeBuffers, FixedSizes, strides
from .decode_grid import (
    MAX_QUERY_LENGTH,
    DecodeGrid,
    DecodeShape,
    PrefixCut,
    grid_of,
    shape_of,
)
from .decode_kernels import prefix_attn_decode_kernel, prefix_attn_decode_merge_kernel
from .plan_cache import PlanCache
from .problem import Problem, make_problem
from .tables import layout_of, tables_launch, tables_of
from .target import Target

# The most queries of a sequence that a step of a generation may have, where tokens are guessed
# ahead. Longer calls are prompts, whose text does not grow by calls like them.
STEP_LENGTH = 16
# The kinds of steps for which :func:`compile_ahead` was called.
AHEAD = PlanCache()


@dataclass(frozen=True)
class DecodePlan:
    """A grid, and what it was made for. All layers of one shape can share a plan."""

    shape: DecodeShape
    target: Target
    grid: DecodeGrid


def decode_plan(shape: DecodeShape, target: Target) -> DecodePlan:
    """The plan of a shape."""
    return DecodePlan(shape, target, grid_of(shape, target))


def obstacle(problem: Problem) -> str | None:
    """Why decode cannot run a call, with the argument's name first; None if it can."""
    Lq, bias = problem.query.shape[2], problem.options.prefix_bias
    if Lq > MAX_QUERY_LENGTH:
        return f"query: got Lq = {Lq}, decode takes at most {MAX_QUERY_LENGTH}"
    for name in ("attn_mask", "cu_seqlens"):
        if getattr(problem.options, name) is not None:
            return f"{name}: decode takes none"
    for name in ("dropout_p", "prefix_in_window"):
        if getattr(problem.options, name):
            return f"{name}: got {getattr(problem.options, name)}, decode takes none"
    if bias is not None and bias.dim() != 1:
        return f"prefix_bias: got shape {list(bias.shape)}, decode takes [Hq]"
    return None


def shape_of_problem(problem: Problem) -> DecodeShape:
    """The shape of a call, on which its plan depends."""
    options = problem.options
    return shape_of(
        problem.query, problem.key, problem.value, problem.prefix_key, options.prefix_lengths,
        options.sliding_window, options.batch_invariant,
    )  # fmt: skip


def in_two_phases(problem: Problem) -> bool:
    """Whether a call runs in two phases.

    With batch_invariant the answer does not depend on the batch, and neither do the tiles of the
    one pass, except for padding: it would move a row's keys from tile to tile.

    Raises:
        ValueError: batch_invariant and padding, and the two phases cannot do the call.
    """
    reason = obstacle(problem)
    if reason is not None:
        if problem.options.batch_invariant and problem.options.key_padding_mask is not None:
            raise ValueError(f"batch_invariant: key_padding_mask for decode alone; {reason}")
        return False
    return decode_grid.two_phase_pays(shape_of_problem(problem), problem.target)


def cut_of(problem: Problem) -> PrefixCut | None:
    """How the prefixes of a call are cut; None if it runs in one pass."""
    if not in_two_phases(problem):
        return None
    return grid_of(shape_of_problem(problem), problem.target).prefix


def decode_launches(
    problem: Problem,
    plan: DecodePlan,
    part_out: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: BatchTables | None = None,
) -> list[launch.Launch]:
    """The launches that fill `out` and `lse`: two, or only the merge if there are no keys at all.

    Args:
        problem: the call.
        plan: its plan.
        part_out: [grid.partial_rows, Dv] in fp32, scratch space.
        part_lse: [grid.partial_rows] in fp32, scratch space.
        out: [B, Hq, Lq, Dv], in memory as [B, Lq, Hq, Dv].
        lse: [B, Hq, Lq] in fp32, contiguous.
        tables: of packed prefixes.
    """
    shape, grid, cut = plan.shape, plan.grid, plan.grid.prefix
    tile = grid.tile
    overlaps = plan.target.overlaps and grid.programs > 0
    options = problem.options
    s = strides(
        q=problem.query, k=problem.key, v=problem.value, pk=problem.prefix_key,
        pv=problem.prefix_value, pad=options.key_padding_mask, lengths=options.key_lengths,
    )  # fmt: skip
    arguments = {
        "buffers": DecodeBuffers(
            tables and tables.order, tables and tables.units, part_out, part_lse
        ),
        "rows": tables and tables.rows, "out": out, "lse": lse,
        "part_out": part_out, "part_lse": part_lse, "Hkv": shape.Hkv, "Lq": shape.Lq,
        # the merge adds the bias
        "masks": problem.arguments["masks"]._replace(mask=None, bias=None),
        "bias": options.prefix_bias,
        "s": s._replace(pb=None), "s_pb": s.pb,
        "sizes": FixedSizes(shape.Hkv, shape.Lq, 1 if overlaps else None),
        "Lk": shape.Lk, "P": shape.P, "B": shape.B, "window": shape.sliding_window,
        "n_units": cut.units, "n_splits": cut.splits, "split": cut.split,
        "first_key": grid.first_key, "first_row": shape.Hkv * cut.units * cut.rows,
        "n_sequence_splits": grid.sequence_splits, "sequence_split": grid.sequence_split,
    }  # fmt: skip
    constants = {
        # A single query is the last one, which sees all keys.
        "CAUSAL": problem.options.is_causal and shape.Lq > 1,
        "FIXED": shape.batch_invariant,
        "BLOCK_R": grid.sequence_rows,
    }
    merged = {"BLOCK_M": tile.rows, "BLOCK_R": grid.merge_tile.rows, "OVERLAPS": overlaps}
    attend = problem.launch(prefix_attn_decode_kernel, grid.programs, tile, arguments, constants)
    merge = problem.launch(
        prefix_attn_decode_merge_kernel, grid.merge_programs, grid.merge_tile, arguments, merged
    )
    merge = dataclasses.replace(merge, overlaps=overlaps)
    return [attend, merge] if grid.programs else [merge]


def decode(problem: Problem, tables: BatchTables | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a problem without an :func:`obstacle`.

    Args:
        problem: a checked problem.
        tables: of packed prefixes, cut as :func:`decode_plan` cuts them.
    """
    shape = shape_of_problem(problem)
    plan = decode_plan(shape, problem.target)
    query, rows = problem.query, plan.grid.partial_rows
    device = query.device
    out = launch.result((*query.shape[:3], shape.Dv), query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    if lse.numel():
        part_out = launch.scratch((rows, shape.Dv), device)
        part_lse = launch.scratch((rows,), device)
        for step in decode_launches(problem, plan, part_out, part_lse, out, lse, tables):
            step.run()
    return out, lse


def compile_ahead(problem: Problem) -> None:
    """Compiles what a step of a generation will run when its text has grown.

    Short texts run in one pass, longer ones in two phases. Without this, the first step in two
    phases would wait for the compiler, seconds long. Each kind of step is compiled once.
    """
    options, shape = problem.options, shape_of_problem(problem)
    if shape.Lq > STEP_LENGTH or launch.collecting() or problem.target.family == "interpreter":
        return
    if problem.query.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing may be loaded now
    used = tuple(value is not None for value in options)
    key = (problem.query.device, options.is_causal, shape._replace(Lk=0, sliding_window=None), used)
    if AHEAD.get(key) or not shape.B or obstacle(problem) is not None:
        return
    AHEAD.keep(key, True)
    plan, device = decode_plan(shape, problem.target), problem.query.device
    part_out = torch.empty((1,), dtype=torch.float32, device=device)
    out = launch.result((1, 1, 1, 1), problem.query)
    layout, tables = layout_of(problem, plan.grid.prefix), None
    if layout is not None:
        memory = torch.empty((layout.size(),), dtype=torch.int32, device=device)
        tables = layout.views(memory)
        tables_launch(options, layout, tables).compile()
    for step in decode_launches(problem, plan, part_out, part_out, out, part_out, tables):
        step.compile()


def decode_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few queries per sequence over [prefix ; sequence], in two launches.

    Args:
        query: [B, Hq, Lq, D], fp32, bf16 or fp16; Lq from 1 to 64, D and Dv from 1 to 256. Any
            strides, here and below.
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv. Padding at the beginning or the end of a
            sequence is not read.
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D], one prefix for all rows or several end to end; P may be 0.
        prefix_value: [Hkv, P, Dv].
        options: see :class:`~fastprefix.options.Options`.

    Returns:
        out [B, Hq, Lq, Dv] in the query's dtype, in memory as [B, Lq, Hq, Dv], and the log-sum-exp
        (natural log, sinks included) [B, Hq, Lq] in float32. Rows that see nothing get zeros and
        -inf (or the sink, if there is one).

    Raises:
        ValueError: operands that do not fit together, or a feature that decode does not have.
    """
    problem = make_problem(query, key, value, prefix_key, prefix_value, options)
    reason = obstacle(problem)
    if reason is not None:
        raise ValueError(reason)
    cut = grid_of(shape_of_problem(problem), problem.target).prefix
    return decode(problem, tables_of(problem, cut))
