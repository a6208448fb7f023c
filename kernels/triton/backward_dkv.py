"""Backward for the sequence's keys and values, reduced over the query heads of a group."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, ragged, tilings
from .blocks import LOG2E, add_mask, cap, kept, load_tile, prefix_of, store_tile
from .problem import Problem


@triton.jit
def key_gradients(
    b_dk, b_dv, b_k, b_v,
    p_q, p_do, p_lse2, p_delta, p_mask, s_mn, b_shift, m_m, m_n, o_d, o_dv, o_n, o_low, o_high,
    scale, softcap, seed, dropped, keep, o_key, o_query, o_head,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BOUND: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
    REPEAT_LAST_ROW: tl.constexpr = False,
):  # fmt: skip
    """Add the gradients that one tile of query rows sends to one tile of keys and values.

    Everything is transposed, keys down and queries across: P^T and dS^T then feed the products
    with dO and Q as they are. Rows outside m_m (tested if BOUND) get an lse2 of infinity, hence
    P = 0. Row i sees the keys o_low[i] <= o_n < o_high[i]; None: no such limit. p_mask [1, BM] are
    the rows' first columns of an additive mask; b_shift is added to all the scores.
    REPEAT_LAST_ROW: the pointers of rows outside m_m are those of a row that exists.
    """
    b_q = load_tile(p_q, m_m, o_d, HEAD, BLOCK_D, BOUND and not REPEAT_LAST_ROW)  # [BM, BD]
    b_do = load_tile(p_do, m_m, o_dv, HEAD_V, BLOCK_DV, BOUND and not REPEAT_LAST_ROW)  # [BM, BDV]
    if REPEAT_LAST_ROW:
        b_lse2 = tl.where(m_m, tl.load(p_lse2), float("inf"))
    elif BOUND:
        b_lse2 = tl.load(p_lse2, mask=m_m, other=float("inf"))
    else:
        b_lse2 = tl.load(p_lse2)
    b_st = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
    if softcap is not None:
        b_t = cap(b_st, scale * LOG2E, softcap)
        b_st = b_t * (softcap * LOG2E)
    else:
        b_st = b_st * (scale * LOG2E)
    if b_shift is not None:
        b_st += b_shift
    if p_mask is not None:
        b_st = add_mask(
            b_st, p_mask + o_n.to(tl.int64)[:, None] * s_mn, m_n[:, None] & m_m[None, :]
        )
    b_pt = tl.math.exp2(b_st - b_lse2[None, :])
    if o_high is not None:
        b_pt = tl.where(o_n[:, None] < o_high[None, :], b_pt, 0.0)
    if o_low is not None:
        b_pt = tl.where(o_n[:, None] >= o_low[None, :], b_pt, 0.0)
    b_kept = None
    if seed is not None:
        b_kept = kept(seed, dropped, o_key[:, None], o_query[None, :], o_head) / keep
    if NEED_DV:
        b_w = b_pt
        if seed is not None:
            b_w = b_pt * b_kept
        b_dv = tl.dot(b_w.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)  # [BN, BDV]
    if NEED_DK:
        if BOUND and not REPEAT_LAST_ROW:
            b_delta = tl.load(p_delta, mask=m_m, other=0.0)
        else:
            b_delta = tl.load(p_delta)
        b_dpt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
        if seed is not None:
            b_dpt *= b_kept
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        if softcap is not None:
            b_dst *= 1.0 - b_t * b_t
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)  # [BN, BD]
    return b_dk, b_dv


@triton.jit
def dkv_sweep(
    b_dk, b_dv, b_k, b_v,
    p_q, p_do, p_lse2, p_delta, p_mask, s_qh, s_qm, s_doh, s_dom, s_mh, s_mm, s_mn, s_row,
    first, turn, gap, end, Lq, past, window, m_n, o_d, o_dv, o_n,
    scale, softcap, seed, dropped, keep, o_key, i_head,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BOUND: tl.constexpr, CAUSAL: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
    REPEAT_LAST_ROW: tl.constexpr = False,
):  # fmt: skip
    """Add what query tiles first .. end of every head send; those from `turn` on move by `gap`.

    Query i stands at i + past, counted like o_n from the start of the key tile. BOUND: rows may not
    exist, or not see all the keys (CAUSAL, window). One loop over heads and tiles: a loop inside a
    loop would cost the registers that hold the accumulators.
    """
    o_m = tl.arange(0, BLOCK_M)
    o_q = o_m[:, None] * s_qm + o_d[None, :]  # [BM, BD]
    o_do = o_m[:, None] * s_dom + o_dv[None, :]  # [BM, BDV]
    i_g = 0
    i_x = first
    for _ in tl.range(0, tl.maximum(end - first, 0) * GROUP, 1):
        i_m = i_x * BLOCK_M
        if BOUND:
            i_m += tl.where(i_x < turn, 0, gap * BLOCK_M)
        o_start = tl.cast(i_m, tl.int64)
        o_r = o_m
        if REPEAT_LAST_ROW:
            o_r = tl.minimum(o_m, Lq - 1 - i_m)
            o_q = o_r[:, None] * s_qm + o_d[None, :]  # [BM, BD]
            o_do = o_r[:, None] * s_dom + o_dv[None, :]  # [BM, BDV]
        o_head = tl.cast(i_g, tl.int64)
        o_row = i_g * s_row + i_m
        o_low = None
        o_high = None
        if BOUND:
            if CAUSAL:
                o_high = i_m + o_m + past + 1
            elif window is not None:
                o_high = i_m + o_m + past + window
            if window is not None:
                o_low = i_m + o_m + past - window + 1
        p_rows = None
        if p_mask is not None:
            p_rows = p_mask + (o_head * s_mh + (o_start + o_m) * s_mm)[None, :]
        b_dk, b_dv = key_gradients(
            b_dk, b_dv, b_k, b_v,
            p_q + (o_head * s_qh + o_start * s_qm) + o_q,
            p_do + (o_head * s_doh + o_start * s_dom) + o_do,
            p_lse2 + o_row + o_r, p_delta + o_row + o_r, p_rows, s_mn, None,
            i_m + o_m < Lq, m_n, o_d, o_dv, o_n, o_low, o_high,
            scale, softcap, seed, dropped, keep, o_key, i_m + o_m, i_head + i_g,
            HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BOUND, NEED_DK, NEED_DV, PRECISION, REPEAT_LAST_ROW,
        )  # fmt: skip
        i_x += 1
        if GROUP > 1:
            i_g += tl.where(i_x < end, 0, 1)
            i_x = tl.where(i_x < end, i_x, first)
    return b_dk, b_dv


@triton.jit
def prefix_attn_bwd_dkv_kernel(
    q, k, v, pad, mask, index, starts, cu, tiles, seed, do, lse2, delta, dk, dv,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_pb, s_pn, s_mb, s_mh, s_mm, s_mn,
    s_dob, s_doh, s_dom,
    Hkv, Lq, Lk, P, scale, window, softcap, dropped, keep,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, CAUSAL: tl.constexpr,
    UNMASKED_LOOP: tl.constexpr, REPEAT_LAST_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one KV head of one sequence. A gradient of None is skipped."""
    s_row = Lq
    total = Lk
    if cu is not None:
        i_h = (tl.program_id(0) % Hkv).to(tl.int64)
        p_tile = tiles + tl.program_id(0) // Hkv * 2
        i_seq = tl.load(p_tile)
        if i_seq < 0:
            return
        i_n = tl.load(p_tile + 1) * BLOCK_N
        i_start = tl.load(cu + i_seq)
        Lk = tl.load(cu + i_seq + 1) - i_start
        Lq = Lk
        i_b = (i_seq * 0).to(tl.int64)
    else:
        n_tiles = tl.cdiv(Lk, BLOCK_N)
        i_bh = tl.program_id(0) // n_tiles
        i_n = tl.program_id(0) % n_tiles * BLOCK_N
        i_seq = i_bh // Hkv
        i_b = i_seq.to(tl.int64)
        i_h = (i_bh % Hkv).to(tl.int64)
        i_start = 0

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n + o_n < Lk
    o_start = (i_start + i_n).to(tl.int64)
    p_k = k + (i_b * s_kb + i_h * s_kh + o_start * s_kn) + (o_n[:, None] * s_kn + o_d[None, :])
    p_v = v + (i_b * s_vb + i_h * s_vh + o_start * s_vn) + (o_n[:, None] * s_vn + o_dv[None, :])
    b_k = load_tile(p_k, m_n, o_d, HEAD, BLOCK_D, True)  # [BN, BD]
    b_v = load_tile(p_v, m_n, o_dv, HEAD_V, BLOCK_DV, True)  # [BN, BDV]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    # Query tiles: some on the diagonal, then whole ones that see every key, then the window's edge
    # and the tail.
    past = Lk - Lq - i_n
    t_first = 0
    t_all = 0
    t_end = tl.cdiv(Lq, BLOCK_M)
    t_tail = Lq // BLOCK_M
    if CAUSAL:
        t_first = tl.minimum(tl.maximum(-past, 0) // BLOCK_M, t_end)
        t_all = tl.minimum(tl.cdiv(tl.maximum(BLOCK_N - 1 - past, 0), BLOCK_M), t_end)
    if window is not None:
        if not CAUSAL:
            t_first = tl.minimum(tl.maximum(1 - window - past, 0) // BLOCK_M, t_end)
            t_all = tl.minimum(tl.cdiv(tl.maximum(BLOCK_N - window - past, 0), BLOCK_M), t_end)
        t_end = tl.minimum(t_end, tl.cdiv(tl.maximum(BLOCK_N - 1 + window - past, 0), BLOCK_M))
        t_tail = tl.minimum(t_tail, tl.maximum(window - past, 0) // BLOCK_M)
        t_end = tl.maximum(t_end, t_first)
        t_all = tl.minimum(t_all, t_end)
    t_tail = tl.maximum(t_tail, t_all)
    if not UNMASKED_LOOP:
        t_all = t_end
        t_tail = t_end

    p_q = q + i_b * s_qb + i_h * GROUP * s_qh + tl.cast(i_start, tl.int64) * s_qm
    p_do = do + i_b * s_dob + i_h * GROUP * s_doh + tl.cast(i_start, tl.int64) * s_dom
    p_lse2 = lse2 + (i_b * Hkv + i_h) * GROUP * s_row + i_start
    p_delta = delta + (i_b * Hkv + i_h) * GROUP * s_row + i_start
    p_mask = None
    if mask is not None:
        p_mask = mask + i_b * s_mb + i_h * GROUP * s_mh + o_start * s_mn
    o_key = None
    i_head = 0
    if seed is not None:
        _, P = prefix_of(index, starts, i_seq, P)
        o_key = P + i_n + o_n
        i_head = (i_seq * Hkv * GROUP + i_h * GROUP).to(tl.int32)
    # The diagonal, the window's edge and the tail share one loop: two ranges with the whole tiles
    # left out.
    b_dk, b_dv = dkv_sweep(
        b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, p_mask,
        s_qh, s_qm, s_doh, s_dom, s_mh, s_mm, s_mn, s_row,
        t_first, t_all, t_tail - t_all, t_all + t_end - t_tail, Lq, past, window,
        m_n, o_d, o_dv, o_n, scale, softcap, seed, dropped, keep, o_key, i_head,
        GROUP, HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_M, True, CAUSAL,
        dk is not None, dv is not None, PRECISION, REPEAT_LAST_ROW,
    )  # fmt: skip
    if UNMASKED_LOOP:
        b_dk, b_dv = dkv_sweep(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse2, p_delta, p_mask,
            s_qh, s_qm, s_doh, s_dom, s_mh, s_mm, s_mn, s_row,
            t_all, 0, 0, t_tail, Lq, past, window,
            m_n, o_d, o_dv, o_n, scale, softcap, seed, dropped, keep, o_key, i_head,
            GROUP, HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_M, False, False,
            dk is not None, dv is not None, PRECISION,
        )  # fmt: skip

    # Padding needs no test before this point: a key's row of P^T touches only its own gradient.
    m_real = m_n
    if pad is not None:
        p_pad = pad + i_b * s_pb + o_start * s_pn + o_n * s_pn
        m_real = tl.load(p_pad, mask=m_n, other=0) != 0
    # dk and dv are contiguous. The offsets inside the tile depend on nothing but the thread, so
    # that no register has to hold them through the loops.
    o_base = (i_b * Hkv + i_h) * total + o_start
    if dk is not None:
        b_dk = tl.where(m_real[:, None], b_dk * scale, 0.0)
        o_tile = o_n[:, None] * HEAD + o_d[None, :]
        store_tile(dk + o_base * HEAD + o_tile, b_dk, m_n, o_d, HEAD, BLOCK_D)
    if dv is not None:
        b_dv = tl.where(m_real[:, None], b_dv, 0.0)
        o_tile = o_n[:, None] * HEAD_V + o_dv[None, :]
        store_tile(dv + o_base * HEAD_V + o_tile, b_dv, m_n, o_dv, HEAD_V, BLOCK_DV)


def dkv_launch(
    problem: Problem,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> launch.Launch:
    """The launch that fills the contiguous `grad_key` and `grad_value`, if not None."""
    B, _, Hkv, Lq, Lk, _ = problem.sizes
    tile = tilings.choose_tile("dkv", problem.work, Lq)
    table, tiles = None, B * triton.cdiv(Lk, tile.keys)
    if problem.options.cu_seqlens is not None:
        table = ragged.tiles(problem.options.cu_seqlens, Lk, tile.keys)
        tiles = table.shape[0]
    own = {
        "do": grad_out, "lse2": lse2, "delta": delta, "dk": grad_key, "dv": grad_value,
        "tiles": table, "keep": problem.keep, **launch.strides(do=grad_out),
    }  # fmt: skip
    constants = {
        "UNMASKED_LOOP": tilings.unmasked_loop("dkv", problem.work),
        "REPEAT_LAST_ROW": tilings.repeat_last_row(problem.work),
    }
    return problem.launch(prefix_attn_bwd_dkv_kernel, tiles * Hkv, tile, own, constants)
