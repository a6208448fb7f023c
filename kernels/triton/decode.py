"""Decode: few queries per sequence, in two launches: all tiles of keys at once, then a merge.

The kernels are in :mod:`~fastprefix.kernels.decode_kernels`; their tiles, their splits and the
tables that sort a batch by prefix are in :mod:`~fastprefix.kernels.decode_plan`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprefix.options import Options

from . import launch
from .decode_kernels import prefix_attn_decode_kernel, prefix_attn_decode_merge_kernel
from .decode_plan import MAX_QUERY_LENGTH, DecodePlan, Shape, decode_plan, shape_of
from .problem import Problem, make_problem


def obstacle(problem: Problem) -> str | None:
    """What keeps a call from the two phases, argument first; None if they can do it."""
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


def shape_of_problem(problem: Problem) -> Shape:
    """What the plan of a call depends on."""
    options = problem.options
    return shape_of(
        problem.query, problem.key, problem.value, problem.prefix_key, options.prefix_lengths,
        options.sliding_window, options.batch_invariant,
    )  # fmt: skip


def decode_launches(
    problem: Problem,
    plan: DecodePlan,
    part_out: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor,
) -> list[launch.Launch]:
    """The two launches that fill the contiguous `out` and `lse`; one if there are no keys at all.

    `part_out` [layout.partial_rows, Dv] and `part_lse` [layout.partial_rows] are fp32 scratch.
    """
    shape, layout, cut = plan.shape, plan.layout, plan.layout.prefix
    tables, tile = plan.tables, layout.tile
    arguments = {
        "order": tables and tables.order, "units": tables and tables.units,
        "rows": tables and tables.rows,
        "part_out": part_out, "part_lse": part_lse, "out": out, "lse": lse,
        "B": shape.B, "window": shape.sliding_window,
        "n_units": cut.units, "n_splits": cut.splits, "split": cut.split,
        "first_key": layout.first_key, "first_row": shape.Hkv * cut.units * cut.rows,
        "n_sequence_splits": layout.sequence_splits, "sequence_split": layout.sequence_split,
    }  # fmt: skip
    constants = {
        # A single query is the last: it sees all keys.
        "CAUSAL": problem.options.is_causal and shape.Lq > 1,
        "FIXED": shape.batch_invariant,
        "BLOCK_R": layout.sequence_rows,
    }
    merged = {"BLOCK_M": tile.rows, "BLOCK_R": layout.merge_tile.rows}
    attend = problem.launch(prefix_attn_decode_kernel, layout.programs, tile, arguments, constants)
    merge = problem.launch(
        prefix_attn_decode_merge_kernel, layout.merge_programs, layout.merge_tile, arguments, merged
    )
    return [attend, merge] if layout.programs else [merge]


def decode(problem: Problem, plan: DecodePlan | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a problem without an :func:`obstacle`.

    Args:
        problem: checked.
        plan: for this shape and these prefixes, instead of the cached one.

    Raises:
        ValueError: a plan for another shape.
    """
    shape = shape_of_problem(problem)
    if plan is None:
        index, lengths = problem.options.prefix_index, problem.options.prefix_lengths
        plan = decode_plan(shape, problem.target, index, lengths)
    elif plan.shape != shape:
        raise ValueError(f"plan: got one for {plan.shape}, takes one for {shape}")
    query, rows = problem.query, plan.layout.partial_rows
    device = query.device
    out = torch.empty((*query.shape[:3], shape.Dv), dtype=query.dtype, device=device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    if lse.numel():
        part_out = launch.scratch((rows, shape.Dv), device)
        part_lse = launch.scratch((rows,), device)
        for step in decode_launches(problem, plan, part_out, part_lse, out, lse):
            step.run()
    return out, lse


def decode_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
    plan: DecodePlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few queries per sequence over [prefix ; sequence], in two launches.

    Args:
        query: [B, Hq, Lq, D], fp32, bf16 or fp16; Lq from 1 to 16, D and Dv from 1 to 256. Any
            strides, here and below.
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv. Runs of padding at either end of a sequence
            are not read.
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D], one prefix for all rows or several end to end; P may be 0.
        prefix_value: [Hkv, P, Dv].
        options: see :class:`~fastprefix.options.Options`.
        plan: from :func:`~fastprefix.kernels.decode_plan.decode_plan` for this shape and these
            prefixes, instead of the cached one.

    Returns:
        out [B, Hq, Lq, Dv] in the query's dtype and the log-sum-exp (natural log, sinks included)
        [B, Hq, Lq] in float32. Rows that see nothing: zeros and -inf (the sink, if there is one).

    Raises:
        ValueError: operands that do not fit together, what the two phases cannot do, or a plan for
            other shapes.
    """
    problem = make_problem(query, key, value, prefix_key, prefix_value, options)
    reason = obstacle(problem)
    if reason is not None:
        raise ValueError(reason)
    return decode(problem, plan)
