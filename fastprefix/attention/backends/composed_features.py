"""What only some calls of the composed backend use, out of the same two flash calls.

A call is cut into sequence pieces (one, or one for each of the packed sequences) and prefix groups
(the rows that share a prefix), each of which is one flash call over views. Their outputs merge by
log-sum-exp, and the sinks merge like one more part that has no value. In the backward each part
gets the GLOBAL output and log-sum-exp, so that its gradients are its exact share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.attention.backends.composed import (
    _FLOOR,
    _additive,
    _equal_head_sizes,
    _flash,
    _rows,
    _SequencePart,
    _unrows,
    flash_backward,
)
from fastprefix.attention.call import Options

# Largest mask that a prefix call may build, in elements: groups that need more are cut by rows.
_MASK_ELEMENTS = 1 << 24


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`."""
    Dv, dtype = value.shape[-1], query.dtype
    query, key, value, prefix_key, prefix_value = _equal_head_sizes(
        query, key, value, prefix_key, prefix_value
    )
    B, Hq, Lq, D = query.shape
    wide = torch.promote_types(dtype, torch.float32)
    out = query.new_zeros(B, Hq, Lq, D, dtype=wide)
    lse = query.new_full((B, Hq, Lq), -math.inf, dtype=wide)
    for piece in _pieces(query, key, options):
        part = piece.part(query, key, options)
        part_out, part_lse = _flash(
            part.fold(piece.of_queries(query)), part.keys(piece.of_keys(key)),
            part.keys(piece.of_keys(value)), 0.0, part.is_causal,
            attn_mask=part.bias, scale=options.scale,
        )  # fmt: skip
        part_lse = _unsee(part.unfold(part_lse)) if part.bias is not None else part.unfold(part_lse)
        piece.of_queries(out).copy_(part.unfold(part_out))
        piece.of_queries(lse).copy_(part_lse)
    out = out.masked_fill_((lse == -math.inf)[..., None], 0.0)
    for group in _groups(query, key, prefix_key, options):
        part_out, part_lse = group.attend(query, prefix_key, prefix_value, options)
        group.put(out, lse, *_merge(group.take(out), group.take(lse), part_out, part_lse))
    if options.sinks is not None:
        sinks = options.sinks.to(wide)[:, None].expand_as(lse)
        out, lse = _merge(out, lse, None, sinks)
    return out[..., :Dv].to(dtype), lse


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
    """Same contract as :func:`fastprefix.attention.backends.composed.backward`."""
    D, Dv = query.shape[-1], value.shape[-1]
    query, key, value, prefix_key, prefix_value, out, grad_out = _equal_head_sizes(
        query, key, value, prefix_key, prefix_value, out, grad_out
    )
    wide = lse.dtype
    # a row that saw nothing: exp(score - inf) = 0 gives zero gradients
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    delta = (out.to(wide) * grad_out.to(wide)).sum(-1)
    dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    # summed over many groups, hence in the accumulation dtype
    dpk, dpv = (torch.zeros_like(x, dtype=wide) for x in (prefix_key, prefix_value))
    dbias = lse.new_zeros(query.shape[1])
    if needs[0] or needs[1] or needs[2]:
        for piece in _pieces(query, key, options):
            part = piece.part(query, key, options)
            part_dq, part_dk, part_dv = flash_backward(
                part.fold(piece.of_queries(grad_out)), part.fold(piece.of_queries(query)),
                part.keys(piece.of_keys(key)), part.keys(piece.of_keys(value)),
                part.fold(piece.of_queries(out)), part.fold(piece.of_queries(lse)),
                is_causal=part.is_causal, attn_mask=part.bias, scale=options.scale,
            )  # fmt: skip
            piece.of_queries(dq).copy_(part.unfold(part_dq))
            piece.of_keys(dk).copy_(part.sum_keys(part_dk))
            piece.of_keys(dv).copy_(part.sum_keys(part_dv))
    if needs[0] or needs[3] or needs[4] or needs[6]:
        for group in _groups(query, key, prefix_key, options):
            Hkv, columns = prefix_key.shape[0], group.columns
            rows_query, rows_lse = group.take(query), group.take(lse)
            part_dq, part_dk, part_dv = flash_backward(
                _rows(group.take(grad_out), Hkv), _rows(rows_query, Hkv),
                prefix_key[None, :, columns], prefix_value[None, :, columns],
                _rows(group.take(out), Hkv), _rows(rows_lse - _head_bias(options, lse), Hkv),
                is_causal=False, attn_mask=group.mask(query, Hkv, options), scale=options.scale,
            )  # fmt: skip
            group.add(dq, _unrows(part_dq, rows_query.shape))
            dpk[:, columns] += part_dk[0]
            dpv[:, columns] += part_dv[0]
            if needs[6]:
                part_out, part_lse = group.attend(query, prefix_key, prefix_value, options)
                dp = (part_out.to(wide) * group.take(grad_out).to(wide)).sum(-1)
                ds = torch.exp(part_lse - rows_lse) * (dp - group.take(delta))
                dbias += ds.sum((0, 2))
    dsinks = None
    if needs[5] and options.sinks is not None:
        weight = torch.exp(options.sinks.to(wide)[:, None] - lse)
        dsinks = -(weight * delta).sum((0, 2)).to(options.sinks.dtype)
    bias_dtype = wide if options.prefix_bias is None else options.prefix_bias.dtype
    return (
        dq[..., :D] if needs[0] else None,
        dk[..., :D] if needs[1] else None,
        dv[..., :Dv] if needs[2] else None,
        dpk[..., :D].to(query.dtype) if needs[3] else None,
        dpv[..., :Dv].to(query.dtype) if needs[4] else None,
        dsinks,
        dbias.to(bias_dtype) if needs[6] else None,
    )


class _Piece(NamedTuple):
    """Queries and the sequence keys that they may see: positions along Lq and along Lk."""

    queries: slice
    keys: slice

    def of_queries(self, x: Tensor) -> Tensor:
        """The view of a [B, Hq, Lq, ...] tensor."""
        return x[:, :, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """The view of a [B, Hkv, Lk, D] tensor."""
        return x[:, :, self.keys]

    def part(self, query: Tensor, key: Tensor, options: Options) -> _SequencePart:
        """How this piece is laid out for the kernel."""
        query, key = self.of_queries(query), self.of_keys(key)
        padding, mask, window = options.key_padding_mask, options.attn_mask, options.sliding_window
        if padding is not None:
            padding = padding[:, self.keys]
        if mask is not None and mask.dim() > 0 and mask.shape[-1] > 1:
            mask = mask[..., self.keys]
        if window is not None and max(query.shape[2], key.shape[2]) <= window:
            window = None
        return _SequencePart(query, key, padding, mask, options.is_causal, window)


def _pieces(query: Tensor, key: Tensor, options: Options) -> Iterator[_Piece]:
    """One piece, without the keys that lie behind every query's window; or one per sequence."""
    B, Hq, Lq, _ = query.shape
    Lk = key.shape[2]
    if B * Hq * Lq * Lk == 0:
        return
    if options.cu_seqlens is not None:
        for start, end in pairwise(options.cu_seqlens.tolist()):
            if end > start:
                yield _Piece(slice(start, end), slice(start, end))
        return
    window = options.sliding_window
    first = 0 if window is None else max(0, Lk - Lq - window + 1)
    yield _Piece(slice(0, Lq), slice(first, Lk))


class _Group(NamedTuple):
    """Rows that attend to the same prefix.

    Attributes:
        columns: of the packed prefix, without those that lie behind every row's window.
        end: the prefix's last column + 1.
        rows: of the batch, or tokens where sequences are packed; None for all.
        tokens: whether rows are tokens.
        real_before: how many real tokens stand before each query, [B, 1, Lq]; None where all of
            the columns are seen.
    """

    columns: slice
    end: int
    rows: Tensor | None
    tokens: bool
    real_before: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """The rows of a [B, H, Lq, ...] tensor."""
        return x if self.rows is None else x.index_select(2 if self.tokens else 0, self.rows)

    def put(self, out: Tensor, lse: Tensor, rows_out: Tensor, rows_lse: Tensor) -> None:
        """Overwrites the rows of output and log-sum-exp."""
        for whole, part in ((out, rows_out), (lse, rows_lse)):
            if self.rows is None:
                whole.copy_(part)
            else:
                whole.index_copy_(2 if self.tokens else 0, self.rows, part)

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Adds to the rows of a tensor."""
        if self.rows is None:
            whole += part
        else:
            whole.index_add_(2 if self.tokens else 0, self.rows, part.to(whole.dtype))

    def mask(self, query: Tensor, Hkv: int, options: Options) -> Tensor | None:
        """What is added to the scores, [1, 1 or Hkv, rows, columns] in the order of `_rows`."""
        bias = options.prefix_bias
        if self.real_before is None and (bias is None or bias.dim() == 1):
            return None
        B, Hq, Lq, _ = self.take(query).shape
        if bias is not None and bias.dim() == 3:
            if self.tokens and self.rows is not None:
                bias = bias.index_select(1, self.rows)
            added = _additive(bias[..., self.columns], query.dtype)  # [1, Hq, Lq, columns]
        else:
            wide = torch.promote_types(query.dtype, torch.float32)
            added = torch.zeros(1, 1, 1, 1, dtype=wide, device=query.device)
        if self.real_before is not None and options.sliding_window is not None:
            column = torch.arange(self.columns.start, self.columns.stop, device=query.device)
            gap = self.end - column + self.take(self.real_before)[..., None]
            added = added.masked_fill(gap >= options.sliding_window, _FLOOR)
        if added.shape[1] == 1:  # one for all heads: a group's queries are rows of one head
            return _rows(added.expand(B, Hq // Hkv, Lq, -1), 1)
        return _rows(added.expand(B, Hq, Lq, -1), Hkv)

    def attend(
        self, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the rows over their prefix alone."""
        Hkv = prefix_key.shape[0]
        rows = self.take(query)
        mask = self.mask(query, Hkv, options)
        out, lse = _flash(
            _rows(rows, Hkv), prefix_key[None, :, self.columns],
            prefix_value[None, :, self.columns], 0.0, False, attn_mask=mask, scale=options.scale,
        )  # fmt: skip
        lse = _unrows(lse, rows.shape[:3])
        lse = lse if mask is None else _unsee(lse)
        return _unrows(out, rows.shape), lse + _head_bias(options, lse)


def _groups(query: Tensor, key: Tensor, prefix_key: Tensor, options: Options) -> Iterator[_Group]:
    """The groups of a call; together they hold each row at most once for each prefix column."""
    B, Hq, Lq, _ = query.shape
    if query.numel() == 0 or prefix_key.shape[1] == 0:
        return
    bias, window = options.prefix_bias, options.sliding_window
    tokens = options.cu_seqlens is not None
    each_head = bias is not None and bias.dim() == 3
    in_window = options.prefix_in_window and window is not None
    real_before = _real_before(query, key, options) if in_window else None
    for first, end, rows in _members(prefix_key, options):
        group = _Group(slice(first, end), end, rows, tokens, None)
        if real_before is not None and window is not None:
            fewest, most = (int(count) for count in group.take(real_before).aminmax())
            first = max(first, end + fewest - window + 1)
            if first >= end:
                continue
            partly = end - first + most >= window
            group = group._replace(
                columns=slice(first, end), real_before=real_before if partly else None
            )
        masked = each_head or group.real_before is not None
        row = (Hq if each_head else Hq // prefix_key.shape[0]) * Lq * (end - first)
        if tokens or not masked or B * row <= _MASK_ELEMENTS:
            yield group
            continue
        rows = torch.arange(B, device=query.device) if rows is None else rows
        for some in rows.split(max(1, _MASK_ELEMENTS // row)):
            yield group._replace(rows=some)


def _members(prefix_key: Tensor, options: Options) -> Iterator[tuple[int, int, Tensor | None]]:
    """First column, last column + 1 and rows of each prefix that is not empty."""
    if options.prefix_lengths is None or options.prefix_index is None:
        yield 0, prefix_key.shape[1], None
        return
    index = options.prefix_index.tolist()
    users: dict[int, list[int]] = {}
    for row, number in enumerate(index):
        users.setdefault(number, []).append(row)
    end = 0
    for number, length in enumerate(options.prefix_lengths.tolist()):
        end += length
        mine = users.get(number)
        if length == 0 or mine is None:
            continue
        if options.cu_seqlens is not None:
            cu_seqlens = options.cu_seqlens.tolist()
            rows = torch.cat([torch.arange(cu_seqlens[m], cu_seqlens[m + 1]) for m in mine])
            if rows.numel() > 0:
                yield end - length, end, rows
        else:
            yield end - length, end, None if len(mine) == len(index) else torch.tensor(mine)


def _real_before(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """How many real tokens of its sequence stand before each query, [B, 1, Lq]."""
    B, _, Lq, _ = query.shape
    Lk = key.shape[2]
    if options.cu_seqlens is not None:
        starts, lengths = options.cu_seqlens[:-1].long(), options.cu_seqlens.diff()
        return (torch.arange(Lq) - starts.repeat_interleave(lengths))[None, None]
    if options.key_padding_mask is None:
        return torch.arange(Lk - Lq, Lk).expand(B, 1, Lq)
    real = options.key_padding_mask.long()
    return (real.cumsum(1) - real)[:, None, Lk - Lq :]


def _head_bias(options: Options, lse: Tensor) -> Tensor:
    """What a prefix_bias [Hq] adds to the prefix part's log-sum-exp [B, Hq, Lq]."""
    bias = options.prefix_bias
    if bias is None or bias.dim() == 3:
        return lse.new_zeros(())
    return bias.to(lse.dtype).masked_fill(bias <= _FLOOR, -math.inf)[:, None]


def _merge(
    out: Tensor, lse: Tensor, part_out: Tensor | None, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds a part to an output in the accumulation dtype; None is a part without a value."""
    total = torch.logaddexp(lse, part_lse)
    # nothing seen on either side: weights of exp(-inf - 0) = 0
    base = total.masked_fill(total == -math.inf, 0.0)
    out = out * torch.exp(lse - base)[..., None]
    if part_out is not None:
        out = out + part_out.to(out.dtype) * torch.exp(part_lse - base)[..., None]
    return out, total


def _unsee(lse: Tensor) -> Tensor:
    """The kernel's log-sum-exp, -inf for rows all of whose scores are masked."""
    return lse.masked_fill(lse < _FLOOR / 2, -math.inf)
