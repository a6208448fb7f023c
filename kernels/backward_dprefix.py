"""Backward for the shared prefix: one gradient, summed over batch, group and query positions.

Two deterministic stages and no atomics. The first cuts the query tiles of a KV head (all
sequences, all heads of the group) into a few parts; each program sums its part in registers and
stores one partial tile in fp32. The second adds the partials in a fixed order. The partials
[splits, Hkv, P, D] do not grow with the batch: see `launch.splits`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .backward_dkv import key_gradients
from .blocks import LOG2E, load_tile, store_tile

REDUCE_BLOCK = 1024


@triton.jit
def prefix_attn_bwd_dprefix_kernel(
    q, pk, pv, do, lse, delta, dpk, dpv,
    s_qb, s_qh, s_qm, s_pkh, s_pkn, s_pvh, s_pvn, s_dob, s_doh, s_dom,
    Hkv, Lq, P, row_tiles, split_tiles, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N prefix positions of one KV head and `split_tiles` query tiles.

    dpk, dpv [splits, Hkv, P, D] (None: not needed) are the partials, or with one split the result.
    EVEN: every query tile is whole.
    """
    n_tiles = tl.cdiv(P, BLOCK_N)
    i_n = tl.program_id(0) % n_tiles * BLOCK_N
    i_h = (tl.program_id(0) // n_tiles % Hkv).to(tl.int64)
    i_split = tl.program_id(0) // n_tiles // Hkv

    o_d = tl.arange(0, BLOCK_D)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n + o_n < P
    o_start = i_n.to(tl.int64)
    p_k = pk + (i_h * s_pkh + o_start * s_pkn) + (o_n[:, None] * s_pkn + o_d[None, :])
    p_v = pv + (i_h * s_pvh + o_start * s_pvn) + (o_n[:, None] * s_pvn + o_d[None, :])
    b_k = load_tile(p_k, m_n, o_d, HEAD, BLOCK_D, True)  # [BN, BD]
    b_v = load_tile(p_v, m_n, o_d, HEAD, BLOCK_D, True)  # [BN, BD]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    scale_log2 = scale * LOG2E

    # Query tiles are numbered (sequence, head of the group, position); counters step through them
    # because dividing by the number of tiles per head would cost more than the rest of the step.
    t_first = i_split * split_tiles
    t_end = tl.minimum(t_first + split_tiles, row_tiles)
    m_tiles = tl.cdiv(Lq, BLOCK_M)
    i_bg = t_first // m_tiles
    i_m = t_first % m_tiles * BLOCK_M
    o_q = o_m[:, None] * s_qm + o_d[None, :]  # [BM, BD]
    o_do = o_m[:, None] * s_dom + o_d[None, :]  # [BM, BD]
    for _ in tl.range(t_first, t_end, 1):
        i_b = (i_bg // GROUP).to(tl.int64)
        i_head = i_h * GROUP + i_bg % GROUP
        o_row = (i_b * Hkv * GROUP + i_head) * Lq + i_m
        b_dk, b_dv = key_gradients(
            b_dk, b_dv, b_k, b_v,
            q + (i_b * s_qb + i_head * s_qh + i_m.to(tl.int64) * s_qm) + o_q,
            do + (i_b * s_dob + i_head * s_doh + i_m.to(tl.int64) * s_dom) + o_do,
            lse + o_row + o_m, delta + o_row + o_m,
            i_m + o_m < Lq, o_d, o_n, o_m, scale_log2,
            HEAD, BLOCK_D, not EVEN, False, dpk is not None, dpv is not None, PRECISION,
        )  # fmt: skip
        i_m += BLOCK_M
        i_bg = tl.where(i_m < Lq, i_bg, i_bg + 1)
        i_m = tl.where(i_m < Lq, i_m, 0)

    o_base = ((i_split * Hkv + i_h) * P + i_n) * HEAD
    o_tile = o_n[:, None] * HEAD + o_d[None, :]
    if dpk is not None:
        store_tile(dpk + o_base + o_tile, b_dk * scale, m_n, o_d, HEAD, BLOCK_D)
    if dpv is not None:
        store_tile(dpv + o_base + o_tile, b_dv, m_n, o_d, HEAD, BLOCK_D)


@triton.jit
def prefix_attn_bwd_dprefix_reduce_kernel(
    partial_k, partial_v, dpk, dpv, numel, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK elements of the prefix gradients, the splits added in order."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < numel
    if dpk is not None:
        b_dk = tl.zeros([BLOCK], dtype=tl.float32)
        for i_s in range(SPLITS):
            b_dk += tl.load(partial_k + i_s * numel + o_x, mask=m_x, other=0.0)
        tl.store(dpk + o_x, b_dk.to(dpk.dtype.element_ty), mask=m_x)
    if dpv is not None:
        b_dv = tl.zeros([BLOCK], dtype=tl.float32)
        for i_s in range(SPLITS):
            b_dv += tl.load(partial_v + i_s * numel + o_x, mask=m_x, other=0.0)
        tl.store(dpv + o_x, b_dv.to(dpv.dtype.element_ty), mask=m_x)


def dprefix_launches(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_prefix_key: Tensor | None,
    grad_prefix_value: Tensor | None,
    *,
    scale: float,
    target: launch.Target,
) -> list[launch.Launch]:
    """The launches that fill the (contiguous) prefix gradients that are not None, in order."""
    B, Hq, Lq, D = query.shape
    Hkv, P, _ = prefix_key.shape
    tile = launch.choose("dprefix", target, D, query.dtype, rows=Lq)
    row_tiles = B * (Hq // Hkv) * triton.cdiv(Lq, tile.rows)
    programs = Hkv * triton.cdiv(P, tile.keys)
    splits = launch.splits(programs, row_tiles, target)
    split_tiles = triton.cdiv(row_tiles, splits)
    splits = triton.cdiv(row_tiles, split_tiles)
    results = [grad_prefix_key, grad_prefix_value]
    sums = results
    if splits > 1:
        shape = (splits, Hkv, P, D)
        sums = [
            None if grad is None else torch.empty(shape, dtype=torch.float32, device=query.device)
            for grad in results
        ]
    launches = [
        launch.Launch(
            prefix_attn_bwd_dprefix_kernel,
            (programs * splits,),
            dict(
                q=query, pk=prefix_key, pv=prefix_value, do=grad_out, lse=lse, delta=delta,
                dpk=sums[0], dpv=sums[1],
                **launch.strides(q=query, pk=prefix_key, pv=prefix_value, do=grad_out),
                Hkv=Hkv, Lq=Lq, P=P, row_tiles=row_tiles, split_tiles=split_tiles, scale=scale,
            ),
            {
                "GROUP": Hq // Hkv, "HEAD": D, "EVEN": Lq % tile.rows == 0,
                "PRECISION": launch.dot_precision(query.dtype),
                "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": launch.block_size(D),
            },
            tile,
        )
    ]  # fmt: skip
    if splits > 1:
        launches.append(
            launch.Launch(
                prefix_attn_bwd_dprefix_reduce_kernel,
                (triton.cdiv(Hkv * P * D, REDUCE_BLOCK),),
                {
                    "partial_k": sums[0], "partial_v": sums[1],
                    "dpk": grad_prefix_key, "dpv": grad_prefix_value, "numel": Hkv * P * D,
                },
                {"SPLITS": splits, "BLOCK": REDUCE_BLOCK},
                launch.Tile(rows=1, keys=REDUCE_BLOCK, warps=4, stages=1),
            )
        )  # fmt: skip
    return launches
