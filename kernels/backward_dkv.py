"""Backward for the sequence's keys and values, reduced over the query heads of a group."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .blocks import LOG2E, load_tile, store_tile


@triton.jit
def key_gradients(
    b_dk, b_dv, b_k, b_v,
    p_q, p_do, p_lse, p_delta, m_m, o_d, o_n, o_last, scale_log2,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr, CAUSAL: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients that one tile of query rows sends to one tile of keys and values.

    Everything is transposed, keys down and queries across: P^T and dS^T then feed the products
    with dO and Q as they are. Rows outside m_m (tested if BOUND) get an lse of infinity, hence
    P = 0. If CAUSAL, row i sees the keys up to o_last[i].
    """
    b_q = load_tile(p_q, m_m, o_d, HEAD, BLOCK_D, BOUND)  # [BM, BD]
    b_do = load_tile(p_do, m_m, o_d, HEAD, BLOCK_D, BOUND)  # [BM, BD]
    if BOUND:
        b_lse2 = tl.load(p_lse, mask=m_m, other=float("inf")) * LOG2E
    else:
        b_lse2 = tl.load(p_lse) * LOG2E
    # Rows that see nothing (lse = -inf) must not turn into P = exp2(inf).
    b_lse2 = tl.where(b_lse2 == float("-inf"), float("inf"), b_lse2)
    b_st = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
    b_pt = tl.math.exp2(b_st * scale_log2 - b_lse2[None, :])
    if CAUSAL:
        b_pt = tl.where(o_n[:, None] <= o_last[None, :], b_pt, 0.0)
    if NEED_DV:
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)  # [BN, BD]
    if NEED_DK:
        if BOUND:
            b_delta = tl.load(p_delta, mask=m_m, other=0.0)
        else:
            b_delta = tl.load(p_delta)
        b_dpt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)  # [BN, BD]
    return b_dk, b_dv


@triton.jit
def dkv_sweep(
    b_dk, b_dv, b_k, b_v,
    p_q, p_do, p_lse, p_delta, s_qh, s_qm, s_doh, s_dom,
    first, turn, gap, end, Lq, past, scale_log2, o_d, o_n,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BOUND: tl.constexpr, CAUSAL: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what query tiles first .. end of every head send; those from `turn` on move by `gap`.

    Query i sees the keys up to i + past, counted like o_n from the start of the key tile. One loop
    over heads and tiles: a loop inside a loop would cost the registers that hold the accumulators.
    """
    o_m = tl.arange(0, BLOCK_M)
    o_q = o_m[:, None] * s_qm + o_d[None, :]  # [BM, BD]
    o_do = o_m[:, None] * s_dom + o_d[None, :]  # [BM, BD]
    i_g = 0
    i_x = first
    for _ in tl.range(0, tl.maximum(end - first, 0) * GROUP, 1):
        i_m = i_x * BLOCK_M
        if BOUND:
            i_m += tl.where(i_x < turn, 0, gap * BLOCK_M)
        o_start = tl.cast(i_m, tl.int64)
        o_head = tl.cast(i_g, tl.int64)
        o_row = i_g * Lq + i_m
        b_dk, b_dv = key_gradients(
            b_dk, b_dv, b_k, b_v,
            p_q + (o_head * s_qh + o_start * s_qm) + o_q,
            p_do + (o_head * s_doh + o_start * s_dom) + o_do,
            p_lse + o_row + o_m, p_delta + o_row + o_m,
            i_m + o_m < Lq, o_d, o_n, i_m + o_m + past, scale_log2,
            HEAD, BLOCK_D, BOUND, CAUSAL, NEED_DK, NEED_DV, PRECISION,
        )  # fmt: skip
        i_x += 1
        if GROUP > 1:
            i_g += tl.where(i_x < end, 0, 1)
            i_x = tl.where(i_x < end, i_x, first)
    return b_dk, b_dv


@triton.jit
def prefix_attn_bwd_dkv_kernel(
    q, k, v, pad, do, lse, delta, dk, dv,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_pb, s_pn,
    s_dob, s_doh, s_dom,
    Hkv, Lq, Lk, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one KV head of one sequence. A gradient of None is skipped."""
    n_tiles = tl.cdiv(Lk, BLOCK_N)
    i_bh = tl.program_id(0) // n_tiles
    i_n = tl.program_id(0) % n_tiles * BLOCK_N
    i_b = (i_bh // Hkv).to(tl.int64)
    i_h = (i_bh % Hkv).to(tl.int64)

    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n + o_n < Lk
    o_start = i_n.to(tl.int64)
    p_k = k + (i_b * s_kb + i_h * s_kh + o_start * s_kn) + (o_n[:, None] * s_kn + o_d[None, :])
    p_v = v + (i_b * s_vb + i_h * s_vh + o_start * s_vn) + (o_n[:, None] * s_vn + o_d[None, :])
    b_k = load_tile(p_k, m_n, o_d, HEAD, BLOCK_D, True)  # [BN, BD]
    b_v = load_tile(p_v, m_n, o_d, HEAD, BLOCK_D, True)  # [BN, BD]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    scale_log2 = scale * LOG2E

    # Query tiles: some on the diagonal, then whole ones that see every key, then the tail.
    past = Lk - Lq - i_n
    t_end = tl.cdiv(Lq, BLOCK_M)
    if CAUSAL:
        t_first = tl.minimum(tl.maximum(-past, 0) // BLOCK_M, t_end)
        t_all = tl.minimum(tl.cdiv(tl.maximum(BLOCK_N - 1 - past, 0), BLOCK_M), t_end)
    else:
        t_first = 0
        t_all = 0
    t_tail = tl.maximum(Lq // BLOCK_M, t_all)

    p_q = q + i_b * s_qb + i_h * GROUP * s_qh
    p_do = do + i_b * s_dob + i_h * GROUP * s_doh
    p_lse = lse + (i_b * Hkv + i_h) * GROUP * Lq
    p_delta = delta + (i_b * Hkv + i_h) * GROUP * Lq
    # The diagonal and the tail share one loop: two ranges with the whole tiles left out.
    b_dk, b_dv = dkv_sweep(
        b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, s_qh, s_qm, s_doh, s_dom,
        t_first, t_all, t_tail - t_all, t_all + t_end - t_tail, Lq, past, scale_log2, o_d, o_n,
        GROUP, HEAD, BLOCK_D, BLOCK_M, True, CAUSAL, dk is not None, dv is not None, PRECISION,
    )  # fmt: skip
    b_dk, b_dv = dkv_sweep(
        b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, s_qh, s_qm, s_doh, s_dom,
        t_all, 0, 0, t_tail, Lq, past, scale_log2, o_d, o_n,
        GROUP, HEAD, BLOCK_D, BLOCK_M, False, False, dk is not None, dv is not None, PRECISION,
    )  # fmt: skip

    # Padding needs no test before this point: a key's row of P^T touches only its own gradient.
    m_real = m_n
    if pad is not None:
        p_pad = pad + i_b * s_pb + o_start * s_pn + o_n * s_pn
        m_real = tl.load(p_pad, mask=m_n, other=0) != 0
    # dk and dv are contiguous. The offsets inside the tile depend on nothing but the thread, so
    # that no register has to hold them through the loops.
    o_base = ((i_b * Hkv + i_h) * Lk + o_start) * HEAD
    o_tile = o_n[:, None] * HEAD + o_d[None, :]
    if dk is not None:
        b_dk = tl.where(m_real[:, None], b_dk * scale, 0.0)
        store_tile(dk + o_base + o_tile, b_dk, m_n, o_d, HEAD, BLOCK_D)
    if dv is not None:
        b_dv = tl.where(m_real[:, None], b_dv, 0.0)
        store_tile(dv + o_base + o_tile, b_dv, m_n, o_d, HEAD, BLOCK_D)


def dkv_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    target: launch.Target,
) -> launch.Launch:
    """The launch that fills the contiguous `grad_key` and `grad_value`, if not None."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    tile = launch.choose("dkv", target, D, query.dtype, rows=Lq)
    return launch.Launch(
        prefix_attn_bwd_dkv_kernel,
        (triton.cdiv(Lk, tile.keys) * B * Hkv,),
        dict(
            q=query, k=key, v=value, pad=key_padding_mask,
            do=grad_out, lse=lse, delta=delta, dk=grad_key, dv=grad_value,
            **launch.strides(q=query, k=key, v=value, do=grad_out),
            **launch.mask_strides(key_padding_mask),
            Hkv=Hkv, Lq=Lq, Lk=Lk, scale=scale,
        ),
        {
            "GROUP": Hq // Hkv, "HEAD": D, "CAUSAL": is_causal,
            "PRECISION": launch.dot_precision(query.dtype),
            "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": launch.block_size(D),
        },
        tile,
    )  # fmt: skip
