"""What every kernel shares: loads, scores, key ranges, and the row packing of a KV head."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Span, Strides

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Start of a running maximum. Finite, so that "nothing seen yet" minus "nothing seen yet" is 0 and
# not NaN: exp2(-inf - LOWEST) is 0 without a single select in the loops.
LOWEST = tl.constexpr(-1.0e38)

# An additive mask or bias this low hides the key, as -inf does.
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def multiple(stride, UNIT: tl.constexpr):
    """The same stride, a multiple of UNIT, in a form that shows it to the compiler.

    0 in place of None, which functions cannot return with Triton 3.6. Nothing reads it.
    """
    if stride is None:
        return 0
    elif UNIT == 1:
        return stride
    else:
        return stride // UNIT * UNIT


@triton.jit
def in_units(s, UNIT: tl.constexpr):
    """`Strides` whose multiples of UNIT the compiler knows; see :func:`.arguments.stride_unit`.

    Without None, so it would change a kernel whose UNIT is 1. Those leave it out.
    """
    return Strides(
        qb=multiple(s.qb, UNIT), qh=multiple(s.qh, UNIT), qm=multiple(s.qm, UNIT),
        kb=multiple(s.kb, UNIT), kh=multiple(s.kh, UNIT), kn=multiple(s.kn, UNIT),
        vb=multiple(s.vb, UNIT), vh=multiple(s.vh, UNIT), vn=multiple(s.vn, UNIT),
        pkh=multiple(s.pkh, UNIT), pkn=multiple(s.pkn, UNIT),
        pvh=multiple(s.pvh, UNIT), pvn=multiple(s.pvn, UNIT),
        pb=multiple(s.pb, 1), pn=multiple(s.pn, 1),
        mb=multiple(s.mb, 1), mh=multiple(s.mh, 1), mm=multiple(s.mm, 1), mn=multiple(s.mn, 1),
        bh=multiple(s.bh, 1), bm=multiple(s.bm, 1), bn=multiple(s.bn, 1), lb=multiple(s.lb, 1),
        dob=multiple(s.dob, UNIT), doh=multiple(s.doh, UNIT), dom=multiple(s.dom, UNIT),
    )  # fmt: skip


@triton.jit
def load_tile(p_tile, m_rows, o_d, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr):
    """A tile [rows, BLOCK_D], zero outside; rows are tested only if BOUND, columns if padded."""
    if BOUND:
        if HEAD == BLOCK_D:
            return tl.load(p_tile, mask=m_rows[:, None], other=0.0)
        else:
            return tl.load(p_tile, mask=m_rows[:, None] & (o_d < HEAD)[None, :], other=0.0)
    else:
        if HEAD == BLOCK_D:
            return tl.load(p_tile)
        else:
            return tl.load(p_tile, mask=(o_d < HEAD)[None, :], other=0.0)


@triton.jit
def store_tile(p_tile, b_tile, m_rows, o_d, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows in m_rows of a tile [rows, BLOCK_D], cast to the buffer's type."""
    b_cast = b_tile.to(p_tile.dtype.element_ty)
    if HEAD == BLOCK_D:
        tl.store(p_tile, b_cast, mask=m_rows[:, None])
    else:
        tl.store(p_tile, b_cast, mask=m_rows[:, None] & (o_d < HEAD)[None, :])


@triton.jit
def packed_rows(i_tile, Lq, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of one KV head: query heads of the group times query positions, flattened.

    Returns the head within the group, the query position and the in-range mask, each [BLOCK_M].
    """
    o_r = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_g = o_r // Lq
    return o_g, o_r - o_g * Lq, o_r < GROUP * Lq


@triton.jit
def result_rows(i_tile, Lq, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Heads, positions and mask of `packed_rows`, for what is stored after the loops.

    They are computed again, from where the tile begins. The compiler does not see that these are
    the same numbers, so it keeps none of them in a register through the loops.
    """
    first = i_tile * BLOCK_M
    o_r = tl.arange(0, BLOCK_M)
    o_q = first % Lq + o_r
    o_g = o_q // Lq
    return first // Lq + o_g, o_q - o_g * Lq, first + o_r < GROUP * Lq


@triton.jit
def packed_span(i_tile, Lq, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """First and last query position among the rows of a packed tile."""
    r_first = i_tile * BLOCK_M
    r_last = tl.minimum(r_first + BLOCK_M, GROUP * Lq) - 1
    same_head = r_first // Lq == r_last // Lq
    return tl.where(same_head, r_first % Lq, 0), tl.where(same_head, r_last % Lq, Lq - 1)


@triton.jit
def locate(tables, sizes, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Where a program of packed query rows works.

    Returns the batch index of strides, the sequence, the KV head, the tile of its rows, the first
    token of the sequence, and its lengths. With cu_seqlens the sequence is -1 past the table's end.
    """
    Lq = sizes.Lq
    Lk = sizes.Lk
    if tables.cu is not None:
        i_h = tl.program_id(0) % sizes.Hkv
        p_tile = tables.tiles + tl.program_id(0) // sizes.Hkv * 2
        i_seq = tl.load(p_tile)
        i_tile = tl.load(p_tile + 1)
        i_start = tl.load(tables.cu + tl.maximum(i_seq, 0))
        length = tl.load(tables.cu + tl.maximum(i_seq, 0) + 1) - i_start
        i_b = i_seq * 0
        Lq = length
        Lk = length
    else:
        n_tiles = tl.cdiv(GROUP * Lq, BLOCK_M)
        i_bh = tl.program_id(0) // n_tiles
        i_tile = tl.program_id(0) % n_tiles
        if LAST_FIRST:
            i_tile = n_tiles - 1 - i_tile
        i_b = i_bh // sizes.Hkv
        i_h = i_bh % sizes.Hkv
        i_seq = i_b
        i_start = 0
    return i_b.to(tl.int64), i_seq, i_h.to(tl.int64), i_tile, i_start, Lq, Lk


@triton.jit
def prefix_of(tables, i_seq, P):
    """First position and length of a sequence's prefix."""
    if tables.index is not None:
        i_prefix = tl.load(tables.index + i_seq)
        i_safe = tl.maximum(i_prefix, 0)
        first = tl.load(tables.starts + i_safe)
        P = tl.where(i_prefix < 0, 0, tl.load(tables.starts + i_safe + 1) - first)
    else:
        first = 0
    return first, P


@triton.jit
def clamp(x, high):
    """Limit x to 0 .. high."""
    return tl.minimum(tl.maximum(x, 0), high)


@triton.jit
def keys_in_use(masks, s, i_b, Lk):
    """How many of the Lk keys of a sequence are in use; whatever the table says, 0 .. Lk."""
    if masks.lengths is not None:
        Lk = clamp(tl.load(masks.lengths + i_b * s.lb), Lk)
    return Lk


@triton.jit
def span_of(spans, i_b, Lk):
    """The `Span` of a row, of which Lk keys are in use."""
    p_span = spans + i_b * 3
    return Span(
        first=clamp(tl.load(p_span), Lk), solid=clamp(tl.load(p_span + 1), Lk),
        end=clamp(tl.load(p_span + 2), Lk),
    )  # fmt: skip


@triton.jit
def sequence_tiles(
    q_first, q_last, Lq, Lk, window, span,
    CAUSAL: tl.constexpr, UNMASKED_LOOP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the queries q_first .. q_last see sequence keys: (any, low, whole, end).

    Some see keys in any .. end; all of them see the whole tiles low .. whole. There are none of
    those without an UNMASKED_LOOP. With a `Span` the whole tiles have no padding.
    """
    past = Lk - Lq
    if CAUSAL:
        all_high = clamp(q_first + past + 1, Lk)
        n_end = clamp(q_last + past + 1, Lk)
    elif window is not None:
        all_high = clamp(q_first + past + window, Lk)
        n_end = clamp(q_last + past + window, Lk)
    else:
        all_high = Lk
        n_end = Lk
    n_any = 0
    n_low = 0
    if span is None:
        n_whole = all_high // BLOCK_N * BLOCK_N
        if window is not None:
            n_any = clamp(q_first + past - window + 1, Lk) // BLOCK_N * BLOCK_N
            all_low = clamp(q_last + past - window + 1, Lk)
            n_low = tl.maximum(tl.minimum(tl.cdiv(all_low, BLOCK_N) * BLOCK_N, n_whole), n_any)
            n_whole = tl.maximum(n_whole, n_low)
    else:
        # Tiles begin at the first real token: none has padding and whole tiles on its left.
        n_any = span.first
        if window is not None:
            n_any = tl.maximum(n_any, clamp(q_first + past - window + 1, Lk))
        n_low = n_any
        n_end = tl.minimum(n_end, span.end)
        n_tiles = tl.maximum(tl.minimum(all_high, span.solid) - n_any, 0) // BLOCK_N
        n_whole = n_any + n_tiles * BLOCK_N
        if window is not None:
            all_low = clamp(q_last + past - window + 1, Lk)
            n_low += tl.cdiv(tl.maximum(all_low - n_any, 0), BLOCK_N) * BLOCK_N
            n_low = tl.minimum(n_low, n_whole)
    if not UNMASKED_LOOP:
        n_low = n_any
        n_whole = n_any
    return n_any, n_low, n_whole, n_end


@triton.jit
def sequence_end(o_q, Lq, Lk, window, CAUSAL: tl.constexpr):
    """Query o_q sees no key from here on."""
    if CAUSAL:
        return tl.minimum(o_q + 1 + Lk - Lq, Lk)
    elif window is not None:
        return tl.minimum(o_q + window + Lk - Lq, Lk)
    else:
        return Lk


@triton.jit
def ranks(rank, i_b, o_q, m_q, Lq, Lk):
    """Real tokens before each query: the table's, or without padding its position."""
    if rank is not None:
        if m_q is not None:
            return tl.load(rank + i_b * Lq + o_q, mask=m_q, other=0)
        else:
            return tl.load(rank + i_b * Lq + o_q)
    else:
        return tl.maximum(o_q + Lk - Lq, 0)


@triton.jit
def prefix_tiles(
    rank, i_b, q_first, q_last, Lq, Lk, P, window,
    IN_WINDOW: tl.constexpr, UNMASKED_LOOP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the queries q_first .. q_last see prefix keys: (any, low, whole).

    Some see keys from `any` on; all of them see the whole tiles low .. whole. There are none of
    those without an UNMASKED_LOOP.
    """
    n_any = 0
    n_low = 0
    n_whole = P // BLOCK_N * BLOCK_N
    if IN_WINDOW:
        r_first = ranks(rank, i_b, q_first, None, Lq, Lk)
        r_last = ranks(rank, i_b, q_last, None, Lq, Lk)
        n_any = clamp(P - window + 1 + r_first, P) // BLOCK_N * BLOCK_N
        n_low = tl.cdiv(clamp(P - window + 1 + r_last, P), BLOCK_N) * BLOCK_N
        n_low = tl.minimum(n_low, n_whole)
    if not UNMASKED_LOOP:
        n_low = n_any
        n_whole = n_any
    return n_any, n_low, n_whole


@triton.jit
def cap(b_s, scale_log2, softcap):
    """Capped scores over the cap, tanh(scale * s / softcap), with an absolute error of 1e-7."""
    b_e = tl.math.exp2(b_s * (2.0 * scale_log2 / softcap))  # inf is fine: 1 - 2 / inf = 1
    return 1.0 - 2.0 / (1.0 + b_e)


@triton.jit
def additive(b_bias):
    """An additive mask or bias in fp32 and base 2; low values hide."""
    b_bias = b_bias.to(tl.float32)
    return tl.where(b_bias > HIDDEN, b_bias * LOG2E, float("-inf"))


@triton.jit
def add_mask(b_s, p_mask, m_tile):
    """Base-2 scores with a bool (True = attend) or additive mask; low values hide."""
    if p_mask.dtype.element_ty == tl.int1:
        return tl.where(tl.load(p_mask, mask=m_tile, other=0) != 0, b_s, float("-inf"))
    else:
        return b_s + additive(tl.load(p_mask, mask=m_tile, other=0.0))


@triton.jit
def kept(dropout, o_key):
    """1 for the weights that dropout keeps, 0 for the others; Philox 4x32-10, one word each.

    Counters: the key's column in [prefix ; sequence], the query's position, sequence * Hq + head.
    They broadcast against each other to the tile.
    """
    zero = o_key * 0 + dropout.o_query * 0 + dropout.o_head * 0
    word, _, _, _ = tl.philox(
        tl.load(dropout.seed), zero + o_key, zero + dropout.o_query, zero + dropout.o_head, zero
    )  # fmt: skip
    return tl.where(word >= dropout.dropped.to(tl.uint32), 1.0, 0.0)
