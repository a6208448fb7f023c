"""Calls with one prefix, one sequence a row, and masks: two flash calls and a merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprefix.attention.backends.composed.flash import (
    FLOOR,
    fold_rows,
    hiding,
    merge,
    unfold_rows,
)
from fastprefix.attention.backends.composed.kernels import equal_head_sizes, kernels_of
from fastprefix.attention.backends.composed.seen import ALL, Seen
from fastprefix.attention.backends.composed.sequence import SequencePart
from fastprefix.options import Options


def is_plain(options: Options) -> bool:
    """Whether one prefix, one sequence a row and the masks are all there is."""
    return (
        options.key_lengths is None
        and options.prefix_lengths is None
        and options.cu_seqlens is None
        and options.sliding_window is None
        and options.sinks is None
        and options.prefix_bias is None
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The forward of :func:`is_plain` calls."""
    masks, scale = (options.key_padding_mask, options.attn_mask), options.scale
    masked = options.key_padding_mask is not None or options.attn_mask is not None
    Dv = value.shape[-1]
    query, key, value, prefix_key, prefix_value = equal_head_sizes(
        query, key, value, prefix_key, prefix_value
    )
    B, Hq, Lq, _ = query.shape
    P, Lk = prefix_key.shape[1], key.shape[2]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if query.numel() == 0 or P + Lk == 0:
        lse = torch.full((B, Hq, Lq), float("-inf"), dtype=lse_dtype, device=query.device)
        return query.new_zeros(B, Hq, Lq, Dv), lse
    if Lq == 1 and P > 0 and Lk > 0 and options.attn_mask is None:
        inputs = (query, key, value, prefix_key, prefix_value)
        out, lse = _decode(*inputs, options.key_padding_mask, scale)
        return (out if out.shape[-1] == Dv else out[..., :Dv]), lse

    attend = kernels_of(query).forward
    if Lk > 0:
        part = SequencePart(query, key, *masks, options.is_causal)
        out, lse = attend(part.fold(query), part.keys(key), part.keys(value), scale, part.seen)
        out, lse = part.unfold(out), part.unfold(lse)
    if P > 0:
        Hkv = prefix_key.shape[0]
        prefix_out, prefix_lse = attend(
            fold_rows(query, Hkv), prefix_key[None], prefix_value[None], scale, ALL
        )
        prefix_out = unfold_rows(prefix_out, query.shape)
        prefix_lse = unfold_rows(prefix_lse, query.shape[:3])
        if Lk == 0:
            out, lse = prefix_out, prefix_lse
        else:
            out, lse = merge(out, lse, prefix_out, prefix_lse)
    elif masked:
        blind = lse < FLOOR / 2
        out = out.masked_fill(blind[..., None], 0.0)
        lse = lse.masked_fill(blind, float("-inf"))
    return out[..., :Dv], lse


# One token of each row, few bytes: two kernel calls and their merge cost some 100 microseconds that
# do not grow with the work. Up to this many bytes of keys and values one call on copies of them is
# faster, and at twice as many it is not (an EPYC with AVX2 alone, SmolLM2's heads: 1.2 to 1.8 times
# as fast at 64 to 516 KB, 0.8 to 1 times at 0.9 to 1 MB). The copies live as long as the call.
_ONE_CALL_BYTES = 1 << 19


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    padding: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query per row: the general path's result in fewer small steps.

    A generated token calls this once a layer, where each PyTorch call costs about as much as the
    arithmetic; the flash calls should be most of what is left.
    """
    B, Hq, _, D = query.shape
    Hkv, P, _ = prefix_key.shape
    kernel = kernels_of(query)
    grouped = query.reshape(B, Hkv, Hq // Hkv, D)
    seen = ALL if padding is None else Seen(mask=hiding(padding, query.dtype))
    if (
        kernel.copies_small
        and 2 * B * Hkv * (P + key.shape[2]) * D * key.itemsize <= _ONE_CALL_BYTES
    ):
        if seen.mask is not None:
            seen = Seen(mask=F.pad(seen.mask, (P, 0)))
        key = torch.cat((prefix_key.expand(B, -1, -1, -1), key), dim=2)
        value = torch.cat((prefix_value.expand(B, -1, -1, -1), value), dim=2)
        out, lse = kernel.forward(grouped, key, value, scale, seen)
        return out.reshape(query.shape), lse.reshape(B, Hq, 1)
    out, lse = kernel.forward(grouped, key, value, scale, seen)
    rows = grouped if B == 1 else grouped.transpose(0, 1).reshape(1, Hkv, -1, D)
    prefix_out, prefix_lse = kernel.forward(rows, prefix_key[None], prefix_value[None], scale, ALL)
    if B > 1:
        prefix_out = prefix_out.reshape(Hkv, B, -1, D).transpose(0, 1)
        prefix_lse = prefix_lse.reshape(Hkv, B, -1).transpose(0, 1)
    out, lse = merge(out, lse, prefix_out, prefix_lse)
    return out.reshape(query.shape), lse.reshape(B, Hq, 1)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The backward of :func:`is_plain` calls: five gradients."""
    masks, scale = (options.key_padding_mask, options.attn_mask), options.scale
    D, Dv = query.shape[-1], value.shape[-1]
    query, key, value, prefix_key, prefix_value, out, grad_out = equal_head_sizes(
        query, key, value, prefix_key, prefix_value, out, grad_out
    )
    P, Lk = prefix_key.shape[1], key.shape[2]
    inputs = (query, key, value, prefix_key, prefix_value)
    if query.numel() == 0 or P + Lk == 0:
        return tuple(
            torch.zeros_like(x)[..., :width] if need else None
            for x, width, need in zip(inputs, (D, D, Dv, D, Dv), needs, strict=True)
        )
    need_query, need_key, need_value, need_prefix_key, need_prefix_value = needs
    # a row that saw nothing: exp(score - inf) = 0 gives zero gradients
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))

    gradients = kernels_of(query).backward
    dq: Tensor | None = None
    dk = torch.zeros_like(key) if need_key else None
    dv = torch.zeros_like(value) if need_value else None
    if Lk > 0 and (need_query or need_key or need_value):
        part = SequencePart(query, key, *masks, options.is_causal)
        dq, dk, dv = gradients(
            part.fold(grad_out), part.fold(query), part.keys(key), part.keys(value),
            part.fold(out), part.fold(lse), scale, part.seen,
        )  # fmt: skip
        dq, dk, dv = part.unfold(dq), part.sum_keys(dk), part.sum_keys(dv)
    dpk = torch.zeros_like(prefix_key) if need_prefix_key else None
    dpv = torch.zeros_like(prefix_value) if need_prefix_value else None
    if P > 0 and (need_query or need_prefix_key or need_prefix_value):
        Hkv = prefix_key.shape[0]
        dq_prefix, dpk, dpv = gradients(
            fold_rows(grad_out, Hkv), fold_rows(query, Hkv), prefix_key[None], prefix_value[None],
            fold_rows(out, Hkv), fold_rows(lse, Hkv), scale, ALL,
        )  # fmt: skip
        dq_prefix = unfold_rows(dq_prefix, query.shape)
        dq = dq_prefix if dq is None else dq.add_(dq_prefix)
        dpk, dpv = dpk[0], dpv[0]
    widths = (D, D, Dv, D, Dv)
    return tuple(
        grad[..., :width].to(query.dtype) if need and grad is not None else None
        for grad, width, need in zip((dq, dk, dv, dpk, dpv), widths, needs, strict=True)
    )
