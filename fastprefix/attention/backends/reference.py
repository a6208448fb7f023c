"""The yardstick: prefix attention in plain PyTorch, with materialised scores, in any dtype.

Half-precision inputs are computed in float32, like the sums of the fused backends; only the output
and the gradients are rounded. Autograd computes every gradient. Packed prefixes and packed
sequences are masks here: each query is scored against all columns, and a mask hides those that are
not its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.attention import philox
from fastprefix.options import Options

# Additive masks say "do not attend" with -inf or with the most negative number of their dtype.
MASKED = -1e30


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over [prefix ; sequence], in float32 or, for float64 inputs, float64.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D]; P may be 0.
        prefix_value: [Hkv, P, Dv].
        options: the rest of the call.

    Returns:
        out [B, Hq, Lq, Dv] and its log-sum-exp (natural log) [B, Hq, Lq] in float32 (float64 for
        float64 inputs), with the sinks. Rows that see nothing: zeros and -inf.
    """
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    prefix_key, prefix_value = prefix_key.to(wide), prefix_value.to(wide)
    if options.key_lengths is not None:
        in_use = options.key_lengths.clamp(0, key.shape[2])
        options = options._replace(key_lengths=in_use)
        # zeros: a weight of 0 does not hide NaN, nor does the gradient of a score that is hidden
        unused = ~_in_use(in_use, key.shape[2])[:, None, :, None]
        key, value = key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    with torch.autocast(query.device.type, enabled=False):  # which would round the products
        out, lse = _attend(query, key, value, prefix_key, prefix_value, options)
    return out.to(dtype), lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` in the dtype of its tensors."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    P = prefix_key.shape[1]
    grouped = query.reshape(B, Hkv, Hq // Hkv, Lq, D)
    prefix_scores = torch.einsum("bhgqd,hpd->bhgqp", grouped, prefix_key)
    sequence_scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, key)
    scores = torch.cat([prefix_scores, sequence_scores], dim=-1) * options.scale
    scores = scores.reshape(B, Hq, Lq, P + Lk)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)

    numbers, places = _places(query, Lk, P, options)
    prefix, sequence = seen_and_added(places, options, scores.dtype)
    seen, added = (
        torch.cat([one.expand(B, Hq, Lq, P), other.expand(B, Hq, Lq, Lk)], dim=-1)
        for one, other in zip(prefix, sequence, strict=True)
    )
    # hidden before the sum: an infinite bias would send NaN into the gradients
    scores = (scores + added.masked_fill(~seen, 0.0)).masked_fill(~seen, float("-inf"))
    weights, lse = _softmax(scores, options.sinks)
    if options.dropout_p is not None and options.dropout_seed is not None:
        kept = _kept(numbers, places, Hq, options.dropout_p, options.dropout_seed)
        weights = weights * kept.to(weights.dtype) / (1.0 - options.dropout_p)
    weights = weights.reshape(B, Hkv, Hq // Hkv, Lq, P + Lk)
    out = torch.einsum("bhgqp,hpd->bhgqd", weights[..., :P], prefix_value)
    out = out + torch.einsum("bhgqk,bhkd->bhgqd", weights[..., P:], value)
    return out.reshape(B, Hq, Lq, value.shape[-1]), lse


def seen_and_added(
    places: Places, options: Options, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What each query sees (bool), and what is added to its scores: of prefix and sequence.

    Args:
        places: where queries, keys and prefix columns stand.
        options: of the call; tensors by query or by key are for those of `places`.
        dtype: of what is added.

    Returns:
        A pair for the prefix, broadcastable to [B, Hq, Lq, P], and one for the sequence,
        broadcastable to [B, Hq, Lq, Lk].
    """
    prefix_seen = places.own[:, None]  # [B, 1, Lq, P]
    sequence_seen = places.together[:, None]  # [B, 1, Lq, Lk]
    position = places.position[:, None, :, None]
    if options.key_lengths is not None:
        in_use = _in_use(options.key_lengths, places.key.shape[0])
        sequence_seen = sequence_seen & in_use[:, None, None]
    if options.is_causal:
        sequence_seen = sequence_seen & (places.key <= position)
    if options.sliding_window is not None:
        distance = (position - places.key).abs()
        sequence_seen = sequence_seen & (distance < options.sliding_window)
        if options.prefix_in_window:
            before = _real_before(places.position, options.key_padding_mask)  # [B, Lq]
            gap = (places.prefix_length + before)[..., None] - places.column
            prefix_seen = prefix_seen & (gap < options.sliding_window)[:, None]
    if options.key_padding_mask is not None:
        sequence_seen = sequence_seen & options.key_padding_mask[:, None, None, :]
    if options.attn_mask is not None and options.attn_mask.dtype is torch.bool:
        sequence_seen = sequence_seen & options.attn_mask
    prefix_added = sequence_added = torch.zeros((1, 1, 1, 1), dtype=dtype, device=places.key.device)
    if options.attn_mask is not None and options.attn_mask.dtype is not torch.bool:
        sequence_seen = sequence_seen & (options.attn_mask > MASKED)
        sequence_added = options.attn_mask.to(dtype)
    if options.prefix_bias is not None:
        bias = options.prefix_bias
        bias = bias[:, None, None] if bias.dim() == 1 else bias
        prefix_seen = prefix_seen & (bias > MASKED)
        prefix_added = bias.to(dtype)
    return (prefix_seen, prefix_added), (sequence_seen, sequence_added)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights [B, Hq, Lq, P + Lk] of scores of that shape, and the log-sum-exp [B, Hq, Lq].

    Rows that see nothing have weights of 0 and a log-sum-exp of -inf.
    """
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, None, None]
    empty = scores.shape[-1] == 0
    # In rows that see nothing, 0 stands in for the maximum of -inf, and 1 for the sum of 0.
    top = scores.new_zeros(*scores.shape[:3], 1) if empty else scores.detach().amax(-1, True)
    if sinks is not None:
        top = sinks.detach() + top if empty else torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    lse = (top + total.detach().log()).squeeze(-1)
    return weights / total.masked_fill(total == 0, 1.0), lse


class Places(NamedTuple):
    """Where queries, keys and prefix columns stand, each in its own sequence or prefix.

    Attributes:
        position: [1, Lq], or [B, Lq] with key_lengths: p_i.
        key: [Lk], j.
        together: [1, Lq, Lk] bool, or broadcastable to it: query and key belong to one sequence.
        column: [P], the token's index in its own prefix.
        own: [B, Lq, P] bool, or broadcastable to it: the column belongs to the query's prefix.
        prefix_length: [B, Lq], or broadcastable to it, of the query's prefix.
    """

    position: Tensor
    key: Tensor
    together: Tensor
    column: Tensor
    own: Tensor
    prefix_length: Tensor


class _Numbers(NamedTuple):
    """The coordinates of each query.

    Attributes:
        sequence: [B, Lq], its sequence: its batch row, or m with cu_seqlens.
        query: [Lq], i.
    """

    sequence: Tensor
    query: Tensor


def _places(query: Tensor, Lk: int, P: int, options: Options) -> tuple[_Numbers, Places]:
    B, _, Lq, _ = query.shape
    device = query.device
    index, key = torch.arange(Lq, device=device), torch.arange(Lk, device=device)
    if options.cu_seqlens is None:
        sequence = torch.arange(B, device=device)[:, None].expand(B, Lq)
        position = (index + (Lk - Lq))[None]
        if options.key_lengths is not None:
            position = index + (options.key_lengths.long() - Lq)[:, None]
        together = torch.ones(1, Lq, Lk, dtype=torch.bool, device=device)
    else:
        cu_seqlens = options.cu_seqlens.long()
        of_token = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
        sequence = of_token[None]
        index = key = index - cu_seqlens[of_token]
        position = index[None]
        together = (of_token[:, None] == of_token[None, :])[None]
    column = torch.arange(P, device=device)
    if options.prefix_lengths is None or options.prefix_index is None:
        own = torch.ones(B, Lq, P, dtype=torch.bool, device=device)
        prefix_length = torch.full((B, Lq), P, device=device)
    else:
        lengths = options.prefix_lengths.long()
        number = torch.arange(lengths.shape[0], device=device)
        number = torch.repeat_interleave(number, lengths, output_size=P)
        column = column - (lengths.cumsum(0) - lengths)[number]
        mine = options.prefix_index.long()[sequence]  # [B, Lq]
        own = number == mine[..., None]
        prefix_length = torch.cat([lengths, lengths.new_zeros(1)])[mine]  # -1 takes the zero
    places = Places(position, key, together, column, own, prefix_length)
    return _Numbers(sequence, index), places


def _in_use(key_lengths: Tensor, Lk: int) -> Tensor:
    """Which keys of a buffer are in use, [B, Lk] bool."""
    return torch.arange(Lk, device=key_lengths.device) < key_lengths[:, None]


def _real_before(position: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """How many real tokens of its row stand before each query, [B or 1, Lq]."""
    position = position.clamp(min=0)  # below 0 only with key_lengths that were not checked
    if key_padding_mask is None:
        return position
    real = key_padding_mask.long()
    return (real.cumsum(1) - real).gather(1, position.expand(real.shape[0], -1))


def _kept(numbers: _Numbers, places: Places, Hq: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Which weights dropout keeps, [B, Hq, Lq, P + Lk] bool."""
    B, Lq = numbers.sequence.shape
    columns = torch.cat(
        [places.column.expand(B, Lq, -1), places.prefix_length[..., None] + places.key], dim=-1
    )
    heads = numbers.sequence[:, None, :, None] * Hq
    heads = heads + torch.arange(Hq, device=seed.device)[:, None, None]
    return philox.keep(seed, dropout_p, columns[:, None], numbers.query[:, None], heads)
