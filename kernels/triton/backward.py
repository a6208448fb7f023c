"""Backward: the row sums delta, and the launcher that runs the passes that are needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprefix.options import Options

from . import decode, launch, plans, tilings
from .arguments import unit_of
from .backward_dkv import dkv_launch
from .backward_dprefix import dprefix_launches
from .backward_dq import dq_launch
from .blocks import LOG2E, load_tile, multiple
from .problem import Problem, make_problem
from .tables import tables_of
from .target import Tile

# Of a tile of out and one of its gradient: 64 rows of D 128; gfx1100 spills at twice that.
DELTA_ELEMENTS = 64 * 128


@triton.jit
def prefix_attn_bwd_delta_kernel(
    out, do, lse, delta, lse2, s_ob, s_oh, s_om, s_dob, s_doh, s_dom, H, Lq,
    HEAD: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta[i] = sum over d of out[i, d] * do[i, d]. One program: BLOCK_M rows of one head.

    lse2 is lse in base 2, ready for P = exp2(S - lse2): infinite, so that P is 0 and not infinite,
    in the rows that see nothing. Done here once, it saves three instructions per row in every tile
    of the other passes.
    """
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_m = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_m64 = o_m[:, None].to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < Lq
    p_out = out + i_b * multiple(s_ob, UNIT) + i_h * multiple(s_oh, UNIT)
    p_out = p_out + o_m64 * multiple(s_om, UNIT) + o_d[None, :]
    p_do = do + i_b * multiple(s_dob, UNIT) + i_h * multiple(s_doh, UNIT)
    p_do = p_do + o_m64 * multiple(s_dom, UNIT) + o_d[None, :]
    b_out = load_tile(p_out, m_m, o_d, HEAD, BLOCK_D, True).to(tl.float32)  # [BM, BD]
    b_do = load_tile(p_do, m_m, o_d, HEAD, BLOCK_D, True).to(tl.float32)  # [BM, BD]
    o_row = i_bh.to(tl.int64) * Lq + o_m
    tl.store(delta + o_row, tl.sum(b_out * b_do, 1), mask=m_m)
    b_lse = tl.load(lse + o_row, mask=m_m, other=0.0)
    b_lse2 = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    tl.store(lse2 + o_row, b_lse2, mask=m_m)


def delta_launch(
    out: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, lse2: Tensor
) -> launch.Launch:
    """The launch that fills `delta` and `lse2` [B, H, Lq]."""
    B, H, Lq, Dv = out.shape
    s_ob, s_oh, s_om, _ = out.stride()
    s_dob, s_doh, s_dom, _ = grad_out.stride()
    unit = unit_of(s_ob, s_oh, s_om, s_dob, s_doh, s_dom)
    block = tilings.block_size(Dv)
    rows = min(DELTA_ELEMENTS // block, 64, triton.next_power_of_2(Lq))
    return launch.Launch(
        prefix_attn_bwd_delta_kernel,
        (triton.cdiv(Lq, rows) * B * H,),
        {
            "out": out, "do": grad_out, "lse": lse, "delta": delta, "lse2": lse2,
            "s_ob": s_ob, "s_oh": s_oh, "s_om": s_om,
            "s_dob": s_dob, "s_doh": s_doh, "s_dom": s_dom, "H": H, "Lq": Lq,
        },
        {"HEAD": Dv, "UNIT": unit, "BLOCK_M": rows, "BLOCK_D": block},
        Tile(rows=rows, keys=1, warps=4, stages=1),
    )  # fmt: skip


def launch_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of `launch_forward`.

    Args:
        grad_out: [B, Hq, Lq, Dv], any strides.
        query: [B, Hq, Lq, D], as given to the forward; so are the next four.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D].
        prefix_value: [Hkv, P, Dv].
        out: [B, Hq, Lq, Dv], the forward's result.
        lse: [B, Hq, Lq] float32, the forward's log-sum-exp.
        options: as given to the forward.
        needs: which of the gradients for query, key, value, prefix_key, prefix_value, sinks and
            prefix_bias to compute. Passes that no wanted gradient requires do not run.

    Returns:
        Gradients of query, key and value, in memory as [B, L, H, D], of prefix_key [Hkv, P, D],
        prefix_value [Hkv, P, Dv], sinks [Hq] and prefix_bias [Hq], in the dtypes of the inputs;
        None where not needed. Those of the prefix are summed over the rows that have it, bit for
        bit the same in every run on the same device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    inputs = (grad_out, query, key, value, prefix_key, prefix_value, out, lse)
    if needs[5] or needs[6]:  # PyTorch computes part of these gradients
        return _launch_backward(*inputs, options, needs)
    return plans.planned(_launch_backward, inputs, options, needs)


def _launch_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """`launch_backward` without a plan."""
    problem = make_problem(query, key, value, prefix_key, prefix_value, options)
    check_forward_results(problem, grad_out, out, lse)
    grad_out, out = launch.rows_contiguous(grad_out, out)
    lse = lse.contiguous()
    inputs = (query, key, value, prefix_key, prefix_value)
    dq, dk, dv, dpk, dpv = _allocated(inputs, needs)
    sinks, bias = problem.options.sinks, problem.options.prefix_bias
    need_sinks, need_bias = needs[5] and sinks is not None, needs[6] and bias is not None
    if need_bias and bias is not None and bias.dim() != 1:
        raise ValueError(f"prefix_bias: no gradient for shape {tuple(bias.shape)}, only for [Hq]")
    dsinks = torch.zeros_like(sinks) if need_sinks and sinks is not None else None
    dbias = torch.zeros_like(bias) if need_bias and bias is not None else None
    if not query.numel():
        return dq, dk, dv, dpk, dpv, dsinks, dbias

    if not any((*needs[:5], need_sinks, need_bias)):
        return dq, dk, dv, dpk, dpv, dsinks, dbias
    delta = launch.scratch(lse.shape, lse.device)
    lse2 = launch.scratch(lse.shape, lse.device)
    delta_launch(out, grad_out, lse, delta, lse2).run()
    tables = tables_of(problem, decode.cut_of(problem))
    if dq is not None or dbias is not None:
        rows = None
        if dbias is not None:
            rows = launch.scratch(lse.shape, lse.device)
        dq_launch(problem, grad_out, lse2, delta, dq, rows, tables).run()
        if rows is not None and dbias is not None:
            dbias.copy_(rows.sum((0, 2)))
    if key.numel() and (dk is not None or dv is not None):
        for grads in tilings.gradients_in_one_pass(problem.work, dk, dv):
            dkv_launch(problem, grad_out, lse2, delta, *grads, tables).run()
    if prefix_key.numel() and (dpk is not None or dpv is not None):
        for grads in tilings.gradients_in_one_pass(problem.work, dpk, dpv):
            for step in dprefix_launches(problem, grad_out, lse2, delta, *grads, tables):
                step.run()
    if dsinks is not None and sinks is not None:
        # The sink's weight is exp(sink - lse) and its value is nothing: dS = P * (0 - delta).
        weight = torch.exp(sinks.float()[None, :, None] - lse)
        weight = weight.masked_fill(lse == float("-inf"), 0.0)  # a sink of -inf, and nothing seen
        dsinks.copy_(-(weight * delta).sum((0, 2)))
    return dq, dk, dv, dpk, dpv, dsinks, dbias


def _allocated(inputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Memory for the gradients of query, key, value, prefix_key and prefix_value that are needed.

    Without a query row nothing is launched, so nothing would be written: zeros.
    """
    allocate = torch.empty if inputs[0].numel() else torch.zeros
    made: list[Tensor | None] = [None] * len(inputs)
    for i, x in enumerate(inputs):
        if needs[i] and x.dim() == 4:
            made[i] = launch.result(x.shape, x, allocate)
        elif needs[i]:
            made[i] = allocate(x.shape, dtype=x.dtype, device=x.device)
    return made


def check_forward_results(problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> None:
    """Raise ValueError if the gradient or the forward's results do not belong to the query."""
    query = problem.query
    shape = (*query.shape[:3], problem.value.shape[-1])
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, query.dtype, query.device):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{query.dtype} {shape} on {query.device}"
            )
    if (lse.shape, lse.dtype, lse.device) != (query.shape[:3], torch.float32, query.device):
        raise ValueError(
            f"lse must be float32 {tuple(query.shape[:3])} on {query.device}, "
            f"got {lse.dtype} {tuple(lse.shape)} on {lse.device}"
        )
