"""Tile primitives that every kernel shares: constants, loads, and the row packing of a KV head."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Start of a running maximum. Finite, so that "nothing seen yet" minus "nothing seen yet" is 0 and
# not NaN: exp2(-inf - LOWEST) is 0 without a single select in the loops.
LOWEST = tl.constexpr(-1.0e38)


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
def causal_range(i_tile, Lq, Lk, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Keys seen by all rows of a packed tile, [0, all), and by any of them, [0, any)."""
    r_first = i_tile * BLOCK_M
    r_last = tl.minimum(r_first + BLOCK_M, GROUP * Lq) - 1
    same_head = r_first // Lq == r_last // Lq
    q_first = tl.where(same_head, r_first % Lq, 0)
    q_last = tl.where(same_head, r_last % Lq, Lq - 1)
    n_all = tl.minimum(tl.maximum(q_first + 1 + Lk - Lq, 0), Lk)
    n_any = tl.minimum(tl.maximum(q_last + 1 + Lk - Lq, 0), Lk)
    return n_all, n_any
