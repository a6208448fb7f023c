"""The public function: checks, the choice of a backend, the call."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from fastprefix.attention import checks
from fastprefix.attention.backends import reference
from fastprefix.attention.op import prefix_attention_op
from fastprefix.attention.selection import choose

BackendName = Literal["auto", "reference", "composed", "triton"]


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = ...,
    prefix_value: Tensor | None = ...,
    *,
    prefix_index: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    prefix_bias: Tensor | None = ...,
    prefix_in_window: bool = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = ...,
    prefix_value: Tensor | None = ...,
    *,
    prefix_index: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    prefix_bias: Tensor | None = ...,
    prefix_in_window: bool = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    prefix_in_window: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over [prefix ; sequence] with one copy of the prefix for all rows.

    The result is that of concatenating the prefix to every row's keys and values. All queries see
    all of the prefix; causality and masks concern the sequence part alone. Differentiable in
    query, key, value, prefix_key and prefix_value; the prefix's gradient comes summed over rows.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv (GQA, MQA). Never repeated.
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D], shared by all rows; P may be 0. None for no prefix.
        prefix_value: [Hkv, P, Dv], or None.
        prefix_index: not supported yet (several prefixes in one batch).
        prefix_lengths: not supported yet.
        attn_mask: bool (True = attend) or additive (in the query's dtype or float32),
            broadcastable to [B, Hq, Lq, Lk]; for the sequence part only. Additive values of
            -1e30 or less hide the key. No gradient.
        key_padding_mask: bool [B, Lk], True = real token; any pattern.
        cu_seqlens: not supported yet.
        dropout_p: not supported yet, other than 0.
        is_causal: query i sees sequence keys 0 .. i + Lk - Lq. Unlike in SDPA this aligns to the
            end (a KV cache), and combines with attn_mask.
        scale: factor on the scores; 1 / sqrt(D) if None.
        sliding_window: not supported yet.
        softcap: not supported yet.
        sinks: not supported yet.
        prefix_bias: not supported yet.
        prefix_in_window: not supported yet.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", "reference", "composed" or "triton"; see
            :mod:`fastprefix.attention.selection`. A named backend never falls back.

    Returns:
        [B, Hq, Lq, Dv]; rows that see nothing are zeros. With ``return_lse`` also the natural
        log-sum-exp [B, Hq, Lq] in float32 (float64 for float64 inputs), -inf for rows that see
        nothing; no gradient flows through it.

    Raises:
        ValueError: a shape, device, mask or length does not fit; the message names the argument.
        TypeError: not a tensor, or a dtype does not fit.
        NotImplementedError: an argument that no backend supports yet.
        RuntimeError: the backend cannot do what the call needs; the message names those that can.

    Example:
        >>> import torch
        >>> from fastprefix import prefix_attention
        >>> q, k, v = torch.randn(3, 8, 12, 10, 64).unbind()
        >>> prefix_key, prefix_value = torch.randn(2, 12, 32, 64).unbind()
        >>> prefix_attention(q, k, v, prefix_key, prefix_value, is_causal=True).shape
        torch.Size([8, 12, 10, 64])
    """
    checks.refuse_unbuilt(
        prefix_index=prefix_index,
        prefix_lengths=prefix_lengths,
        cu_seqlens=cu_seqlens,
        dropout_p=dropout_p,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        prefix_bias=prefix_bias,
        prefix_in_window=prefix_in_window,
    )
    checks.check_sequence(query, key, value)
    if (prefix_key is None) != (prefix_value is None):
        raise ValueError("prefix_key, prefix_value: got one of the two, takes both or neither")
    if prefix_key is None or prefix_value is None:
        prefix_key = key.new_empty(key.shape[1], 0, key.shape[3])
        prefix_value = value.new_empty(value.shape[1], 0, value.shape[3])
    checks.check_prefix(query, value, prefix_key, prefix_value)
    checks.check_key_padding_mask(key_padding_mask, query, key)
    checks.check_attn_mask(attn_mask, query, key)
    checks.check_causal(is_causal, query, key)
    D, Dv = query.shape[-1], value.shape[-1]
    if scale is None:
        scale = 1.0 / math.sqrt(D)
    elif not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, takes a finite number")

    features = set()
    if attn_mask is not None:
        features.add("attn_mask")
    if Dv != D:
        features.add("D != Dv")
    name, _ = choose(backend, query.device.type, query.dtype, frozenset(features), max(D, Dv))
    inputs = (query, key, value, prefix_key, prefix_value, key_padding_mask, attn_mask)
    if name == "reference":
        out, lse = reference.forward(*inputs, is_causal=is_causal, scale=scale)
    else:
        out, lse = prefix_attention_op(*inputs, is_causal, float(scale), name)
    return (out, lse.detach()) if return_lse else out
