"""Backward for the shared prefix: one gradient, summed over batch, group and query positions.

Two deterministic stages and no atomics. The first cuts the query tiles of a KV head (all
sequences, all heads of the group) into a few parts; each program sums its part in registers and
stores one partial tile in fp32. The second adds the partials in a fixed order. The partials
[splits, Hkv, P, D] do not grow with the batch: see `tilings.splits`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tilings
from .arguments import (
    BatchTables,
    Dropout,
    KeyTile,
    Parts,
    PrefixSums,
    Rows,
    Saved,
    TileShape,
)
from .backward_dkv import key_gradients
from .blocks import additive, in_units, keys_in_use, load_tile, ranks, store_tile
from .problem import Problem
from .target import Tile

REDUCE_BLOCK = 1024


@triton.jit
def prefix_attn_bwd_dprefix_kernel(
    q, keys, masks, tables, parts, seed, saved, sums, s,
    sizes, n_tiles, row_tiles, split_tiles, scores, window, dropped, keep,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, BIAS_DIM: tl.constexpr, IN_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N positions of one prefix, one KV head, one part of the query tiles.

    `sums` are the partials, or with one split the result.
    With one prefix for all rows a part is `split_tiles` of the `row_tiles` tiles, and EVEN says
    that they are all whole. With several prefixes or packed sequences `parts` lists the tiles.
    """
    shape: tl.constexpr = TileShape(
        HEAD=HEAD, HEAD_V=HEAD_V, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N, PRECISION=PRECISION,
    )  # fmt: skip
    if UNIT != 1:
        s = in_units(s, UNIT)
    Hkv = sizes.Hkv
    Lq = sizes.Lq
    P = sizes.P
    i_tile = tl.program_id(0) % n_tiles
    i_h = (tl.program_id(0) // n_tiles % Hkv).to(tl.int64)
    i_split = tl.program_id(0) // n_tiles // Hkv
    total = Lq
    length = P
    i_first = 0
    if parts is not None:
        i_prefix = tl.load(parts.key_tiles + i_tile * 2)
        if i_prefix < 0:
            return
        i_tile = tl.load(parts.key_tiles + i_tile * 2 + 1)
        i_first = tl.load(tables.starts + i_prefix)
        P = tl.load(tables.starts + i_prefix + 1) - i_first
        t_first = tl.load(parts.bounds + i_prefix)
        t_end = tl.load(parts.bounds + i_prefix + 1)
        split_tiles = tl.cdiv(t_end - t_first, SPLITS)
        t_first += i_split * split_tiles
        t_end = tl.minimum(t_first + split_tiles, t_end)
        steps = tl.maximum(t_end - t_first, 0) * GROUP
    else:
        t_first = i_split * split_tiles
        t_end = tl.minimum(t_first + split_tiles, row_tiles)
        steps = t_end - t_first
    i_n = i_tile * BLOCK_N

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n + o_n < P
    o_start = tl.cast(i_first + i_n, tl.int64)
    p_k = keys.pk + (i_h * s.pkh + o_start * s.pkn) + (o_n[:, None] * s.pkn + o_d[None, :])
    p_v = keys.pv + (i_h * s.pvh + o_start * s.pvn) + (o_n[:, None] * s.pvn + o_dv[None, :])
    b_k = load_tile(p_k, m_n, o_d, HEAD, BLOCK_D, True)  # [BN, BD]
    b_v = load_tile(p_v, m_n, o_dv, HEAD_V, BLOCK_DV, True)  # [BN, BDV]
    tile = KeyTile(k=b_k, v=b_v, o=o_n, m=m_n)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    # Query tiles are numbered (sequence, head of the group, position); counters step through them
    # because dividing by the number of tiles per head would cost more than the rest of the step.
    m_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bg = t_first // m_tiles
    i_m = t_first % m_tiles * BLOCK_M
    p_q = q + i_h * GROUP * s.qh
    p_do = saved.do + i_h * GROUP * s.doh
    p_lse2 = saved.lse2 + i_h * GROUP * total
    p_delta = saved.delta + i_h * GROUP * total
    o_q = o_m[:, None] * s.qm + o_d[None, :]  # [BM, BD]
    o_do = o_m[:, None] * s.dom + o_dv[None, :]  # [BM, BDV]
    for i_x in tl.range(0, steps, 1):
        # of this sequence; not Lq and Lk themselves, which the loop would have to carry
        n_q = Lq
        n_k = sizes.Lk
        if parts is not None:
            p_entry = parts.query_tiles + (t_first + i_x // GROUP) * 2
            i_seq = tl.load(p_entry)
            i_m = tl.load(p_entry + 1) * BLOCK_M
            i_b = i_seq.to(tl.int64)
            i_g = i_x % GROUP
            i_start = 0
            if tables.cu is not None:
                i_b = i_b * 0
                i_start = tl.load(tables.cu + i_seq)
                n_q = tl.load(tables.cu + i_seq + 1) - i_start
                n_k = n_q
        else:
            i_seq = i_bg // GROUP
            i_b = i_seq.to(tl.int64)
            i_g = i_bg % GROUP
            i_start = 0
        i_token = (i_start + i_m).to(tl.int64)
        o_row = (i_b * Hkv * GROUP + i_g) * total + i_token
        i_head = i_h * GROUP + i_g
        o_low = None
        if IN_WINDOW:
            m_m = i_m + o_m < n_q
            n_k = keys_in_use(masks, s, i_b, n_k)
            o_low = P - i_n - window + 1 + ranks(tables.rank, i_b, i_m + o_m, m_m, n_q, n_k)
        b_shift = None
        p_rows = None
        if BIAS_DIM == 1:
            b_shift = additive(tl.load(masks.bias + i_head * s.bh))
        if BIAS_DIM == 3:
            p_rows = masks.bias + i_head * s.bh + o_start * s.bn
            p_rows += ((i_token + o_m) * s.bm)[None, :]
        b_dk, b_dv = key_gradients(
            b_dk, b_dv, tile,
            Rows(
                q=p_q + (i_b * s.qb + i_g * s.qh + i_token * s.qm) + o_q,
                do=p_do + (i_b * s.dob + i_g * s.doh + i_token * s.dom) + o_do,
                lse2=p_lse2 + o_row + o_m, delta=p_delta + o_row + o_m, m=i_m + o_m < n_q,
            ),
            p_rows, s.bn, b_shift, o_low, None, scores,
            Dropout(
                seed=seed, dropped=dropped, keep=keep, o_query=(i_m + o_m)[None, :],
                o_head=(i_seq * Hkv * GROUP + i_head).to(tl.int32),
            ),
            i_n + o_n, shape, not EVEN, sums.dpk is not None, sums.dpv is not None,
        )  # fmt: skip
        if parts is None:
            i_m += BLOCK_M
            i_bg = tl.where(i_m < Lq, i_bg, i_bg + 1)
            i_m = tl.where(i_m < Lq, i_m, 0)

    o_base = (i_split * Hkv + i_h) * length + o_start
    if sums.dpk is not None:
        o_tile = o_n[:, None] * HEAD + o_d[None, :]
        store_tile(sums.dpk + o_base * HEAD + o_tile, b_dk * scores.scale, m_n, o_d, HEAD, BLOCK_D)
    if sums.dpv is not None:
        o_tile = o_n[:, None] * HEAD_V + o_dv[None, :]
        store_tile(sums.dpv + o_base * HEAD_V + o_tile, b_dv, m_n, o_dv, HEAD_V, BLOCK_DV)


@triton.jit
def prefix_attn_bwd_dprefix_reduce_kernel(
    partial, grad, numel, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK elements of a prefix gradient, the splits added in order."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < numel
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_s in range(SPLITS):
        b_sum += tl.load(partial + i_s * numel + o_x, mask=m_x, other=0.0)
    tl.store(grad + o_x, b_sum.to(grad.dtype.element_ty), mask=m_x)


def dprefix_launches(
    problem: Problem,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad_prefix_key: Tensor | None,
    grad_prefix_value: Tensor | None,
    tables: BatchTables | None = None,
) -> list[launch.Launch]:
    """The launches that fill the (contiguous) prefix gradients that are not None, in order."""
    B, _, Hkv, Lq, _, P = problem.sizes
    tile = problem.tile("dprefix")
    if tables is None:  # one prefix for all rows needs no lists
        parts, starts, key_tiles = None, None, triton.cdiv(P, tile.keys)
        row_tiles = B * problem.group * triton.cdiv(Lq, tile.rows)
    else:
        parts = Parts(tables.key_tiles, tables.query_tiles, tables.bounds)
        starts, key_tiles = tables.starts, tables.key_tiles.shape[0]
        row_tiles = tables.query_tiles.shape[0]
    programs = Hkv * key_tiles
    splits = tilings.splits(programs, row_tiles, problem.target)
    split_tiles = triton.cdiv(row_tiles, splits)
    splits = triton.cdiv(row_tiles, split_tiles)
    results = [grad_prefix_key, grad_prefix_value]
    sums = results
    if splits > 1:
        sums = [
            None if grad is None
            else launch.scratch((splits, *grad.shape), grad.device)
            for grad in results
        ]  # fmt: skip
    own = {
        "keys": problem.arguments["keys"]._replace(k=None, v=None),
        "masks": problem.arguments["masks"]._replace(pad=None, mask=None, spans=None),
        "parts": parts, "tables": problem.tables(None, None)._replace(index=None, starts=starts),
        "saved": Saved(grad_out, lse2, delta), "sums": PrefixSums(*sums),
        "n_tiles": key_tiles, "row_tiles": row_tiles, "split_tiles": split_tiles,
        "s": problem.strides(grad_out, sequence=False),
    }  # fmt: skip
    even = starts is None and Lq % tile.rows == 0 and not problem.options.prefix_in_window
    constants = {"EVEN": even, "SPLITS": splits}
    launches = [
        problem.launch(prefix_attn_bwd_dprefix_kernel, programs * splits, tile, own, constants)
    ]
    if splits > 1:
        launches += [
            reduce_launch(partial, grad)
            for partial, grad in zip(sums, results, strict=True)
            if partial is not None and grad is not None
        ]
    return launches


def reduce_launch(partial: Tensor, grad: Tensor) -> launch.Launch:
    """The launch that adds the partials [splits, ...] of a prefix gradient up."""
    return launch.Launch(
        prefix_attn_bwd_dprefix_reduce_kernel,
        (triton.cdiv(grad.numel(), REDUCE_BLOCK),),
        {"partial": partial, "grad": grad, "numel": grad.numel()},
        {"SPLITS": partial.shape[0], "BLOCK": REDUCE_BLOCK},
        Tile(rows=1, keys=REDUCE_BLOCK, warps=4, stages=1),
    )
