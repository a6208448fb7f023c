"""Backward: the row sums delta, and the launcher that runs the passes that are needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .backward_dkv import dkv_launch
from .backward_dprefix import dprefix_launches
from .backward_dq import dq_launch
from .blocks import load_tile

DELTA_ROWS = 64


@triton.jit
def prefix_attn_bwd_delta_kernel(
    out, do, delta, s_ob, s_oh, s_om, s_dob, s_doh, s_dom, H, Lq,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta[i] = sum over d of out[i, d] * do[i, d]. One program: BLOCK_M rows of one head."""
    n_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_m = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_m64 = o_m[:, None].to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < Lq
    p_out = out + i_b * s_ob + i_h * s_oh + o_m64 * s_om + o_d[None, :]
    p_do = do + i_b * s_dob + i_h * s_doh + o_m64 * s_dom + o_d[None, :]
    b_out = load_tile(p_out, m_m, o_d, HEAD, BLOCK_D, True).to(tl.float32)  # [BM, BD]
    b_do = load_tile(p_do, m_m, o_d, HEAD, BLOCK_D, True).to(tl.float32)  # [BM, BD]
    tl.store(delta + i_bh.to(tl.int64) * Lq + o_m, tl.sum(b_out * b_do, 1), mask=m_m)


def delta_launch(out: Tensor, grad_out: Tensor, delta: Tensor) -> launch.Launch:
    """The launch that fills `delta` [B, H, Lq]."""
    B, H, Lq, D = out.shape
    rows = min(DELTA_ROWS, triton.next_power_of_2(Lq))
    return launch.Launch(
        prefix_attn_bwd_delta_kernel,
        (triton.cdiv(Lq, rows) * B * H,),
        dict(out=out, do=grad_out, delta=delta, **launch.strides(o=out, do=grad_out), H=H, Lq=Lq),
        {"HEAD": D, "BLOCK_M": rows, "BLOCK_D": launch.block_size(D)},
        launch.Tile(rows=rows, keys=1, warps=4, stages=1),
    )


def prefix_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `prefix_attention_forward`.

    Args:
        grad_out: [B, Hq, Lq, D], any strides.
        query: [B, Hq, Lq, D], as given to the forward; so are the next five.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, D].
        prefix_key: [Hkv, P, D].
        prefix_value: [Hkv, P, D].
        key_padding_mask: [B, Lk] bool or None.
        out: [B, Hq, Lq, D], the forward's result.
        lse: [B, Hq, Lq] float32, the forward's log-sum-exp.
        is_causal: as given to the forward.
        scale: as given to the forward.
        needs: which of the gradients for query, key, value, prefix_key and prefix_value to
            compute. Passes that no wanted gradient requires do not run.

    Returns:
        Gradients of query, key, value, prefix_key [Hkv, P, D] and prefix_value [Hkv, P, D] in the
        dtypes of the inputs, None where not needed. The prefix gradients are summed over the
        batch, bit for bit the same in every run on the same device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    launch.check(query, key, value, prefix_key, prefix_value, key_padding_mask)
    launch.check_forward_results(query, grad_out, out, lse)
    query, key, value, prefix_key, prefix_value, grad_out, out = launch.rows_contiguous(
        query, key, value, prefix_key, prefix_value, grad_out, out
    )
    lse = lse.contiguous()
    target = launch.target_of(query.device)
    inputs = (query, key, value, prefix_key, prefix_value)
    # Without a query row nothing is launched, so nothing would be written.
    allocate = torch.empty if query.numel() else torch.zeros
    grads = [
        allocate(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    dq, dk, dv, dpk, dpv = grads
    if not query.numel():
        return dq, dk, dv, dpk, dpv

    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    if dq is not None or dk is not None or dpk is not None:
        delta_launch(out, grad_out, delta).run()
    if dq is not None:
        dq_launch(
            query, key, value, prefix_key, prefix_value, key_padding_mask, grad_out, lse, delta, dq,
            is_causal=is_causal, scale=scale, target=target,
        ).run()  # fmt: skip
    if key.numel() and (dk is not None or dv is not None):
        dkv_launch(
            query, key, value, key_padding_mask, grad_out, lse, delta, dk, dv,
            is_causal=is_causal, scale=scale, target=target,
        ).run()  # fmt: skip
    if prefix_key.numel() and (dpk is not None or dpv is not None):
        for step in dprefix_launches(
            query, prefix_key, prefix_value, grad_out, lse, delta, dpk, dpv,
            scale=scale, target=target,
        ):  # fmt: skip
            step.run()
    return dq, dk, dv, dpk, dpv
