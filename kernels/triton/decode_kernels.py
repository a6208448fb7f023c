"""Decode kernels: all tiles of keys of a step at once, prefix and sequence, then the merge.

The first programs of one grid attend to the prefix. They take the rows of all sequences that share
it, so that a key is read once per tile of rows and not once per sequence; the other programs attend
to one sequence each. Both kinds are split along the keys and leave partial results in fp32, each
normalised, with its log-sum-exp (natural logarithm); the second kernel adds those of a row up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Source, TileShape
from .blocks import (
    LN2,
    LOG2E,
    LOWEST,
    additive,
    cap,
    in_units,
    keys_in_use,
    load_tile,
    packed_rows,
    span_of,
    store_tile,
)

# Entries of a padding mask that one step of a scan reads: 16 bytes a thread.
SCAN = tl.constexpr(2048)
# Partial results of a row that the merge unrolls, so that their loads are under way together.
UNROLL = tl.constexpr(4)


@triton.jit
def first_real(p_pad, s_pn, length):
    """The first real token of a row of the padding mask; `length` if there is none."""
    o_n = tl.arange(0, SCAN)
    i_n = length * 0
    first = length
    while (i_n < length) & (first == length):
        o_at = (i_n + o_n).to(tl.int64)
        m_real = tl.load(p_pad + o_at * s_pn, mask=o_at < length, other=0) != 0
        first = tl.min(tl.where(m_real, i_n + o_n, length), 0)
        i_n += SCAN
    return first


@triton.jit
def scanned_span(p_pad, s_pn, lo, hi):
    """The first real token in lo .. hi and the end of the last; (hi, lo) if there is none."""
    o_n = tl.arange(0, SCAN)
    first = hi
    end = lo
    for i_n in tl.range(lo, hi, SCAN):
        o_at = (i_n + o_n).to(tl.int64)
        m_real = tl.load(p_pad + o_at * s_pn, mask=o_at < hi, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(m_real, i_n + o_n, hi), 0))
        end = tl.maximum(end, tl.max(tl.where(m_real, i_n + o_n + 1, lo), 0))
    return first, end


@triton.jit
def decode_sweep(b_q, source, lo, hi, o_first, o_end, scores, shape: tl.constexpr):
    """Attend to the keys lo .. hi of one source, normalised; (0, -inf) for rows that see none.

    Row i sees the keys o_first[i] .. o_end[i] of lo .. hi; None is no limit.
    """
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    BLOCK_DV: tl.constexpr = shape.BLOCK_DV
    HEAD: tl.constexpr = shape.HEAD
    HEAD_V: tl.constexpr = shape.HEAD_V
    PRECISION: tl.constexpr = shape.PRECISION
    softcap = scores.softcap
    scale_log2 = scores.scale * LOG2E
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_k = o_n[:, None] * source.kn + o_d[None, :]  # [BN, BD]
    o_v = o_n[:, None] * source.vn + o_dv[None, :]  # [BN, BDV]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i_n in tl.range(lo, hi, BLOCK_N):
        m_n = i_n + o_n < hi
        m_seen = m_n
        o_start = tl.cast(i_n, tl.int64)
        b_k = load_tile(
            source.k + o_start * source.kn + o_k, m_n, o_d, HEAD, BLOCK_D, True
        )  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if source.pad is not None:
            p_pad = source.pad + (o_start + o_n) * source.pn
            if source.solid is None:
                m_seen = m_n & (tl.load(p_pad, mask=m_n, other=0) != 0)
            else:
                # `hi` is not behind the last real token: without holes nothing is read here.
                m_asked = m_n & (i_n + o_n >= source.solid)
                m_seen = m_n & (i_n + o_n >= source.first)
                m_seen &= tl.load(p_pad, mask=m_asked, other=1) != 0
        if softcap is None:
            b_s *= scale_log2
        else:
            b_s = cap(b_s, scale_log2, softcap) * (softcap * LOG2E)
        b_s = tl.where(m_seen[None, :], b_s, float("-inf"))
        if o_end is not None:
            b_s = tl.where((i_n + o_n)[None, :] < o_end, b_s, float("-inf"))
        if o_first is not None:
            b_s = tl.where((i_n + o_n)[None, :] >= o_first, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.math.exp2(b_s - b_new[:, None])
        b_alpha = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_v = load_tile(
            source.v + o_start * source.vn + o_v, m_n, o_dv, HEAD_V, BLOCK_DV, True
        )  # [BN, BDV]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new
    m_some = b_sum > 0.0
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_lse = tl.where(m_some, (b_max + tl.math.log2(b_sum)) * LN2, float("-inf"))
    return b_acc / b_sum[:, None], b_lse


@triton.jit
def store_partial(buffers, b_out, b_lse, row, m_r, shape: tl.constexpr):
    """Store a tile of partial results from a row (int64) of the contiguous buffers on."""
    HEAD_V: tl.constexpr = shape.HEAD_V
    o_r = tl.arange(0, shape.BLOCK_M)
    o_dv = tl.arange(0, shape.BLOCK_DV)
    p_out = buffers.part_out + row * HEAD_V + (o_r[:, None] * HEAD_V + o_dv[None, :])
    store_tile(p_out, b_out, m_r, o_dv, HEAD_V, shape.BLOCK_DV)
    tl.store(buffers.part_lse + row + o_r, b_lse, mask=m_r)


@triton.jit
def prefix_phase(
    i_program, q, keys, buffers, s, B, Lq, P, n_units, n_splits, split, scores,
    shape: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of rows that use the same prefix, one KV head, one split of the prefix."""
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    units = buffers.units
    i_h = (i_program // n_units).to(tl.int64)
    i_u = i_program % n_units
    if units is None:
        row = i_u // n_splits * BLOCK_M
        row_end = B * GROUP * Lq
        lo = i_u % n_splits * split
        hi = tl.minimum(lo + split, P)
    else:
        row = tl.load(units + i_u * 4)
        row_end = tl.load(units + i_u * 4 + 1)
        lo = tl.load(units + i_u * 4 + 2)
        hi = tl.load(units + i_u * 4 + 3)
    if row < row_end:  # surplus units have no rows
        o_r = row + tl.arange(0, BLOCK_M)
        m_r = o_r < row_end
        o_b = o_r // (GROUP * Lq)
        o_g = o_r % (GROUP * Lq) // Lq
        o_m = o_r % Lq
        if buffers.order is not None:
            o_b = tl.load(buffers.order + o_b, mask=m_r, other=0)
        p_q = q + o_b.to(tl.int64) * s.qb + (i_h * GROUP + o_g) * s.qh + o_m.to(tl.int64) * s.qm
        o_d = tl.arange(0, shape.BLOCK_D)
        p_tile = p_q[:, None] + o_d[None, :]  # [BM, BD]
        b_q = load_tile(p_tile, m_r, o_d, shape.HEAD, shape.BLOCK_D, True)
        source = Source(
            k=keys.pk + i_h * s.pkh, v=keys.pv + i_h * s.pvh, pad=None, mask=None,
            kn=s.pkn, vn=s.pvn, pn=None, mn=None, shift=None, length=None, column=None,
            first=None, solid=None,
        )  # fmt: skip
        b_out, b_lse = decode_sweep(b_q, source, lo, hi, None, None, scores, shape)
        i_row = (i_h * n_units + i_u) * BLOCK_M
        store_partial(buffers, b_out, b_lse, i_row, m_r, shape)


@triton.jit
def sequence_phase(
    i_program, q, keys, masks, buffers, s, s_pb, Hkv, Lq, Lk, first_key, n_splits, split,
    first_row, scores, window,
    shape: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one KV head of one sequence, one split of the sequence."""
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    n_tiles = tl.cdiv(GROUP * Lq, BLOCK_M)
    i_split = i_program % n_splits
    i_tile = i_program // n_splits % n_tiles
    i_bh = i_program // (n_splits * n_tiles)
    i_b = (i_bh // Hkv).to(tl.int64)
    i_h = (i_bh % Hkv).to(tl.int64)
    o_g, o_m, m_r = packed_rows(i_tile, Lq, GROUP, BLOCK_M)

    if masks.lengths is not None:
        # The host has cut the whole buffer. Here the keys in use are shared out among the splits.
        Lk = keys_in_use(masks, s, i_b, Lk)
        if window is not None:
            first_key = tl.maximum(Lk - Lq - window + 1, 0)
        if not FIXED:
            split = tl.cdiv(tl.cdiv(Lk - first_key, n_splits), BLOCK_N) * BLOCK_N
    # The keys of this split. With FIXED splits start at the row's first real token, wherever the
    # batch's padding has put it, and those below every window are left out whole.
    p_pad = None
    first = None
    solid = None
    if masks.pad is not None:
        p_pad = masks.pad + i_b * s_pb
    if masks.spans is not None:
        span = span_of(masks.spans, i_b, Lk)
        first = span.first
        solid = span.solid
    if FIXED:
        lo = 0
        if first is not None:
            lo = first
        elif p_pad is not None:
            lo = first_real(p_pad, s.pn, Lk)
        if window is not None:
            lo += tl.maximum(first_key - lo, 0) // split * split
        lo += i_split * split
        hi = tl.minimum(lo + split, Lk)
        if window is not None:
            lo += tl.maximum(first_key - lo, 0) // BLOCK_N * BLOCK_N
    else:
        lo = first_key + i_split * split
        hi = tl.minimum(lo + split, Lk)
    if p_pad is not None:
        # Neither left padding nor the empty slots of a static cache are read. Whole tiles are left
        # out, so the others stay where they are.
        if masks.spans is not None:
            lo_real = span.first
            hi = tl.minimum(hi, span.end)
        else:
            lo_real, hi = scanned_span(p_pad, s.pn, lo, hi)
        lo += tl.maximum(lo_real - lo, 0) // BLOCK_N * BLOCK_N

    o_first = None
    o_end = None
    if CAUSAL:
        o_end = (o_m + 1 + Lk - Lq)[:, None]
        if window is not None:
            o_first = o_end - window
    elif window is not None:
        o_end = (o_m + Lk - Lq)[:, None] + window
        o_first = o_end - 2 * window + 1

    o_d = tl.arange(0, shape.BLOCK_D)
    p_q = q + i_b * s.qb + (i_h * GROUP + o_g) * s.qh + o_m.to(tl.int64) * s.qm
    p_tile = p_q[:, None] + o_d[None, :]  # [BM, BD]
    b_q = load_tile(p_tile, m_r, o_d, shape.HEAD, shape.BLOCK_D, True)
    source = Source(
        k=keys.k + i_b * s.kb + i_h * s.kh, v=keys.v + i_b * s.vb + i_h * s.vh,
        pad=p_pad, mask=None, kn=s.kn, vn=s.vn, pn=s.pn, mn=None,
        shift=None, length=None, column=None, first=first, solid=solid,
    )  # fmt: skip
    b_out, b_lse = decode_sweep(b_q, source, lo, hi, o_first, o_end, scores, shape)
    row = first_row + (i_bh.to(tl.int64) * n_splits + i_split) * (GROUP * Lq) + i_tile * BLOCK_M
    store_partial(buffers, b_out, b_lse, row, m_r, shape)


# Lengths grow with every token, and so does the padding mask's step from row to row (s_pb): no
# specialisation, hence no recompilation, for those that are multiples of 16 or equal to 1.
LENGTHS = [
    "B", "Lk", "P", "n_units", "n_splits", "split",
    "first_key", "n_sequence_splits", "sequence_split", "window", "s_pb",
]  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def prefix_attn_decode_kernel(
    q, keys, masks, buffers, s, s_pb, B, sizes, Lk, P, n_units, n_splits, split,
    first_key, n_sequence_splits, sequence_split, scores, window,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr,
    CAUSAL: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The first Hkv * n_units programs are prefix tiles, the others sequence tiles."""
    if sizes.overlaps is not None:
        # The merge may be launched as soon as all programs have come here. It waits for their end.
        tl.extra.cuda.gdc_launch_dependents()
    prefix_tile: tl.constexpr = TileShape(
        HEAD=HEAD, HEAD_V=HEAD_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip
    sequence_tile: tl.constexpr = TileShape(
        HEAD=HEAD, HEAD_V=HEAD_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_R,
        BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip
    if UNIT != 1:
        s = in_units(s, UNIT)
    i_program = tl.program_id(0)
    n_prefix = sizes.Hkv * n_units
    if i_program < n_prefix:
        prefix_phase(
            i_program, q, keys, buffers, s, B, sizes.Lq, P, n_units, n_splits, split,
            scores, prefix_tile, GROUP,
        )  # fmt: skip
    else:
        # the partial results of the prefix come first
        first_row = tl.cast(n_prefix, tl.int64) * BLOCK_M
        sequence_phase(
            i_program - n_prefix, q, keys, masks, buffers, s, s_pb, sizes.Hkv, sizes.Lq, Lk,
            first_key, n_sequence_splits, sequence_split, first_row, scores, window,
            sequence_tile, GROUP, CAUSAL, FIXED,
        )  # fmt: skip


@triton.jit
def merge_step(
    b_acc, b_max, b_sum, part_out, part_lse, o_row, m_r, b_bias, o_dv,
    HEAD_V: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add one partial result per row to the running maximum, sum and accumulator."""
    b_lse = tl.load(part_lse + o_row, mask=m_r, other=float("-inf")) * LOG2E
    if b_bias is not None:
        b_lse += b_bias
    b_out = load_tile(
        part_out + o_row[:, None] * HEAD_V + o_dv[None, :],
        m_r,
        o_dv,
        HEAD_V,
        BLOCK_DV,
        True,
    )
    b_new = tl.maximum(b_max, b_lse)
    b_alpha = tl.math.exp2(b_max - b_new)
    b_weight = tl.math.exp2(b_lse - b_new)
    b_acc = b_acc * b_alpha[:, None] + b_weight[:, None] * b_out
    return b_acc, b_new, b_sum * b_alpha + b_weight


@triton.jit(do_not_specialize=["n_units", "n_splits", "first_row", "n_sequence_splits"])
def prefix_attn_decode_merge_kernel(
    part_out, part_lse, rows, sinks, bias, out, lse,
    Hkv, Lq, n_units, n_splits, first_row, n_sequence_splits,
    GROUP: tl.constexpr, HEAD_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Final rows of one KV head of one sequence: prefix splits in order, sequence splits, sink.

    A partial result that saw nothing changes no bit, so neither does the number of those.
    BLOCK_M is that of the prefix tiles.
    """
    n_tiles = tl.cdiv(GROUP * Lq, BLOCK_R)
    i_tile = tl.program_id(0) % n_tiles
    i_bh = tl.program_id(0) // n_tiles
    i_b = i_bh // Hkv
    i_h = i_bh % Hkv
    o_r = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < GROUP * Lq
    o_head = i_h * GROUP + o_r // Lq
    o_dv = tl.arange(0, BLOCK_DV)

    if rows is None:
        row = i_b * (GROUP * Lq)
        i_u = 0
        n_prefix = n_splits
    else:
        row = tl.load(rows + i_b * 3)
        i_u = tl.load(rows + i_b * 3 + 1)
        n_prefix = tl.load(rows + i_b * 3 + 2)
    b_bias = None
    if bias is not None:
        # One number per head is added to all scores of the prefix alike, hence to their lse.
        b_bias = additive(tl.load(bias + o_head, mask=m_r, other=0.0))

    b_acc = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    b_max = tl.full([BLOCK_R], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    o_u = i_u + (row + o_r) // BLOCK_M * n_prefix  # the first unit of a row's tile
    o_row = (i_h.to(tl.int64) * n_units + o_u) * BLOCK_M + (row + o_r) % BLOCK_M
    if OVERLAPS:
        # Until the first launch has ended and its partial results can be seen. Every program comes
        # here, so the merge never ends before that.
        tl.extra.cuda.gdc_wait()
    for i_split in tl.range(0, n_prefix, loop_unroll_factor=UNROLL):
        b_acc, b_max, b_sum = merge_step(
            b_acc, b_max, b_sum, part_out, part_lse, o_row + i_split * BLOCK_M, m_r, b_bias,
            o_dv, HEAD_V, BLOCK_DV,
        )  # fmt: skip
    o_row = first_row + i_bh.to(tl.int64) * n_sequence_splits * (GROUP * Lq) + o_r
    for i_split in tl.range(0, n_sequence_splits, loop_unroll_factor=UNROLL):
        b_acc, b_max, b_sum = merge_step(
            b_acc, b_max, b_sum, part_out, part_lse, o_row + i_split * (GROUP * Lq), m_r, None,
            o_dv, HEAD_V, BLOCK_DV,
        )  # fmt: skip
    if sinks is not None:
        b_sink = tl.load(sinks + o_head, mask=m_r, other=0.0).to(tl.float32) * LOG2E
        b_new = tl.maximum(b_max, b_sink)
        b_alpha = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.math.exp2(b_sink - b_new)
        b_acc = b_acc * b_alpha[:, None]
        b_max = b_new

    m_some = b_sum > 0.0
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_lse = tl.where(m_some, (b_max + tl.math.log2(b_sum)) * LN2, float("-inf"))
    # out lies in memory as [B, Lq, Hq, Dv], and lse as [B, Hq, Lq].
    o_row = (i_b.to(tl.int64) * Lq + o_r % Lq) * (Hkv * GROUP) + o_head
    store_tile(
        out + o_row[:, None] * HEAD_V + o_dv[None, :], b_acc / b_sum[:, None],
        m_r, o_dv, HEAD_V, BLOCK_DV,
    )  # fmt: skip
    tl.store(lse + i_bh.to(tl.int64) * (GROUP * Lq) + o_r, b_lse, mask=m_r)
