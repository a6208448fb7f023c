"""Backward for the queries: prefix and sequence in one sweep over the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tilings
from .blocks import (
    LOG2E,
    add_mask,
    additive,
    cap,
    kept,
    load_tile,
    locate,
    packed_rows,
    packed_span,
    prefix_of,
    prefix_tiles,
    ranks,
    sequence_end,
    sequence_tiles,
    store_tile,
)
from .problem import Problem


@triton.jit
def dq_sweep(
    b_dq, b_dbias, b_q, b_do, b_lse2, b_delta, b_row,
    p_k, p_v, p_pad, p_mask, s_kn, s_vn, s_pn, s_mn,
    lo, hi, length, o_low, o_high, m_r, scale, softcap,
    seed, dropped, keep, column, o_query, o_head, o_d, o_dv,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BOUND: tl.constexpr, NEED_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K over the keys lo .. hi of one source; the arguments are the forward's.

    b_dbias [BM] gets the sums of the gradients of the scores, if NEED_DBIAS.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_k = o_n[:, None] * s_kn + o_d[None, :]  # [BN, BD]
    o_v = o_n[:, None] * s_vn + o_dv[None, :]  # [BN, BDV]
    scale_log2 = scale * LOG2E
    # Pointers that the loop carries. The 64-bit products of i_n and a stride inside the loop make
    # ptxas serialise the tensor cores of sm_90 (C7515): a wait after every product.
    p_k += tl.cast(lo, tl.int64) * s_kn
    p_v += tl.cast(lo, tl.int64) * s_vn
    step_k = tl.cast(s_kn, tl.int64) * BLOCK_N
    step_v = tl.cast(s_vn, tl.int64) * BLOCK_N
    for i_n in tl.range(lo, hi, BLOCK_N):
        m_n = i_n + o_n < length
        o_start = tl.cast(i_n, tl.int64)
        b_k = load_tile(p_k + o_k, m_n, o_d, HEAD, BLOCK_D, BOUND)  # [BN, BD]
        b_v = load_tile(p_v + o_v, m_n, o_dv, HEAD_V, BLOCK_DV, BOUND)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if softcap is not None:
            b_t = cap(b_s, scale_log2, softcap)
            b_s = b_t * (softcap * LOG2E)
        else:
            b_s = b_s * scale_log2
        if b_row is not None:
            b_s += b_row[:, None]
        if p_mask is not None:
            m_tile = m_r[:, None] & m_n[None, :]
            b_s = add_mask(b_s, p_mask + (o_start + o_n)[None, :] * s_mn, m_tile)
        b_p = tl.math.exp2(b_s - b_lse2[:, None])
        if BOUND:
            b_p = tl.where((i_n + o_n)[None, :] < o_high, b_p, 0.0)
            if o_low is not None:
                b_p = tl.where((i_n + o_n)[None, :] >= o_low, b_p, 0.0)
        if p_pad is not None:
            if BOUND:
                m_pad = tl.load(p_pad + o_start * s_pn + o_n * s_pn, mask=m_n, other=0) != 0
            else:
                m_pad = tl.load(p_pad + o_start * s_pn + o_n * s_pn) != 0
            b_p = tl.where(m_pad[None, :], b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
        if seed is not None:
            o_key = (column + i_n + o_n)[None, :]
            b_dp *= kept(seed, dropped, o_key, o_query, o_head) / keep
        b_ds = b_p * (b_dp - b_delta[:, None])
        if NEED_DBIAS:
            b_dbias += tl.sum(b_ds, 1)
        if softcap is not None:
            b_ds *= 1.0 - b_t * b_t
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        p_k += step_k
        p_v += step_v
    return b_dq, b_dbias


@triton.jit
def prefix_attn_bwd_dq_kernel(
    q, k, v, pk, pv, pad, mask, bias, index, starts, rank, cu, tiles, seed,
    do, lse2, delta, dq, dbias,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    s_pkh, s_pkn, s_pvh, s_pvn, s_pb, s_pn, s_mb, s_mh, s_mm, s_mn, s_bh, s_bm, s_bn,
    s_dob, s_doh, s_dom,
    Hkv, Lq, Lk, P, scale, window, softcap, dropped, keep,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, CAUSAL: tl.constexpr,
    BIAS_DIM: tl.constexpr, IN_WINDOW: tl.constexpr, UNMASKED_LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M packed rows of one KV head of one sequence, as in the forward.

    dbias [B, Hq, Lq], if not None, gets each row's sum of the gradients of its prefix scores.
    """
    total = Lq
    i_b, i_seq, i_h, i_tile, i_start, Lq, Lk = locate(
        cu, tiles, Hkv, Lq, Lk, GROUP, BLOCK_M, CAUSAL
    )
    if cu is not None:  # noqa: SIM102 (the inner test is no constant)
        if i_seq < 0:
            return
    i_first, P = prefix_of(index, starts, i_seq, P)

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_g, o_q, m_r = packed_rows(i_tile, Lq, GROUP, BLOCK_M)
    o_head = i_h * GROUP + o_g
    o_token = (i_start + o_q).to(tl.int64)
    # lse2, delta and dq are contiguous: the packed rows of a KV head lie end to end.
    o_r = tl.arange(0, BLOCK_M)
    if cu is not None:
        row = o_head * total + o_token
    else:
        row = (i_b * Hkv + i_h) * GROUP * Lq + i_tile * BLOCK_M + o_r
    p_q = q + i_b * s_qb + o_head * s_qh + o_token * s_qm
    p_do = do + i_b * s_dob + o_head * s_doh + o_token * s_dom
    b_q = load_tile(p_q[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)  # [BM, BD]
    b_do = load_tile(p_do[:, None] + o_dv[None, :], m_r, o_dv, HEAD_V, BLOCK_DV, True)
    b_delta = tl.load(delta + row, mask=m_r, other=0.0)
    b_lse2 = tl.load(lse2 + row, mask=m_r, other=float("inf"))
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_M], dtype=tl.float32)
    q_first, q_last = packed_span(i_tile, Lq, GROUP, BLOCK_M)
    o_c1 = o_q[:, None]
    o_c2 = (i_seq * Hkv * GROUP + o_head).to(tl.int32)[:, None]

    p_k = pk + i_h * s_pkh + tl.cast(i_first, tl.int64) * s_pkn
    p_v = pv + i_h * s_pvh + tl.cast(i_first, tl.int64) * s_pvn
    n_any, n_low, n_whole = prefix_tiles(
        rank, i_b, q_first, q_last, Lq, Lk, P, window, IN_WINDOW, UNMASKED_LOOP, BLOCK_N
    )
    b_row = None
    p_bias = None
    if BIAS_DIM == 1:
        b_row = additive(tl.load(bias + o_head * s_bh, mask=m_r, other=0.0))
    if BIAS_DIM == 3:
        p_bias = bias + (o_head * s_bh + o_token * s_bm)[:, None] + i_first * s_bn
    o_low = None
    if IN_WINDOW:
        o_low = (P - window + 1 + ranks(rank, i_b, o_q, m_r, Lq, Lk))[:, None]
    if UNMASKED_LOOP:
        if IN_WINDOW:
            b_dq, b_dbias = dq_sweep(
                b_dq, b_dbias, b_q, b_do, b_lse2, b_delta, b_row,
                p_k, p_v, None, p_bias, s_pkn, s_pvn, 0, s_bn,
                n_any, n_low, P, o_low, P, m_r, scale, softcap,
                seed, dropped, keep, 0, o_c1, o_c2, o_d, o_dv,
                HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_N, True, dbias is not None, PRECISION,
            )  # fmt: skip
        b_dq, b_dbias = dq_sweep(
            b_dq, b_dbias, b_q, b_do, b_lse2, b_delta, b_row,
            p_k, p_v, None, p_bias, s_pkn, s_pvn, 0, s_bn,
            n_low, n_whole, P, None, P, m_r, scale, softcap,
            seed, dropped, keep, 0, o_c1, o_c2, o_d, o_dv,
            HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_N, False, dbias is not None, PRECISION,
        )  # fmt: skip
    b_dq, b_dbias = dq_sweep(
        b_dq, b_dbias, b_q, b_do, b_lse2, b_delta, b_row,
        p_k, p_v, None, p_bias, s_pkn, s_pvn, 0, s_bn,
        n_whole, P, P, o_low, P, m_r, scale, softcap,
        seed, dropped, keep, 0, o_c1, o_c2, o_d, o_dv,
        HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_N, True, dbias is not None, PRECISION,
    )  # fmt: skip

    if not UNMASKED_LOOP:
        # Where registers are few the operands are loaded again: kept past the end of the first loop
        # they spill (RDNA, Triton 3.9). The barrier keeps the compiler from taking the first ones.
        tl.debug_barrier()
        b_q = load_tile(p_q[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)
        b_do = load_tile(p_do[:, None] + o_dv[None, :], m_r, o_dv, HEAD_V, BLOCK_DV, True)
    p_k = k + i_b * s_kb + i_h * s_kh + tl.cast(i_start, tl.int64) * s_kn
    p_v = v + i_b * s_vb + i_h * s_vh + tl.cast(i_start, tl.int64) * s_vn
    p_pad = pad
    if pad is not None:
        p_pad = pad + i_b * s_pb
    p_mask = None
    if mask is not None:
        p_mask = mask + (i_b * s_mb + o_head * s_mh + o_token * s_mm)[:, None]
    n_any, n_low, n_whole, n_end = sequence_tiles(
        q_first, q_last, Lq, Lk, window, CAUSAL, UNMASKED_LOOP, BLOCK_N
    )
    o_high = sequence_end(o_q[:, None], Lq, Lk, window, CAUSAL)
    o_low = None
    if window is not None:
        o_low = (o_q + Lk - Lq - window + 1)[:, None]
    if UNMASKED_LOOP:
        if window is not None:
            b_dq, b_dbias = dq_sweep(
                b_dq, b_dbias, b_q, b_do, b_lse2, b_delta, None,
                p_k, p_v, p_pad, p_mask, s_kn, s_vn, s_pn, s_mn,
                n_any, n_low, Lk, o_low, o_high, m_r, scale, softcap,
                seed, dropped, keep, P, o_c1, o_c2, o_d, o_dv,
                HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_N, True, False, PRECISION,
            )  # fmt: skip
        b_dq, b_dbias = dq_sweep(
            b_dq, b_dbias, b_q, b_do, b_lse2, b_delta, None,
            p_k, p_v, p_pad, p_mask, s_kn, s_vn, s_pn, s_mn,
            n_low, n_whole, Lk, None, o_high, m_r, scale, softcap,
            seed, dropped, keep, P, o_c1, o_c2, o_d, o_dv,
            HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_N, False, False, PRECISION,
        )  # fmt: skip
    b_dq, b_dbias = dq_sweep(
        b_dq, b_dbias, b_q, b_do, b_lse2, b_delta, None,
        p_k, p_v, p_pad, p_mask, s_kn, s_vn, s_pn, s_mn,
        n_whole, n_end, Lk, o_low, o_high, m_r, scale, softcap,
        seed, dropped, keep, P, o_c1, o_c2, o_d, o_dv,
        HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_N, True, False, PRECISION,
    )  # fmt: skip

    m_r = i_tile * BLOCK_M + o_r < GROUP * Lq
    if dbias is not None:
        tl.store(dbias + row, b_dbias, mask=m_r)
    if dq is not None:
        if cu is not None:
            p_dq = dq + (row[:, None] * HEAD + o_d[None, :])
        else:
            row = (i_b * Hkv + i_h) * GROUP * Lq + i_tile * BLOCK_M
            p_dq = dq + row * HEAD + (o_r[:, None] * HEAD + o_d[None, :])
        store_tile(p_dq, b_dq * scale, m_r, o_d, HEAD, BLOCK_D)


def dq_launch(
    problem: Problem,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad_query: Tensor | None,
    grad_bias_rows: Tensor | None = None,
) -> launch.Launch:
    """The launch that fills the contiguous `grad_query` [B, Hq, Lq, D].

    And `grad_bias_rows` [B, Hq, Lq] fp32: the sums of each row's gradients of prefix scores.
    """
    _, _, Hkv, Lq, _, _ = problem.sizes
    tile = tilings.choose_tile("dq", problem.work, problem.group * Lq)
    table, tiles = problem.query_tiles(tile.rows, problem.group)
    own = {
        "do": grad_out, "lse2": lse2, "delta": delta, "dq": grad_query, "dbias": grad_bias_rows,
        "tiles": table, "keep": problem.keep, **launch.strides(do=grad_out),
    }  # fmt: skip
    constants = {"UNMASKED_LOOP": tilings.unmasked_loop("dq", problem.work)}
    return problem.launch(prefix_attn_bwd_dq_kernel, tiles * Hkv, tile, own, constants)
