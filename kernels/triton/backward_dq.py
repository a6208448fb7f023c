"""Backward for the queries: prefix and sequence in one sweep over the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tilings
from .arguments import BatchTables, Dropout, Rows, Saved, Source, TileShape
from .blocks import (
    LOG2E,
    add_mask,
    additive,
    cap,
    in_units,
    kept,
    keys_in_use,
    load_tile,
    locate,
    packed_rows,
    packed_span,
    prefix_of,
    prefix_tiles,
    ranks,
    result_rows,
    sequence_end,
    sequence_tiles,
    span_of,
    store_tile,
)
from .problem import Problem


@triton.jit
def dq_sweep(
    b_dq, b_dbias, rows, source, lo, hi, o_low, o_high, scores, dropout,
    shape: tl.constexpr, BOUND: tl.constexpr, NEED_DBIAS: tl.constexpr,
):  # fmt: skip
    """Add dS K over the keys lo .. hi of one source; the arguments are the forward's.

    b_dbias [BM] gets the sums of the gradients of the scores, if NEED_DBIAS.
    """
    o_n = tl.arange(0, shape.BLOCK_N)
    o_d = tl.arange(0, shape.BLOCK_D)
    o_dv = tl.arange(0, shape.BLOCK_DV)
    o_k = o_n[:, None] * source.kn + o_d[None, :]  # [BN, BD]
    o_v = o_n[:, None] * source.vn + o_dv[None, :]  # [BN, BDV]
    softcap = scores.softcap
    scale_log2 = scores.scale * LOG2E
    # Pointers that the loop carries. The 64-bit products of i_n and a stride inside the loop make
    # ptxas serialise the tensor cores of sm_90 (C7515): a wait after every product.
    p_k = source.k + tl.cast(lo, tl.int64) * source.kn
    p_v = source.v + tl.cast(lo, tl.int64) * source.vn
    step_k = tl.cast(source.kn, tl.int64) * shape.BLOCK_N
    step_v = tl.cast(source.vn, tl.int64) * shape.BLOCK_N
    for i_n in tl.range(lo, hi, shape.BLOCK_N):
        m_n = i_n + o_n < source.length
        o_start = tl.cast(i_n, tl.int64)
        b_k = load_tile(p_k + o_k, m_n, o_d, shape.HEAD, shape.BLOCK_D, BOUND)  # [BN, BD]
        b_v = load_tile(p_v + o_v, m_n, o_dv, shape.HEAD_V, shape.BLOCK_DV, BOUND)
        b_s = tl.dot(rows.q, tl.trans(b_k), input_precision=shape.PRECISION)  # [BM, BN]
        if softcap is not None:
            b_t = cap(b_s, scale_log2, softcap)
            b_s = b_t * (softcap * LOG2E)
        else:
            b_s = b_s * scale_log2
        if source.shift is not None:
            b_s += source.shift[:, None]
        if source.mask is not None:
            m_tile = rows.m[:, None] & m_n[None, :]
            b_s = add_mask(b_s, source.mask + (o_start + o_n)[None, :] * source.mn, m_tile)
        b_p = tl.math.exp2(b_s - rows.lse2[:, None])
        if BOUND:
            b_p = tl.where((i_n + o_n)[None, :] < o_high, b_p, 0.0)
            if o_low is not None:
                b_p = tl.where((i_n + o_n)[None, :] >= o_low, b_p, 0.0)
        # Where a span is known, the tiles without tests have no padding.
        if (source.pad is not None) and (BOUND or (source.solid is None)):
            p_pad = source.pad + o_start * source.pn + o_n * source.pn
            if BOUND:
                m_pad = tl.load(p_pad, mask=m_n, other=0) != 0
            else:
                m_pad = tl.load(p_pad) != 0
            b_p = tl.where(m_pad[None, :], b_p, 0.0)
        b_dp = tl.dot(rows.do, tl.trans(b_v), input_precision=shape.PRECISION)  # [BM, BN]
        if dropout.seed is not None:
            b_dp *= kept(dropout, (source.column + i_n + o_n)[None, :]) / dropout.keep
        b_ds = b_p * (b_dp - rows.delta[:, None])
        if NEED_DBIAS:
            b_dbias += tl.sum(b_ds, 1)
        if softcap is not None:
            b_ds *= 1.0 - b_t * b_t
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=shape.PRECISION)
        p_k += step_k
        p_v += step_v
    return b_dq, b_dbias


@triton.jit
def prefix_attn_bwd_dq_kernel(
    q, keys, masks, tables, seed, saved, dq, dbias, s,
    sizes, scores, window, dropped, keep,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, CAUSAL: tl.constexpr,
    BIAS_DIM: tl.constexpr, IN_WINDOW: tl.constexpr, UNMASKED_LOOP: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M packed rows of one KV head of one sequence, as in the forward.

    dbias [B, Hq, Lq], if not None, gets each row's sum of the gradients of its prefix scores.
    """
    shape: tl.constexpr = TileShape(
        HEAD=HEAD, HEAD_V=HEAD_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip
    if UNIT != 1:
        s = in_units(s, UNIT)
    i_b, i_seq, i_h, i_tile, i_start, Lq, Lk = locate(tables, sizes, GROUP, BLOCK_M, CAUSAL)
    if tables.cu is not None:  # noqa: SIM102 (the inner test is no constant)
        if i_seq < 0:
            return
    Lk = keys_in_use(masks, s, i_b, Lk)
    i_first, P = prefix_of(tables, i_seq, sizes.P)

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_g, o_q, m_r = packed_rows(i_tile, Lq, GROUP, BLOCK_M)
    o_head = i_h * GROUP + o_g
    o_token = (i_start + o_q).to(tl.int64)
    # lse2, delta and dbias are contiguous: the packed rows of a KV head lie end to end.
    o_r = tl.arange(0, BLOCK_M)
    if tables.cu is not None:
        row = o_head * sizes.Lq + o_token
    else:
        row = (i_b * sizes.Hkv + i_h) * GROUP * Lq + i_tile * BLOCK_M + o_r
    p_q = q + i_b * s.qb + o_head * s.qh + o_token * s.qm
    p_do = saved.do + i_b * s.dob + o_head * s.doh + o_token * s.dom
    b_q = load_tile(p_q[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)  # [BM, BD]
    b_do = load_tile(p_do[:, None] + o_dv[None, :], m_r, o_dv, HEAD_V, BLOCK_DV, True)
    b_delta = tl.load(saved.delta + row, mask=m_r, other=0.0)
    b_lse2 = tl.load(saved.lse2 + row, mask=m_r, other=float("inf"))
    rows = Rows(q=b_q, do=b_do, lse2=b_lse2, delta=b_delta, m=m_r)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_M], dtype=tl.float32)
    q_first, q_last = packed_span(i_tile, Lq, GROUP, BLOCK_M)
    dropout = Dropout(
        seed=seed, dropped=dropped, keep=keep, o_query=o_q[:, None],
        o_head=(i_seq * sizes.Hkv * GROUP + o_head).to(tl.int32)[:, None],
    )  # fmt: skip

    n_any, n_low, n_whole = prefix_tiles(
        tables.rank, i_b, q_first, q_last, Lq, Lk, P, window, IN_WINDOW, UNMASKED_LOOP, BLOCK_N
    )
    b_row = None
    p_bias = None
    if BIAS_DIM == 1:
        b_row = additive(tl.load(masks.bias + o_head * s.bh, mask=m_r, other=0.0))
    if BIAS_DIM == 3:
        p_bias = masks.bias + (o_head * s.bh + o_token * s.bm)[:, None] + i_first * s.bn
    o_low = None
    if IN_WINDOW:
        o_low = (P - window + 1 + ranks(tables.rank, i_b, o_q, m_r, Lq, Lk))[:, None]
    source = Source(
        k=keys.pk + i_h * s.pkh + tl.cast(i_first, tl.int64) * s.pkn,
        v=keys.pv + i_h * s.pvh + tl.cast(i_first, tl.int64) * s.pvn,
        pad=None, mask=p_bias, kn=s.pkn, vn=s.pvn, pn=None, mn=s.bn, shift=b_row,
        length=P, column=0, first=None, solid=None,
    )  # fmt: skip
    if UNMASKED_LOOP:
        if IN_WINDOW:
            b_dq, b_dbias = dq_sweep(
                b_dq, b_dbias, rows, source, n_any, n_low, o_low, P,
                scores, dropout, shape, True, dbias is not None,
            )  # fmt: skip
        b_dq, b_dbias = dq_sweep(
            b_dq, b_dbias, rows, source, n_low, n_whole, None, P,
            scores, dropout, shape, False, dbias is not None,
        )  # fmt: skip
    b_dq, b_dbias = dq_sweep(
        b_dq, b_dbias, rows, source, n_whole, P, o_low, P,
        scores, dropout, shape, True, dbias is not None,
    )  # fmt: skip

    if not UNMASKED_LOOP:
        # Where registers are few the operands are loaded again: kept past the end of the first loop
        # they spill (RDNA, Triton 3.9). The barrier keeps the compiler from taking the first ones.
        tl.debug_barrier()
        b_q = load_tile(p_q[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)
        b_do = load_tile(p_do[:, None] + o_dv[None, :], m_r, o_dv, HEAD_V, BLOCK_DV, True)
        rows = Rows(q=b_q, do=b_do, lse2=b_lse2, delta=b_delta, m=m_r)
    p_pad = None
    if masks.pad is not None:
        p_pad = masks.pad + i_b * s.pb
    p_mask = None
    if masks.mask is not None:
        p_mask = masks.mask + (i_b * s.mb + o_head * s.mh + o_token * s.mm)[:, None]
    span = None
    solid = None
    if masks.spans is not None:
        span = span_of(masks.spans, i_b, Lk)
        solid = span.solid
    n_any, n_low, n_whole, n_end = sequence_tiles(
        q_first, q_last, Lq, Lk, window, span, CAUSAL, UNMASKED_LOOP, BLOCK_N
    )
    o_high = sequence_end(o_q[:, None], Lq, Lk, window, CAUSAL)
    o_low = None
    if window is not None:
        o_low = (o_q + Lk - Lq - window + 1)[:, None]
    source = Source(
        k=keys.k + i_b * s.kb + i_h * s.kh + tl.cast(i_start, tl.int64) * s.kn,
        v=keys.v + i_b * s.vb + i_h * s.vh + tl.cast(i_start, tl.int64) * s.vn,
        pad=p_pad, mask=p_mask, kn=s.kn, vn=s.vn, pn=s.pn, mn=s.mn, shift=None,
        length=Lk, column=P, first=None, solid=solid,
    )  # fmt: skip
    if UNMASKED_LOOP:
        if window is not None:
            b_dq, b_dbias = dq_sweep(
                b_dq, b_dbias, rows, source, n_any, n_low, o_low, o_high,
                scores, dropout, shape, True, False,
            )  # fmt: skip
        b_dq, b_dbias = dq_sweep(
            b_dq, b_dbias, rows, source, n_low, n_whole, None, o_high,
            scores, dropout, shape, False, False,
        )  # fmt: skip
    b_dq, b_dbias = dq_sweep(
        b_dq, b_dbias, rows, source, n_whole, n_end, o_low, o_high,
        scores, dropout, shape, True, False,
    )  # fmt: skip

    o_g, o_q, m_r = result_rows(i_tile, Lq, GROUP, BLOCK_M)
    if dbias is not None:
        tl.store(dbias + row, b_dbias, mask=m_r)
    if dq is not None:
        row = (i_b * sizes.Lq + i_start + o_q) * (sizes.Hkv * GROUP) + i_h * GROUP + o_g
        p_dq = dq + row[:, None] * HEAD + o_d[None, :]
        store_tile(p_dq, b_dq * scores.scale, m_r, o_d, HEAD, BLOCK_D)


def dq_launch(
    problem: Problem,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad_query: Tensor | None,
    grad_bias_rows: Tensor | None = None,
    tables: BatchTables | None = None,
) -> launch.Launch:
    """The launch that fills `grad_query` [B, Hq, Lq, D], in memory [B, Lq, Hq, D].

    And `grad_bias_rows` [B, Hq, Lq] fp32: the sums of each row's gradients of prefix scores.
    """
    Hkv = problem.key.shape[1]
    tile = problem.tile("dq")
    table = tables and tables.dq
    tiles = problem.query_tiles(table, tile.rows)
    own = {
        "saved": Saved(grad_out, lse2, delta), "dq": grad_query, "dbias": grad_bias_rows,
        "tables": problem.tables(tables and tables.starts, table), "s": problem.strides(grad_out),
    }  # fmt: skip
    constants = {"UNMASKED_LOOP": tilings.unmasked_loop("dq", problem.work)}
    return problem.launch(prefix_attn_bwd_dq_kernel, tiles * Hkv, tile, own, constants)
