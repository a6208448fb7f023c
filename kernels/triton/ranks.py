"""The real tokens before each query, where a prefix slides out of a window behind padding."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .arguments import strides
from .target import Tile

CHUNK = 1024  # tokens that a step of the kernel counts


@triton.jit(do_not_specialize=["Lq", "Lk", "s_pb"])
def prefix_attn_ranks_kernel(
    pad, lengths, rank, s_pb, s_pn, s_lb, Lq, Lk, CHUNK: tl.constexpr
):  # fmt: skip
    """One program: the ranks of the queries of one sequence, its last Lq tokens in use."""
    i_b = tl.program_id(0).to(tl.int64)
    n = Lk
    if lengths is not None:
        n = tl.minimum(tl.maximum(tl.load(lengths + i_b * s_lb), 0), Lk)
    o_x = tl.arange(0, CHUNK)
    for i_x in tl.range(0, Lq - n, CHUNK):  # queries before the first token
        o_q = i_x + o_x
        tl.store(rank + i_b * Lq + o_q, tl.zeros([CHUNK], tl.int32), mask=o_q < Lq - n)
    before = tl.cast(0, tl.int32)
    for i_x in tl.range(0, n, CHUNK):
        o_k = i_x + o_x
        p_pad = pad + i_b * s_pb + o_k.to(tl.int64) * s_pn
        real = (tl.load(p_pad, mask=o_k < n, other=0) != 0).to(tl.int32)
        o_q = o_k + Lq - n
        counted = before + tl.cumsum(real, 0) - real
        tl.store(rank + i_b * Lq + o_q, counted, mask=(o_k < n) & (o_q >= 0))
        before += tl.sum(real, 0)


def ranks_launch(
    key_padding_mask: Tensor, key_lengths: Tensor | None, rank: Tensor
) -> launch.Launch:
    """The launch that fills `rank` [B, Lq] int32: how many real tokens come before each query.

    The queries are the last Lq tokens, or of a buffer the last ones in use. Those before the first
    token have none before them.

    Args:
        key_padding_mask: [B, Lk], True for real tokens.
        key_lengths: [B], how many of the Lk tokens are in use; None for all.
        rank: contiguous.
    """
    s = strides(pad=key_padding_mask, lengths=key_lengths)
    (B, Lk), Lq = key_padding_mask.shape, rank.shape[1]
    return launch.Launch(
        prefix_attn_ranks_kernel,
        (B,),
        {
            "pad": key_padding_mask, "lengths": key_lengths, "rank": rank, "s_pb": s.pb,
            "s_pn": s.pn, "s_lb": s.lb, "Lq": Lq, "Lk": Lk,
        },
        {"CHUNK": CHUNK},
        Tile(rows=1, keys=CHUNK, warps=4, stages=1),
    )  # fmt: skip
