"""Attention in plain steps, in the dtype of its tensors; it shares no code with the library.

:func:`softmax_attention` is what a textbook has. :func:`concatenated_attention` does on top of it
what the contract of the operator promises, in the most literal way: it copies the prefix to every
row, concatenates, and writes out what each query sees. ``calls.attention_by_rows`` goes query by
query instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e30  # a bias of at most this hides its key


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    sees: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Lq, Dv] and natural log-sum-exp [B, Hq, Lq] without a gradient.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D]; repeated for the query heads of a group.
        value: [B, Hkv, Lk, Dv].
        bias: added to the scores, broadcastable to [B, Hq, Lq, Lk].
        sees: of the same shape, True where a query sees a key. Queries that see nothing get zeros.
        scale: of the scores; 1 / sqrt(D) if None.
        softcap: caps the scores before the bias is added.
        sinks: [Hq], a score in each head without a value.
    """
    B, Hq, Lq, D = query.shape
    key, value = (x.repeat_interleave(Hq // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + (bias if sees is None else bias.masked_fill(~sees, 0.0))
    if sees is not None:
        # A softmax over nothing is NaN: let such rows see everything, then take their weights away.
        some = sees.any(-1, keepdim=True)
        lse = scores.detach().masked_fill(~sees, float("-inf")).logsumexp(-1)
    else:
        lse = scores.detach().logsumexp(-1)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(B, -1, Lq, 1)
        lse = torch.logaddexp(lse, column.detach()[..., 0])
        scores = torch.cat([scores, column], -1)
        if sees is not None:
            sees = torch.nn.functional.pad(sees.expand(B, Hq, Lq, -1), (0, 1), value=True)
            some = torch.ones_like(some)
    if sees is not None:
        scores = scores.masked_fill(~sees & some, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if sees is not None:
        weights = weights * some
    return weights[..., : key.shape[2]] @ value, lse


def concatenated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp of :func:`fastprefix.prefix_attention`, by concatenation.

    For the options above; `prefix_bias` is [Hq].
    """
    B, Hq, Lq, _ = query.shape
    Lk, P = key.shape[2], 0
    lengths = torch.full((B,), Lk) if key_lengths is None else key_lengths.long()
    used = torch.arange(Lk) < lengths[:, None]
    key, value = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (key, value))
    if prefix_key is not None and prefix_value is not None:
        P = prefix_key.shape[1]
        key = torch.cat([prefix_key.expand(B, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.expand(B, -1, -1, -1), value], dim=2)

    sees = torch.ones(B, Hq, Lq, P + Lk, dtype=torch.bool)
    bias = torch.zeros(B, Hq, Lq, P + Lk, dtype=query.dtype)
    if prefix_index is not None and prefix_lengths is not None:
        numbers = torch.arange(len(prefix_lengths)).repeat_interleave(prefix_lengths.long())
        sees[..., :P] &= (numbers == prefix_index[:, None])[:, None, None]
    if prefix_bias is not None:
        column = prefix_bias.to(query.dtype)[:, None, None]
        bias = torch.cat([bias[..., :P] + column, bias[..., P:]], -1)
    sees[..., P:] &= used[:, None, None]
    newest = torch.arange(Lq)[:, None] + (lengths - Lq)[:, None, None, None]
    behind = newest - torch.arange(Lk)  # [B, 1, Lq, Lk]
    if is_causal:
        sees[..., P:] &= behind >= 0
    if sliding_window is not None:
        sees[..., P:] &= behind.abs() < sliding_window
    if key_padding_mask is not None:
        sees[..., P:] &= key_padding_mask[:, None, None, :]
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        sees[..., P:] &= attn_mask
    elif attn_mask is not None:
        bias = torch.cat([bias[..., :P], bias[..., P:] + attn_mask.to(query.dtype)], -1)
    sees &= bias.double() > HIDDEN
    return softmax_attention(
        query, key, value, bias=bias, sees=sees, scale=scale, softcap=softcap, sinks=sinks
    )
