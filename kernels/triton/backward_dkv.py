"""Backward for the sequence's keys and values, reduced over the query heads of a group."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tilings
from .arguments import BatchTables, Dropout, KeyTile, Rows, Saved, TileShape
from .blocks import (
    LOG2E,
    add_mask,
    cap,
    in_units,
    kept,
    keys_in_use,
    load_tile,
    prefix_of,
    span_of,
    store_tile,
)
from .problem import Problem


@triton.jit
def key_gradients(
    b_dk, b_dv, tile, rows, p_mask, s_mn, b_shift, o_low, o_high, scores, dropout, o_key,
    shape: tl.constexpr, BOUND: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    REPEAT_LAST_ROW: tl.constexpr = False,
):  # fmt: skip
    """Add the gradients that one tile of query rows sends to one tile of keys and values.

    Everything is transposed, keys down and queries across: P^T and dS^T then feed the products
    with dO and Q as they are. `rows` are pointers. Rows outside rows.m (tested if BOUND) get an
    lse2 of infinity, hence P = 0. Row i sees the keys o_low[i] <= n < o_high[i]; None: no such
    limit. p_mask [1, BM] are the rows' first columns of an additive mask; b_shift is added to all
    the scores; o_key numbers the keys for dropout. REPEAT_LAST_ROW: the pointers of rows outside
    rows.m are those of a row that exists.
    """
    o_d = tl.arange(0, shape.BLOCK_D)
    o_dv = tl.arange(0, shape.BLOCK_DV)
    o_n = tile.o[:, None]
    scale_log2 = scores.scale * LOG2E
    softcap = scores.softcap
    MASKED: tl.constexpr = BOUND and not REPEAT_LAST_ROW
    b_q = load_tile(rows.q, rows.m, o_d, shape.HEAD, shape.BLOCK_D, MASKED)  # [BM, BD]
    b_do = load_tile(rows.do, rows.m, o_dv, shape.HEAD_V, shape.BLOCK_DV, MASKED)  # [BM, BDV]
    if REPEAT_LAST_ROW:
        b_lse2 = tl.where(rows.m, tl.load(rows.lse2), float("inf"))
    elif BOUND:
        b_lse2 = tl.load(rows.lse2, mask=rows.m, other=float("inf"))
    else:
        b_lse2 = tl.load(rows.lse2)
    b_st = tl.dot(tile.k, tl.trans(b_q), input_precision=shape.PRECISION)  # [BN, BM]
    if softcap is not None:
        b_t = cap(b_st, scale_log2, softcap)
        b_st = b_t * (softcap * LOG2E)
    else:
        b_st = b_st * scale_log2
    if b_shift is not None:
        b_st += b_shift
    if p_mask is not None:
        b_st = add_mask(b_st, p_mask + o_n.to(tl.int64) * s_mn, tile.m[:, None] & rows.m[None, :])
    b_pt = tl.math.exp2(b_st - b_lse2[None, :])
    if o_high is not None:
        b_pt = tl.where(o_n < o_high[None, :], b_pt, 0.0)
    if o_low is not None:
        b_pt = tl.where(o_n >= o_low[None, :], b_pt, 0.0)
    b_kept = None
    if dropout.seed is not None:
        b_kept = kept(dropout, o_key[:, None]) / dropout.keep
    if NEED_DV:
        b_w = b_pt
        if dropout.seed is not None:
            b_w = b_pt * b_kept
        b_dv = tl.dot(b_w.to(b_do.dtype), b_do, b_dv, input_precision=shape.PRECISION)  # [BN, BDV]
    if NEED_DK:
        if MASKED:
            b_delta = tl.load(rows.delta, mask=rows.m, other=0.0)
        else:
            b_delta = tl.load(rows.delta)
        b_dpt = tl.dot(tile.v, tl.trans(b_do), input_precision=shape.PRECISION)  # [BN, BM]
        if dropout.seed is not None:
            b_dpt *= b_kept
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        if softcap is not None:
            b_dst *= 1.0 - b_t * b_t
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=shape.PRECISION)  # [BN, BD]
    return b_dk, b_dv


@triton.jit
def dkv_sweep(
    b_dk, b_dv, tile, rows, p_mask, s, s_row, first, turn, gap, end, Lq, past, window,
    scores, dropout, o_key,
    shape: tl.constexpr, GROUP: tl.constexpr, BOUND: tl.constexpr, CAUSAL: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, REPEAT_LAST_ROW: tl.constexpr = False,
):  # fmt: skip
    """Add what query tiles first .. end of every head send; those from `turn` on move by `gap`.

    `rows` are pointers to the first row of the first head, `dropout` numbers that head; s_row is
    the stride of heads in lse2 and delta. Query i stands at i + past, counted like tile.o from the
    start of the key tile. BOUND: rows may not exist, or not see all the keys (CAUSAL, window). One
    loop over heads and tiles: a loop inside a loop would cost the registers that hold the
    accumulators.
    """
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    o_d = tl.arange(0, shape.BLOCK_D)
    o_dv = tl.arange(0, shape.BLOCK_DV)
    o_m = tl.arange(0, BLOCK_M)
    o_q = o_m[:, None] * s.qm + o_d[None, :]  # [BM, BD]
    o_do = o_m[:, None] * s.dom + o_dv[None, :]  # [BM, BDV]
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
            o_q = o_r[:, None] * s.qm + o_d[None, :]  # [BM, BD]
            o_do = o_r[:, None] * s.dom + o_dv[None, :]  # [BM, BDV]
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
            p_rows = p_mask + (o_head * s.mh + (o_start + o_m) * s.mm)[None, :]
        b_dk, b_dv = key_gradients(
            b_dk, b_dv, tile,
            Rows(
                q=rows.q + (o_head * s.qh + o_start * s.qm) + o_q,
                do=rows.do + (o_head * s.doh + o_start * s.dom) + o_do,
                lse2=rows.lse2 + o_row + o_r, delta=rows.delta + o_row + o_r, m=i_m + o_m < Lq,
            ),
            p_rows, s.mn, None, o_low, o_high, scores,
            Dropout(
                seed=dropout.seed, dropped=dropout.dropped, keep=dropout.keep,
                o_query=(i_m + o_m)[None, :], o_head=dropout.o_head + i_g,
            ),
            o_key, shape, BOUND, NEED_DK, NEED_DV, REPEAT_LAST_ROW,
        )  # fmt: skip
        i_x += 1
        if GROUP > 1:
            i_g += tl.where(i_x < end, 0, 1)
            i_x = tl.where(i_x < end, i_x, first)
    return b_dk, b_dv


@triton.jit
def query_tiles(
    past, Lq, window, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Query tiles that see keys of a tile: (first, all, tail, end).

    Tiles from `all` to `tail` are whole and see every key. Those before are on the diagonal, those
    behind at the window's edge or the end of the queries.
    """
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
    return t_first, t_all, t_tail, t_end


@triton.jit
def prefix_attn_bwd_dkv_kernel(
    q, keys, masks, tables, seed, saved, dk, dv, s,
    sizes, scores, window, dropped, keep,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, CAUSAL: tl.constexpr,
    UNMASKED_LOOP: tl.constexpr, REPEAT_LAST_ROW: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one KV head of one sequence. A gradient of None is skipped."""
    shape: tl.constexpr = TileShape(
        HEAD=HEAD, HEAD_V=HEAD_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip
    if UNIT != 1:
        s = in_units(s, UNIT)
    Hkv = sizes.Hkv
    Lq = sizes.Lq
    Lk = sizes.Lk
    s_row = Lq
    total = Lk
    if tables.cu is not None:
        i_h = (tl.program_id(0) % Hkv).to(tl.int64)
        p_tile = tables.tiles + tl.program_id(0) // Hkv * 2
        i_seq = tl.load(p_tile)
        if i_seq < 0:
            return
        i_n = tl.load(p_tile + 1) * BLOCK_N
        i_start = tl.load(tables.cu + i_seq)
        Lk = tl.load(tables.cu + i_seq + 1) - i_start
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
        Lk = keys_in_use(masks, s, i_b, Lk)

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n + o_n < Lk
    o_start = (i_start + i_n).to(tl.int64)
    p_k = keys.k + (i_b * s.kb + i_h * s.kh + o_start * s.kn)
    p_v = keys.v + (i_b * s.vb + i_h * s.vh + o_start * s.vn)
    o_k = o_n[:, None] * s.kn + o_d[None, :]
    o_v = o_n[:, None] * s.vn + o_dv[None, :]
    b_k = load_tile(p_k + o_k, m_n, o_d, HEAD, BLOCK_D, True)  # [BN, BD]
    b_v = load_tile(p_v + o_v, m_n, o_dv, HEAD_V, BLOCK_DV, True)  # [BN, BDV]
    tile = KeyTile(k=b_k, v=b_v, o=o_n, m=m_n)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    past = Lk - Lq - i_n
    t_first, t_all, t_tail, t_end = query_tiles(past, Lq, window, CAUSAL, BLOCK_M, BLOCK_N)
    if not UNMASKED_LOOP:
        t_all = t_end
        t_tail = t_end
    if masks.lengths is not None:  # a tile without a key in use gets zeros at once
        used = tl.where(i_n < Lk, 1, 0)
        t_first *= used
        t_all *= used
        t_tail *= used
        t_end *= used
    if masks.spans is not None:  # a tile without a real token as well
        span = span_of(masks.spans, i_b, Lk)
        used = tl.where((i_n < span.end) & (i_n + BLOCK_N > span.first), 1, 0)
        t_first *= used
        t_all *= used
        t_tail *= used
        t_end *= used

    i_row = (i_b * Hkv + i_h) * GROUP * s_row + i_start
    rows = Rows(
        q=q + i_b * s.qb + i_h * GROUP * s.qh + tl.cast(i_start, tl.int64) * s.qm,
        do=saved.do + i_b * s.dob + i_h * GROUP * s.doh + tl.cast(i_start, tl.int64) * s.dom,
        lse2=saved.lse2 + i_row, delta=saved.delta + i_row, m=None,
    )  # fmt: skip
    p_mask = None
    if masks.mask is not None:
        p_mask = masks.mask + i_b * s.mb + i_h * GROUP * s.mh + o_start * s.mn
    o_key = None
    i_head = 0
    if seed is not None:
        _, P = prefix_of(tables, i_seq, sizes.P)
        o_key = P + i_n + o_n
        i_head = (i_seq * Hkv * GROUP + i_h * GROUP).to(tl.int32)
    dropout = Dropout(seed=seed, dropped=dropped, keep=keep, o_query=None, o_head=i_head)
    # The diagonal, the window's edge and the tail share one loop: two ranges with the whole tiles
    # left out.
    b_dk, b_dv = dkv_sweep(
        b_dk, b_dv, tile, rows, p_mask, s, s_row,
        t_first, t_all, t_tail - t_all, t_all + t_end - t_tail, Lq, past, window,
        scores, dropout, o_key,
        shape, GROUP, True, CAUSAL, dk is not None, dv is not None, REPEAT_LAST_ROW,
    )  # fmt: skip
    if UNMASKED_LOOP:
        b_dk, b_dv = dkv_sweep(
            b_dk, b_dv, tile, rows, p_mask, s, s_row, t_all, 0, 0, t_tail, Lq, past, window,
            scores, dropout, o_key, shape, GROUP, False, False, dk is not None, dv is not None,
        )  # fmt: skip

    # Padding needs no test before this point: a key's row of P^T touches only its own gradient.
    m_real = m_n
    if masks.pad is not None:
        p_pad = masks.pad + i_b * s.pb + o_start * s.pn + o_n * s.pn
        m_real = tl.load(p_pad, mask=m_n, other=0) != 0
    m_all = m_n
    if masks.lengths is not None:
        m_all = i_n + o_n < total
    # dk and dv lie in memory as [B, Lk, Hkv, D].
    o_base = (i_b * total + o_start) * Hkv + i_h
    if dk is not None:
        b_dk = tl.where(m_real[:, None], b_dk * scores.scale, 0.0)
        o_tile = o_n[:, None] * (Hkv * HEAD) + o_d[None, :]
        store_tile(dk + o_base * HEAD + o_tile, b_dk, m_all, o_d, HEAD, BLOCK_D)
    if dv is not None:
        b_dv = tl.where(m_real[:, None], b_dv, 0.0)
        o_tile = o_n[:, None] * (Hkv * HEAD_V) + o_dv[None, :]
        store_tile(dv + o_base * HEAD_V + o_tile, b_dv, m_all, o_dv, HEAD_V, BLOCK_DV)


def dkv_launch(
    problem: Problem,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    tables: BatchTables | None = None,
) -> launch.Launch:
    """The launch that fills `grad_key` and `grad_value`, in memory [B, Lk, Hkv, D], if not None."""
    B, _, Hkv, _, Lk, _ = problem.sizes
    tile = problem.tile("dkv")
    table = tables and tables.dkv
    tiles = B * triton.cdiv(Lk, tile.keys) if table is None else table.shape[0]
    own = {
        "keys": problem.arguments["keys"]._replace(pk=None, pv=None),
        "masks": problem.arguments["masks"]._replace(bias=None),
        "saved": Saved(grad_out, lse2, delta), "dk": grad_key, "dv": grad_value,
        "tables": problem.tables(tables and tables.starts, table, rank=False),
        "s": problem.strides(grad_out, prefix=False),
    }  # fmt: skip
    constants = {
        "UNMASKED_LOOP": tilings.unmasked_loop("dkv", problem.work),
        "REPEAT_LAST_ROW": tilings.repeat_last_row(problem.work),
    }
    return problem.launch(prefix_attn_bwd_dkv_kernel, tiles * Hkv, tile, own, constants)
