"""The parts that a call is cut into: sequence pieces and prefix groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.flash import (
    FLOOR,
    additive,
    fold_rows,
    hiding_dtype,
    unfold_rows,
    unsee,
)
from fastprefix.attention.backends.composed.kernels import kernels_of
from fastprefix.attention.backends.composed.lengths import runs
from fastprefix.attention.backends.composed.seen import Seen
from fastprefix.attention.backends.composed.sequence import SequencePart, numbers
from fastprefix.options import Options

# Largest mask that a prefix call may build, in elements: groups that need more are cut by rows.
_MASK_ELEMENTS = 1 << 24


class Piece(NamedTuple):
    """Queries and the sequence keys that they may see: rows, positions along Lq and along Lk."""

    rows: slice
    queries: slice
    keys: slice

    def of_queries(self, x: Tensor) -> Tensor:
        """The view of a [B, Hq, Lq, ...] tensor."""
        return x[self.rows, :, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """The view of a [B, Hkv, Lk, D] tensor."""
        return x[self.rows, :, self.keys]

    def part(self, query: Tensor, key: Tensor, options: Options) -> SequencePart:
        """How this piece is laid out for the kernel."""
        query, key = self.of_queries(query), self.of_keys(key)
        padding, mask, window = options.key_padding_mask, options.attn_mask, options.sliding_window
        if padding is not None:
            padding = padding[self.rows, self.keys]
        if mask is not None and mask.dim() > 0 and mask.shape[-1] > 1:
            mask = mask[..., self.keys]
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[self.rows]
        if window is not None and max(query.shape[2], key.shape[2]) <= window:
            window = None
        if kernels_of(query).host_reads:  # one sequence, and of its keys those in use
            return SequencePart(query, key, padding, mask, options.is_causal, window)
        return SequencePart(
            query, key, padding, mask, options.is_causal, window,
            options.cu_seqlens, options.key_lengths,
        )  # fmt: skip


def pieces(query: Tensor, key: Tensor, options: Options) -> Iterator[Piece]:
    """One piece, without the keys that lie behind every query's window; or several.

    Packed sequences are a piece each, and so are runs of rows with equal key_lengths. Rows without
    keys are in no piece.
    """
    B, Hq, Lq, _ = query.shape
    Lk = key.shape[2]
    if B * Hq * Lq * Lk == 0:
        return
    if options.cu_seqlens is not None and kernels_of(query).host_reads:
        for start, end in pairwise(options.cu_seqlens.tolist()):
            if end > start:
                yield Piece(slice(0, 1), slice(start, end), slice(start, end))
        return
    window, lengths = options.sliding_window, options.key_lengths
    if lengths is not None and not kernels_of(query).host_reads:
        yield Piece(slice(0, B), slice(0, Lq), slice(0, Lk))
        return
    for rows, length in [(slice(0, B), Lk)] if lengths is None else runs(lengths):
        first = 0 if window is None else max(0, length - Lq - window + 1)
        if first < length:
            yield Piece(rows, slice(0, Lq), slice(first, length))


class Group(NamedTuple):
    """Rows that attend to the same prefix.

    Attributes:
        columns: of the packed prefix, without those that lie behind every row's window.
        end: the prefix's last column + 1; of each column's prefix, [columns], if there are several.
        rows: of the batch, or tokens where sequences are packed; None for all.
        tokens: whether rows are tokens.
        real_before: how many real tokens stand before each query, [B, 1, Lq]; None where all of
            the columns are seen.
        ids: the number of each row's prefix, [B, 1, 1] or [1, 1, Lq], and of each column's,
            [columns]; None if the columns are of one prefix, to which all rows attend.
    """

    columns: slice
    end: int | Tensor
    rows: Tensor | None
    tokens: bool
    real_before: Tensor | None
    ids: tuple[Tensor, Tensor] | None = None

    def take(self, x: Tensor) -> Tensor:
        """The rows of a [B, H, Lq, ...] tensor."""
        return x if self.rows is None else x.index_select(2 if self.tokens else 0, self.rows)

    def put(self, out: Tensor, lse: Tensor, rows_out: Tensor, rows_lse: Tensor) -> None:
        """Overwrites the rows of output and log-sum-exp."""
        for whole, part in ((out, rows_out), (lse, rows_lse)):
            if self.rows is None:
                whole.copy_(part)
            else:
                whole.index_copy_(2 if self.tokens else 0, self.rows, part.to(whole.dtype))

    def add(self, whole: Tensor, part: Tensor) -> None:
        """Adds to the rows of a tensor."""
        if self.rows is None:
            whole += part
        else:
            whole.index_add_(2 if self.tokens else 0, self.rows, part.to(whole.dtype))

    def is_masked(self, options: Options) -> bool:
        """Whether there is anything to add to the scores."""
        by_column = options.prefix_bias is not None and options.prefix_bias.dim() == 3
        return by_column or self.ids is not None or self.real_before is not None

    def mask(self, query: Tensor, Hkv: int, options: Options) -> Tensor | None:
        """What is added to the scores, [1, 1 or Hkv, rows, columns] in the order of `fold_rows`."""
        bias = options.prefix_bias
        if not self.is_masked(options):
            return None
        B, Hq, Lq, _ = self.take(query).shape
        if bias is not None and bias.dim() == 3:
            if self.tokens and self.rows is not None:
                bias = bias.index_select(1, self.rows)
            added = additive(bias[..., self.columns], query.dtype)  # [1, Hq, Lq, columns]
        else:
            added = query.new_zeros(1, 1, 1, 1, dtype=hiding_dtype(query.dtype))
        if self.ids is not None:
            of_row, of_column = self.ids
            added = added.masked_fill(self.take(of_row)[..., None] != of_column, FLOOR)
        if self.real_before is not None and options.sliding_window is not None:
            column = torch.arange(self.columns.start, self.columns.stop, device=query.device)
            gap = self.end - column + self.take(self.real_before)[..., None]
            added = added.masked_fill(gap >= options.sliding_window, FLOOR)
        if added.shape[1] == 1:  # one for all heads: a group's queries are rows of one head
            return fold_rows(added.expand(B, Hq // Hkv, Lq, -1), 1)
        return fold_rows(added.expand(B, Hq, Lq, -1), Hkv)

    def attend(
        self, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the rows over their prefix alone."""
        Hkv = prefix_key.shape[0]
        rows = self.take(query)
        mask = self.mask(query, Hkv, options)
        out, lse = kernels_of(query).forward(
            fold_rows(rows, Hkv), prefix_key[None, :, self.columns],
            prefix_value[None, :, self.columns], options.scale, Seen(mask=mask),
        )  # fmt: skip
        lse = unfold_rows(lse, rows.shape[:3])
        lse = lse if mask is None else unsee(lse)
        return unfold_rows(out, rows.shape), with_head_bias(options, lse)


def groups(query: Tensor, key: Tensor, prefix_key: Tensor, options: Options) -> Iterator[Group]:
    """The groups of a call; together they hold each row at most once."""
    B, Hq, Lq, _ = query.shape
    if query.numel() == 0 or prefix_key.shape[1] == 0:
        return
    bias = options.prefix_bias
    heads = Hq if bias is not None and bias.dim() == 3 else Hq // prefix_key.shape[0]
    apart = options.prefix_lengths is None or kernels_of(query).host_reads
    found = _apart if apart else _together
    for group in found(query, key, prefix_key, options):
        length = group.columns.stop - group.columns.start
        rows, size = (Lq, heads * length) if group.tokens else (B, heads * length * Lq)
        most = max(1, _MASK_ELEMENTS // size)
        if rows <= most or not group.is_masked(options):
            yield group
            continue
        every = torch.arange(rows, device=query.device) if group.rows is None else group.rows
        for some in every.split(most):
            yield group._replace(rows=some)


def _apart(query: Tensor, key: Tensor, prefix_key: Tensor, options: Options) -> Iterator[Group]:
    """One group for each prefix."""
    window, tokens = options.sliding_window, options.cu_seqlens is not None
    in_window = options.prefix_in_window and window is not None
    real_before = _real_before(query, key, options) if in_window else None
    for first, end, rows in _members(prefix_key, options):
        group = Group(slice(first, end), end, rows, tokens, None)
        if real_before is not None and window is not None:
            fewest, most = _fewest_and_most(group.take(real_before), key, options)
            first = max(first, end + fewest - window + 1)
            if first >= end:
                continue
            partly = end - first + most >= window
            group = group._replace(
                columns=slice(first, end), real_before=real_before if partly else None
            )
        yield group


def _together(query: Tensor, key: Tensor, prefix_key: Tensor, options: Options) -> Iterator[Group]:
    """One group for all prefixes, for a device whose values the host does not read.

    Every row is multiplied with every prefix, and a mask hides those of the others.
    """
    lengths, index, P = options.prefix_lengths, options.prefix_index, prefix_key.shape[1]
    assert lengths is not None
    assert index is not None
    of_column = numbers(lengths, P)
    tokens = options.cu_seqlens is not None
    if options.cu_seqlens is None:
        of_row = index[:, None, None]
    else:
        of_row = index[numbers(options.cu_seqlens.diff(), query.shape[2])][None, None]
    group = Group(slice(0, P), lengths.cumsum(0)[of_column], None, tokens, None)
    group = group._replace(ids=(of_row, of_column))
    if options.prefix_in_window:
        group = group._replace(real_before=_real_before(query, key, options))
    yield group


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
        start = options.cu_seqlens[numbers(options.cu_seqlens.diff(), Lq)]
        return (torch.arange(Lq, device=query.device) - start)[None, None]
    place = torch.arange(Lq, device=query.device)
    if options.key_lengths is None:
        position = (place + (Lk - Lq)).expand(B, Lq)
    else:
        position = place + (options.key_lengths[:, None] - Lq)
        position = position.clamp_(min=0)  # below 0 only with lengths that were not checked
    if options.key_padding_mask is None:
        return position[:, None]
    real = options.key_padding_mask.long()
    return (real.cumsum(1) - real).gather(1, position)[:, None]


def _fewest_and_most(real_before: Tensor, key: Tensor, options: Options) -> tuple[int, int]:
    """Bounds of `real_before`, the closest ones that the host can tell without waiting."""
    if kernels_of(key).host_reads:
        fewest, most = (int(count) for count in real_before.aminmax())
        return fewest, most
    Lq, Lk = real_before.shape[2], key.shape[2]
    asked = (options.key_padding_mask, options.cu_seqlens, options.key_lengths)
    by_place = all(x is None for x in asked)
    return (Lk - Lq if by_place else 0), Lk - 1


def with_head_bias(options: Options, lse: Tensor) -> Tensor:
    """The prefix part's log-sum-exp [B, Hq, Lq] with what a prefix_bias [Hq] adds to it."""
    bias = _head_bias(options, lse)
    return lse if bias is None else lse + bias


def without_head_bias(options: Options, lse: Tensor) -> Tensor:
    """The inverse of :func:`with_head_bias`."""
    bias = _head_bias(options, lse)
    return lse if bias is None else lse - bias


def _head_bias(options: Options, lse: Tensor) -> Tensor | None:
    """A prefix_bias by head, [Hq, 1]; None where there is none."""
    bias = options.prefix_bias
    if bias is None or bias.dim() == 3:
        return None
    return bias.to(lse.dtype).masked_fill(bias <= FLOOR, -math.inf)[:, None]
