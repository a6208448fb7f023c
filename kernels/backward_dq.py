"""Backward for the queries: prefix and sequence in one sweep over the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .blocks import LOG2E, causal_range, load_tile, packed_rows, store_tile


@triton.jit
def dq_sweep(
    b_dq, b_q, b_do, b_lse2, b_delta,
    p_k, p_v, p_pad, s_kn, s_vn, s_pn,
    lo, hi, length, o_limit, scale_log2, o_d,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K over the keys lo .. hi of one source; row i sees key n if n < o_limit[i]."""
    o_n = tl.arange(0, BLOCK_N)
    o_k = o_n[:, None] * s_kn + o_d[None, :]  # [BN, BD]
    o_v = o_n[:, None] * s_vn + o_d[None, :]  # [BN, BD]
    for i_n in tl.range(lo, hi, BLOCK_N):
        m_n = i_n + o_n < length
        o_start = tl.cast(i_n, tl.int64)
        b_k = load_tile(p_k + o_start * s_kn + o_k, m_n, o_d, HEAD, BLOCK_D, BOUND)  # [BN, BD]
        b_v = load_tile(p_v + o_start * s_vn + o_v, m_n, o_d, HEAD, BLOCK_D, BOUND)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        b_p = tl.math.exp2(b_s * scale_log2 - b_lse2[:, None])
        if BOUND:
            b_p = tl.where((i_n + o_n)[None, :] < o_limit, b_p, 0.0)
        if p_pad is not None:
            if BOUND:
                m_pad = tl.load(p_pad + o_start * s_pn + o_n * s_pn, mask=m_n, other=0) != 0
            else:
                m_pad = tl.load(p_pad + o_start * s_pn + o_n * s_pn) != 0
            b_p = tl.where(m_pad[None, :], b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit
def prefix_attn_bwd_dq_kernel(
    q, k, v, pk, pv, pad, do, lse, delta, dq,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    s_pkh, s_pkn, s_pvh, s_pvn, s_pb, s_pn, s_dob, s_doh, s_dom,
    Hkv, Lq, Lk, P, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M packed rows of one KV head of one sequence, as in the forward."""
    n_tiles = tl.cdiv(GROUP * Lq, BLOCK_M)
    i_bh = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    if CAUSAL:
        i_tile = n_tiles - 1 - i_tile
    i_b = (i_bh // Hkv).to(tl.int64)
    i_h = (i_bh % Hkv).to(tl.int64)

    o_d = tl.arange(0, BLOCK_D)
    o_g, o_q, m_r = packed_rows(i_tile, Lq, GROUP, BLOCK_M)
    o_head = i_h * GROUP + o_g
    o_q64 = o_q.to(tl.int64)
    # lse, delta and dq are contiguous: the packed rows of a KV head lie end to end.
    o_r = tl.arange(0, BLOCK_M)
    row = (i_b * Hkv + i_h) * GROUP * Lq + i_tile * BLOCK_M
    p_q = q + i_b * s_qb + o_head * s_qh + o_q64 * s_qm
    p_do = do + i_b * s_dob + o_head * s_doh + o_q64 * s_dom
    b_q = load_tile(p_q[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)  # [BM, BD]
    b_do = load_tile(p_do[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)  # [BM, BD]
    b_delta = tl.load(delta + row + o_r, mask=m_r, other=0.0)
    b_lse2 = tl.load(lse + row + o_r, mask=m_r, other=float("inf")) * LOG2E
    # P = exp2(S - lse) must be 0, not infinite, in rows that see nothing.
    b_lse2 = tl.where(b_lse2 == float("-inf"), float("inf"), b_lse2)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    scale_log2 = scale * LOG2E

    p_k = pk + i_h * s_pkh
    p_v = pv + i_h * s_pvh
    n_whole = P // BLOCK_N * BLOCK_N
    b_dq = dq_sweep(
        b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, None, s_pkn, s_pvn, 0,
        0, n_whole, P, P, scale_log2, o_d, HEAD, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    b_dq = dq_sweep(
        b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, None, s_pkn, s_pvn, 0,
        n_whole, P, P, P, scale_log2, o_d, HEAD, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    p_k = k + i_b * s_kb + i_h * s_kh
    p_v = v + i_b * s_vb + i_h * s_vh
    p_pad = pad
    if pad is not None:
        p_pad = pad + i_b * s_pb
    if CAUSAL:
        n_all, n_any = causal_range(i_tile, Lq, Lk, GROUP, BLOCK_M)
        o_limit = tl.minimum(o_q + 1 + Lk - Lq, Lk)[:, None]
    else:
        n_all, n_any, o_limit = Lk, Lk, Lk
    n_whole = n_all // BLOCK_N * BLOCK_N
    b_dq = dq_sweep(
        b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, p_pad, s_kn, s_vn, s_pn,
        0, n_whole, Lk, o_limit, scale_log2, o_d, HEAD, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    b_dq = dq_sweep(
        b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, p_pad, s_kn, s_vn, s_pn,
        n_whole, n_any, Lk, o_limit, scale_log2, o_d, HEAD, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    p_dq = dq + row * HEAD + (o_r[:, None] * HEAD + o_d[None, :])
    m_r = i_tile * BLOCK_M + o_r < GROUP * Lq
    store_tile(p_dq, b_dq * scale, m_r, o_d, HEAD, BLOCK_D)


def dq_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_query: Tensor,
    *,
    is_causal: bool,
    scale: float,
    target: launch.Target,
) -> launch.Launch:
    """The launch that fills the contiguous `grad_query`."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    tile = launch.choose("dq", target, D, query.dtype, rows=Hq // Hkv * Lq)
    return launch.Launch(
        prefix_attn_bwd_dq_kernel,
        (triton.cdiv(Hq // Hkv * Lq, tile.rows) * B * Hkv,),
        dict(
            q=query, k=key, v=value, pk=prefix_key, pv=prefix_value, pad=key_padding_mask,
            do=grad_out, lse=lse, delta=delta, dq=grad_query,
            **launch.strides(
                q=query, k=key, v=value, pk=prefix_key, pv=prefix_value, do=grad_out
            ),
            **launch.mask_strides(key_padding_mask),
            Hkv=Hkv, Lq=Lq, Lk=Lk, P=prefix_key.shape[1], scale=scale,
        ),
        {
            "GROUP": Hq // Hkv, "HEAD": D, "CAUSAL": is_causal,
            "PRECISION": launch.dot_precision(query.dtype),
            "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": launch.block_size(D),
        },
        tile,
    )  # fmt: skip
