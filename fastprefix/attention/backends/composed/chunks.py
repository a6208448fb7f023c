"""The chunks that a call with materialised scores is cut into.

A chunk's scores fit the processor's cache, but for very many keys, so memory does not grow with the
batch or with Lq. The cuts follow only from the shapes and the integers of a call. So forward and
backward, and a layer that checkpointing runs again, have the same chunks in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.attention.backends.reference import Places
from fastprefix.options import Options

# Scores of a chunk: 1 MiB of float32, of which several copies fit a core's level 2 cache.
_SCORES = 1 << 18
# Queries of a chunk at least, if Lq has as many: products of fewer rows are slow.
_QUERIES = 32


class Chunk(NamedTuple):
    """Rows and queries, with the keys and the prefix columns that they may see.

    Attributes:
        rows: of the batch.
        queries: along Lq.
        keys: along Lk; none that all of the queries have behind their window or in their future.
        columns: of the packed prefix: the prefix of all the rows.
        offset: a query's index in Lq plus this is its place among the keys, along Lk.
    """

    rows: slice | Tensor
    queries: slice
    keys: slice
    columns: slice
    offset: int

    def of_queries(self, x: Tensor) -> Tensor:
        """The part of a [B, Hq, Lq, ...] tensor."""
        return x[self.rows, :, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """The part of a [B, Hkv, Lk, D] tensor."""
        return x[self.rows, :, self.keys]

    def places(self, device: torch.device) -> Places:
        """Where the queries, keys and columns stand."""
        query = torch.arange(self.queries.start, self.queries.stop, device=device)
        column = torch.arange(self.columns.stop - self.columns.start, device=device)
        yes = torch.ones((1, 1, 1), dtype=torch.bool, device=device)
        position = (query + (self.offset - self.keys.start))[None]
        key = torch.arange(self.keys.stop - self.keys.start, device=device)
        length = torch.tensor([[column.shape[0]]], device=device)
        return Places(position, key, yes, column, yes, length)

    def options(self, options: Options) -> Options:
        """The options, with the tensors of this chunk."""
        key_count = self.keys.stop - self.keys.start
        padding, mask, bias = options.key_padding_mask, options.attn_mask, options.prefix_bias
        if padding is not None:
            padding = padding[self.rows, self.keys] if key_count else None
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
            mask = mask[self.rows] if mask.shape[0] > 1 else mask
            mask = mask[:, :, self.queries] if mask.shape[2] > 1 else mask
            mask = mask[..., self.keys] if mask.shape[3] > 1 else mask
        if bias is not None and bias.dim() == 3:
            bias = bias[:, self.queries, self.columns]
        return options._replace(
            key_padding_mask=padding, attn_mask=mask, prefix_bias=bias, key_lengths=None
        )


def chunks(query: Tensor, key: Tensor, prefix_key: Tensor, options: Options) -> Iterator[Chunk]:
    """The chunks of a call; together they hold each query of each row once."""
    Hq = query.shape[1]
    window, causal = options.sliding_window, options.is_causal
    for rows, queries, keys, columns in _alike(query, key, prefix_key, options):
        offset = keys.stop - queries.stop
        seen = keys.stop - keys.start + columns.stop - columns.start
        most = max(_QUERIES, _SCORES // max(1, Hq * seen))
        together = max(1, most // (queries.stop - queries.start))
        for row in range(0, len(rows), together):
            some = rows[row : row + together]
            for start in range(queries.start, queries.stop, most):
                stop = min(start + most, queries.stop)
                first, last = keys.start, keys.stop
                if causal:
                    last = min(last, offset + stop)
                if window is not None:
                    last = last if causal else min(last, offset + stop - 1 + window)
                    # a prefix in the window counts the tokens before the queries
                    behind = offset + start - window + 1
                    first = first if options.prefix_in_window else max(first, behind)
                seen_keys = slice(first, max(first, last))
                yield Chunk(_slice(some), slice(start, stop), seen_keys, columns, offset)


def _alike(
    query: Tensor, key: Tensor, prefix_key: Tensor, options: Options
) -> Iterator[tuple[list[int], slice, slice, slice]]:
    """Rows with equal places and one prefix: the rows, their queries, keys and prefix columns."""
    B, _, Lq, _ = query.shape
    index: list[int] | None = None
    ends = [0]
    if options.prefix_lengths is not None and options.prefix_index is not None:
        index = options.prefix_index.tolist()
        ends += options.prefix_lengths.cumsum(0).tolist()

    def columns(row: int) -> slice:
        if index is None:
            return slice(0, prefix_key.shape[1])
        return slice(0, 0) if index[row] < 0 else slice(*ends[index[row] : index[row] + 2])

    if options.cu_seqlens is not None:
        for number, (start, stop) in enumerate(pairwise(options.cu_seqlens.tolist())):
            if stop > start:
                yield [0], slice(start, stop), slice(start, stop), columns(number)
        return
    lengths = [key.shape[2]] * B if options.key_lengths is None else options.key_lengths.tolist()
    alike: dict[tuple[int, int, int], list[int]] = {}
    for row, length in enumerate(lengths):
        own = columns(row)
        alike.setdefault((length, own.start, own.stop), []).append(row)
    for (length, start, stop), rows in alike.items():
        if Lq > 0:
            yield rows, slice(0, Lq), slice(0, length), slice(start, stop)


def _slice(rows: list[int]) -> slice | Tensor:
    """A slice if the rows follow each other, whose parts are views."""
    first, last = rows[0], rows[-1] + 1
    return slice(first, last) if last - first == len(rows) else torch.tensor(rows)
