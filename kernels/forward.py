"""Forward: softmax attention of packed query rows over [prefix ; sequence], in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .blocks import LN2, LOG2E, LOWEST, causal_range, load_tile, packed_rows, store_tile


@triton.jit
def fwd_sweep(
    b_acc, b_max, b_sum, b_q,
    p_k, p_v, p_pad, s_kn, s_vn, s_pn,
    lo, hi, length, o_limit, scale_log2, o_d,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUND: tl.constexpr, PRESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the keys lo .. hi of one source; row i sees key n if n < o_limit[i].

    p_k, p_v, p_pad are scalars, the source's first key. With BOUND False all the keys exist and
    all the rows see them: nothing is tested.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_k = o_n[:, None] * s_kn + o_d[None, :]  # [BN, BD]
    o_v = o_n[:, None] * s_vn + o_d[None, :]  # [BN, BD]
    for i_n in tl.range(lo, hi, BLOCK_N):
        m_n = i_n + o_n < length
        o_start = tl.cast(i_n, tl.int64)
        b_k = load_tile(p_k + o_start * s_kn + o_k, m_n, o_d, HEAD, BLOCK_D, BOUND)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PRESCALE:
            b_s *= scale_log2
        if BOUND:
            b_s = tl.where((i_n + o_n)[None, :] < o_limit, b_s, float("-inf"))
        if p_pad is not None:
            if BOUND:
                m_pad = tl.load(p_pad + o_start * s_pn + o_n * s_pn, mask=m_n, other=0) != 0
            else:
                m_pad = tl.load(p_pad + o_start * s_pn + o_n * s_pn) != 0
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
        b_v = load_tile(p_v + o_start * s_vn + o_v, m_n, o_d, HEAD, BLOCK_D, BOUND)  # [BN, BD]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit
def prefix_attn_fwd_kernel(
    q, k, v, pk, pv, pad, out, lse,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    s_pkh, s_pkn, s_pvh, s_pvn, s_pb, s_pn,
    Hkv, Lq, Lk, P, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr, PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M packed rows of one KV head of one sequence."""
    n_tiles = tl.cdiv(GROUP * Lq, BLOCK_M)
    i_bh = tl.program_id(0) // n_tiles
    i_tile = tl.program_id(0) % n_tiles
    if CAUSAL:
        # The last rows see the most keys: start them first.
        i_tile = n_tiles - 1 - i_tile
    i_b = (i_bh // Hkv).to(tl.int64)
    i_h = (i_bh % Hkv).to(tl.int64)

    o_d = tl.arange(0, BLOCK_D)
    o_g, o_q, m_r = packed_rows(i_tile, Lq, GROUP, BLOCK_M)
    o_head = i_h * GROUP + o_g
    p_q = q + i_b * s_qb + o_head * s_qh + o_q.to(tl.int64) * s_qm
    b_q = load_tile(p_q[:, None] + o_d[None, :], m_r, o_d, HEAD, BLOCK_D, True)  # [BM, BD]

    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    scale_log2 = scale * LOG2E

    # Prefix: whole tiles, then its tail. Nothing is causal and nothing is padding here.
    p_k = pk + i_h * s_pkh
    p_v = pv + i_h * s_pvh
    n_whole = P // BLOCK_N * BLOCK_N
    b_acc, b_max, b_sum = fwd_sweep(
        b_acc, b_max, b_sum, b_q, p_k, p_v, None, s_pkn, s_pvn, 0,
        0, n_whole, P, P, scale_log2, o_d,
        HEAD, BLOCK_D, BLOCK_N, False, PRESCALE, PRECISION,
    )  # fmt: skip
    b_acc, b_max, b_sum = fwd_sweep(
        b_acc, b_max, b_sum, b_q, p_k, p_v, None, s_pkn, s_pvn, 0,
        n_whole, P, P, P, scale_log2, o_d,
        HEAD, BLOCK_D, BLOCK_N, True, PRESCALE, PRECISION,
    )  # fmt: skip

    # Sequence: tiles that all rows see whole, then the diagonal and the tail.
    p_k = k + i_b * s_kb + i_h * s_kh
    p_v = v + i_b * s_vb + i_h * s_vh
    p_pad = pad
    if pad is not None:
        p_pad = pad + i_b * s_pb
    if CAUSAL:
        n_all, n_any = causal_range(i_tile, Lq, Lk, GROUP, BLOCK_M)
        o_limit = tl.minimum(o_q + 1 + Lk - Lq, Lk)[:, None]
    else:
        n_all, n_any, o_limit = Lk, Lk, Lk
    n_whole = n_all // BLOCK_N * BLOCK_N
    b_acc, b_max, b_sum = fwd_sweep(
        b_acc, b_max, b_sum, b_q, p_k, p_v, p_pad, s_kn, s_vn, s_pn,
        0, n_whole, Lk, o_limit, scale_log2, o_d,
        HEAD, BLOCK_D, BLOCK_N, False, PRESCALE, PRECISION,
    )  # fmt: skip
    b_acc, b_max, b_sum = fwd_sweep(
        b_acc, b_max, b_sum, b_q, p_k, p_v, p_pad, s_kn, s_vn, s_pn,
        n_whole, n_any, Lk, o_limit, scale_log2, o_d,
        HEAD, BLOCK_D, BLOCK_N, True, PRESCALE, PRECISION,
    )  # fmt: skip

    m_some = b_sum > 0.0
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_out = b_acc / b_sum[:, None]
    b_lse = tl.where(m_some, (b_max + tl.math.log2(b_sum)) * LN2, float("-inf"))
    # out and lse are contiguous, so packed rows lie end to end: no division outlives the loops.
    o_r = tl.arange(0, BLOCK_M)
    m_r = i_tile * BLOCK_M + o_r < GROUP * Lq
    row = (i_b * Hkv + i_h) * GROUP * Lq + i_tile * BLOCK_M
    p_out = out + row * HEAD + (o_r[:, None] * HEAD + o_d[None, :])
    store_tile(p_out, b_out, m_r, o_d, HEAD, BLOCK_D)
    tl.store(lse + row + o_r, b_lse, mask=m_r)


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    target: launch.Target,
) -> launch.Launch:
    """The launch that fills the contiguous `out` and `lse`."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    tile = launch.choose("forward", target, D, query.dtype, rows=Hq // Hkv * Lq)
    return launch.Launch(
        prefix_attn_fwd_kernel,
        (triton.cdiv(Hq // Hkv * Lq, tile.rows) * B * Hkv,),
        dict(
            q=query, k=key, v=value, pk=prefix_key, pv=prefix_value, pad=key_padding_mask,
            out=out, lse=lse,
            **launch.strides(q=query, k=key, v=value, pk=prefix_key, pv=prefix_value),
            **launch.mask_strides(key_padding_mask),
            Hkv=Hkv, Lq=Lq, Lk=Lk, P=prefix_key.shape[1], scale=scale,
        ),
        {
            "GROUP": Hq // Hkv, "HEAD": D, "CAUSAL": is_causal,
            # The maximum of the scaled scores is the scaled maximum only for a positive scale.
            "PRESCALE": not scale > 0,
            "PRECISION": launch.dot_precision(query.dtype),
            "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": launch.block_size(D),
        },
        tile,
    )  # fmt: skip


def prefix_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over [prefix ; sequence], the prefix shared by all rows of the batch.

    Args:
        query: [B, Hq, Lq, D], fp32, bf16 or fp16; D from 1 to 256. Any strides, here and below.
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Lk, D].
        prefix_key: [Hkv, P, D]; P may be 0.
        prefix_value: [Hkv, P, D].
        key_padding_mask: [B, Lk] bool, True = real token, or None.
        is_causal: query i sees the sequence keys 0 .. i + Lk - Lq.
        scale: factor on the scores.

    Returns:
        out [B, Hq, Lq, D] in the query's dtype and the log-sum-exp (natural log) [B, Hq, Lq] in
        float32. Rows that see nothing: zeros and -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    launch.check(query, key, value, prefix_key, prefix_value, key_padding_mask)
    query, key, value, prefix_key, prefix_value = launch.rows_contiguous(
        query, key, value, prefix_key, prefix_value
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel():
        forward_launch(
            query, key, value, prefix_key, prefix_value, key_padding_mask, out, lse,
            is_causal=is_causal, scale=scale, target=launch.target_of(query.device),
        ).run()  # fmt: skip
    return out, lse
