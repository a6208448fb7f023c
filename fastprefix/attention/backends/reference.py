"""The yardstick: prefix attention in plain PyTorch, scores materialised, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Additive masks say "do not attend" with -inf or with the most negative number of their dtype.
MASKED = -1e30


def visible(
    query_length: int,
    key_length: int,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    device: torch.device,
) -> Tensor:
    """Which sequence keys a query sees: bool, broadcastable to [B, Hkv, g, Lq, Lk]."""
    seen = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    if is_causal:
        seen = seen.tril(key_length - query_length)
    seen = seen[None, None, None]
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None, None, :]
    return seen


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over [prefix ; sequence], in the query's dtype throughout.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D]; P may be 0.
        prefix_value: [Hkv, P, Dv].
        key_padding_mask: [B, Lk] bool, True = real token, or None.
        attn_mask: bool (True = attend) or additive, broadcastable to [B, Hq, Lq, Lk], or None;
            additive values of -1e30 or less hide the key.
        is_causal: query i sees sequence keys 0 .. i + Lk - Lq.
        scale: factor on the scores.

    Returns:
        out [B, Hq, Lq, Dv] and its log-sum-exp (natural log) [B, Hq, Lq] in float32 (float64 for
        float64 inputs). Rows that see nothing: zeros and -inf.
    """
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    P = prefix_key.shape[1]
    grouped = query.reshape(B, Hkv, Hq // Hkv, Lq, D)
    prefix_scores = torch.einsum("bhgqd,hpd->bhgqp", grouped, prefix_key)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, key)
    seen = visible(Lq, Lk, key_padding_mask, is_causal, query.device)
    scores = (scores * scale).masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        mask = attn_mask.expand(B, Hq, Lq, Lk).reshape(B, Hkv, Hq // Hkv, Lq, Lk)
        if mask.dtype is torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.to(scores.dtype).masked_fill(mask <= MASKED, float("-inf"))
    scores = torch.cat([prefix_scores * scale, scores], dim=-1)
    # Rows that see nothing: a finite stand-in for their maximum of -inf, and 1 for their sum of 0.
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(1)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.detach().log()).squeeze(-1)
    weights = weights / total.masked_fill(total == 0, 1.0)
    out = torch.einsum("bhgqp,hpd->bhgqd", weights[..., :P], prefix_value)
    out = out + torch.einsum("bhgqk,bhkd->bhgqd", weights[..., P:], value)
    lse_dtype = torch.promote_types(lse.dtype, torch.float32)
    return out.reshape(B, Hq, Lq, value.shape[-1]), lse.reshape(B, Hq, Lq).to(lse_dtype)
