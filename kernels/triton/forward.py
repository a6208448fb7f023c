"""Forward: softmax attention of packed query rows over [prefix ; sequence], in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprefix.options import Options

from . import decode, launch, plans, tilings
from .arguments import BatchTables, Dropout, OnePassSizes, Sizes, Source, TileShape
from .blocks import (
    LN2,
    LOG2E,
    LOWEST,
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
from .problem import Problem, make_problem
from .tables import new_tables, tables_of


@triton.jit
def fwd_sweep(
    b_acc, b_max, b_sum, b_q, m_r, source, lo, hi, o_low, o_high, scores, dropout,
    shape: tl.constexpr, BOUND: tl.constexpr, PRESCALE: tl.constexpr,
):  # fmt: skip
    """Attend to the keys lo .. hi of one source; row i sees o_low[i] <= n < o_high[i].

    With BOUND False all the keys exist and all the rows see them: nothing is tested. m_r are the
    rows that exist.
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
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=shape.PRECISION)  # [BM, BN]
        if softcap is not None:
            b_s = cap(b_s, scale_log2, softcap) * (softcap * LOG2E)
        elif PRESCALE:
            b_s *= scale_log2
        if source.shift is not None:
            b_s += source.shift[:, None]
        if source.mask is not None:
            m_tile = m_r[:, None] & m_n[None, :]
            b_s = add_mask(b_s, source.mask + (o_start + o_n)[None, :] * source.mn, m_tile)
        if BOUND:
            b_s = tl.where((i_n + o_n)[None, :] < o_high, b_s, float("-inf"))
            if o_low is not None:
                b_s = tl.where((i_n + o_n)[None, :] >= o_low, b_s, float("-inf"))
        # Where a span is known, the tiles without tests have no padding.
        if (source.pad is not None) and (BOUND or (source.solid is None)):
            p_pad = source.pad + o_start * source.pn + o_n * source.pn
            if BOUND:
                m_pad = tl.load(p_pad, mask=m_n, other=0) != 0
            else:
                m_pad = tl.load(p_pad) != 0
            b_s = tl.where(m_pad[None, :], b_s, float("-inf"))
        if PRESCALE:
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.math.exp2(b_s - b_new[:, None])
        else:
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
            b_p = tl.math.exp2(b_s * scale_log2 - b_new[:, None])
        b_alpha = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        if dropout.seed is not None:
            b_p *= kept(dropout, (source.column + i_n + o_n)[None, :])
        b_v = load_tile(p_v + o_v, m_n, o_dv, shape.HEAD_V, shape.BLOCK_DV, BOUND)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=shape.PRECISION)
        b_max = b_new
        p_k += step_k
        p_v += step_v
    return b_acc, b_max, b_sum


# What grows with every token of a text is not specialised, see LENGTHS in decode_kernels. It is in
# no group, because the fields of groups always are.
@triton.jit(do_not_specialize=["Lk", "s_pb"])
def prefix_attn_fwd_kernel(
    q, keys, masks, sinks, tables, seed, out, lse, s, s_pb,
    sizes, Lk, scores, window, dropped, keep,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, PRESCALE: tl.constexpr, BIAS_DIM: tl.constexpr, IN_WINDOW: tl.constexpr,
    UNMASKED_LOOP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M packed rows of one KV head of one sequence."""
    shape: tl.constexpr = TileShape(
        HEAD=HEAD, HEAD_V=HEAD_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip
    if UNIT != 1:
        s = in_units(s, UNIT)
    sizes = Sizes(Hkv=sizes.Hkv, Lq=sizes.Lq, Lk=Lk, P=sizes.P)
    # With a causal mask the last rows see the most keys: start them first.
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
    p_q = q + i_b * s.qb + o_head * s.qh + o_token * s.qm
    b_q = load_tile(p_q[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)  # [BM, BD]

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    q_first, q_last = packed_span(i_tile, Lq, GROUP, BLOCK_M)
    dropout = Dropout(
        seed=seed, dropped=dropped, keep=None, o_query=o_q[:, None],
        o_head=(i_seq * sizes.Hkv * GROUP + o_head).to(tl.int32)[:, None],
    )  # fmt: skip

    # Prefix: whole tiles, then its tail. Nothing is causal and nothing is padding here.
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
            b_acc, b_max, b_sum = fwd_sweep(
                b_acc, b_max, b_sum, b_q, m_r, source, n_any, n_low, o_low, P,
                scores, dropout, shape, True, PRESCALE,
            )  # fmt: skip
        b_acc, b_max, b_sum = fwd_sweep(
            b_acc, b_max, b_sum, b_q, m_r, source, n_low, n_whole, None, P,
            scores, dropout, shape, False, PRESCALE,
        )  # fmt: skip
    b_acc, b_max, b_sum = fwd_sweep(
        b_acc, b_max, b_sum, b_q, m_r, source, n_whole, P, o_low, P,
        scores, dropout, shape, True, PRESCALE,
    )  # fmt: skip

    # Sequence: the window's edge, tiles that all rows see whole, the diagonal and the tail.
    p_pad = None
    if masks.pad is not None:
        p_pad = masks.pad + i_b * s_pb
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
            b_acc, b_max, b_sum = fwd_sweep(
                b_acc, b_max, b_sum, b_q, m_r, source, n_any, n_low, o_low, o_high,
                scores, dropout, shape, True, PRESCALE,
            )  # fmt: skip
        b_acc, b_max, b_sum = fwd_sweep(
            b_acc, b_max, b_sum, b_q, m_r, source, n_low, n_whole, None, o_high,
            scores, dropout, shape, False, PRESCALE,
        )  # fmt: skip
    b_acc, b_max, b_sum = fwd_sweep(
        b_acc, b_max, b_sum, b_q, m_r, source, n_whole, n_end, o_low, o_high,
        scores, dropout, shape, True, PRESCALE,
    )  # fmt: skip

    if sinks is not None:
        b_sink = tl.load(sinks + o_head, mask=m_r, other=float("-inf")).to(tl.float32) * LOG2E
        b_new = tl.maximum(b_max, b_sink)
        b_alpha = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.math.exp2(b_sink - b_new)
        b_acc = b_acc * b_alpha[:, None]
        b_max = b_new
    m_some = b_sum > 0.0
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_lse = tl.where(m_some, (b_max + tl.math.log2(b_sum)) * LN2, float("-inf"))
    if seed is not None:
        b_sum *= keep
    b_out = b_acc / b_sum[:, None]
    # out lies in memory as [B, Lq, Hq, Dv], and lse as [B, Hq, Lq].
    o_g, o_q, m_r = result_rows(i_tile, Lq, GROUP, BLOCK_M)
    n_heads = sizes.Hkv * GROUP
    o_head = i_h * GROUP + o_g
    o_token = i_start + o_q
    p_out = out + ((i_b * sizes.Lq + o_token) * n_heads + o_head)[:, None] * HEAD_V
    store_tile(p_out + o_dv[None, :], b_out, m_r, o_dv, HEAD_V, BLOCK_DV)
    tl.store(lse + (i_b * n_heads + o_head) * sizes.Lq + o_token, b_lse, mask=m_r)


def forward_launch(
    problem: Problem, out: Tensor, lse: Tensor, tables: BatchTables | None = None
) -> launch.Launch:
    """The launch that fills `out` [B, Hq, Lq, Dv] and the contiguous `lse` [B, Hq, Lq].

    Both `out` here and `grad_query` in the backward are :func:`~fastprefix.kernels.launch.result`.
    """
    _, _, Hkv, Lq, Lk, P = problem.sizes
    tile = problem.tile("forward")
    table = tables and tables.forward
    tiles = problem.query_tiles(table, tile.rows)
    s = problem.strides()
    own = {
        "out": out, "lse": lse, "tables": problem.tables(tables and tables.starts, table),
        # what grows with a text stands outside of the groups
        "s": s._replace(pb=None), "s_pb": s.pb, "sizes": OnePassSizes(Hkv, Lq, P), "Lk": Lk,
    }  # fmt: skip
    constants = {"UNMASKED_LOOP": tilings.unmasked_loop("forward", problem.work)}
    return problem.launch(prefix_attn_fwd_kernel, tiles * Hkv, tile, own, constants)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over [prefix ; sequence], a prefix shared by all rows that have it.

    A few queries per sequence run in two phases where that pays, see
    :func:`~fastprefix.kernels.decode_grid.two_phase_pays`; everything else in one pass.

    Args:
        query: [B, Hq, Lq, D], fp32, bf16 or fp16; D and Dv from 1 to 256. Any strides, here and
            below.
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D]; P may be 0.
        prefix_value: [Hkv, P, Dv].
        options: see :class:`~fastprefix.options.Options`.

    Returns:
        out [B, Hq, Lq, Dv] in the query's dtype, in memory as [B, Lq, Hq, Dv], and the log-sum-exp
        (natural log) [B, Hq, Lq] in float32. Rows that see nothing: zeros and -inf (with a sink:
        the sink).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or batch_invariant for a
            call with padding and a :func:`~fastprefix.kernels.decode.obstacle`.
    """
    inputs = (query, key, value, prefix_key, prefix_value)
    return plans.planned(_launch_forward, inputs, options)


def known_forward(tensors: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Tensor] | None:
    """What `launch_forward` returns if the call has a plan, otherwise None. Nothing is checked.

    Args:
        tensors: query, key, value, prefix_key, prefix_value.
        options: with no tensors but perhaps key_padding_mask and key_lengths.
    """
    return plans.known(_launch_forward, tensors, options)


def launch_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> Tensor:
    """The option `tables` of a call of `launch_forward` and its backward, and of others like it.

    Those have the same shapes, dtype and device, and options that differ at most in other tensors
    than `prefix_index`, `prefix_lengths` and `cu_seqlens`. The arguments are those of
    `launch_forward`, with several prefixes or packed sequences.

    Returns:
        int32, as many as the launchers ask for.
    """
    inputs = (query, key, value, prefix_key, prefix_value)
    (made,) = plans.planned(_launch_tables, inputs, options)
    return made


def _launch_tables(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor]:
    """`launch_tables` without a plan."""
    problem = make_problem(query, key, value, prefix_key, prefix_value, options)
    return (new_tables(problem, decode.cut_of(problem)),)


def _launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """`launch_forward` without a plan."""
    problem = make_problem(query, key, value, prefix_key, prefix_value, options)
    cut = decode.cut_of(problem)
    if cut is not None:
        return decode.decode(problem, tables_of(problem, cut))
    decode.compile_ahead(problem)
    shape = (*query.shape[:3], value.shape[-1])
    out = launch.result(shape, query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel():
        forward_launch(problem, out, lse, tables_of(problem, None)).run()
    return out, lse
