"""Tables that sort a batch by prefix, for decoding with packed prefixes, and their cache.

Tables depend on the contents of `prefix_index` and `prefix_lengths`. They are computed on the
device and never read back; the host only knows their sizes. `CACHE` keeps them, so that the layers
of a step share one table, and so do all steps until the batch changes.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decode_grid import FIXED_PREFIX_SPLITS, PrefixCut


@dataclass(frozen=True)
class PrefixTables:
    """Where packed prefixes and the rows that use them lie. int32, on the device.

    Packed rows are numbered by (batch row in the order of its prefix, head within the group, query
    position), flattened.

    Attributes:
        order: [B], the batch rows sorted by prefix.
        units: [units, 4], for each unit the first packed row, the end of the prefix's packed rows,
            the first key and the end of the keys. Surplus units have no rows.
        rows: [B, 3], for each batch row its first packed row counted from the first one of its
            prefix, the first unit of its prefix, and the number of splits (0: no prefix).
    """

    order: Tensor
    units: Tensor
    rows: Tensor


def build_tables(prefix_index: Tensor, prefix_lengths: Tensor, cut: PrefixCut) -> PrefixTables:
    """Sort the batch by prefix and cut every prefix into units, on the device.

    Args:
        prefix_index: [B], -1 (or any number outside 0 .. N - 1) for no prefix.
        prefix_lengths: [N]. If they add up to more than P, they are cut there.
        cut: tile sizes and bounds.
    """
    device = prefix_index.device
    index, lengths = prefix_index.long(), prefix_lengths.long().clamp(min=0)
    N = lengths.shape[0]
    index = torch.where(index < N, index, -1).clamp(min=-1)
    key_end = lengths.cumsum(0).clamp(max=cut.P)
    key_first = torch.cat([key_end.new_zeros(1), key_end[:-1]])
    lengths = key_end - key_first

    ordered, order = index.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(N + 1, device=device))
    first, end = bounds[:-1], bounds[1:]
    tiles = ((end - first) * cut.packed + cut.rows - 1) // cut.rows
    if cut.free:
        # Units <= tiles + keys of all tiles / split, so this split makes at most tiles + free.
        split = ceil_to((tiles * lengths).sum().expand(N), cut.free, cut.keys)
    else:
        split = ceil_to(lengths, FIXED_PREFIX_SPLITS, cut.keys)
    split = split.clamp(min=cut.shortest)
    splits = (lengths + split - 1) // split
    unit_end = (tiles * splits).cumsum(0)
    unit_first = unit_end - tiles * splits

    unit = torch.arange(cut.units, device=device)
    n = torch.searchsorted(unit_end, unit, right=True)
    real = n < N
    n = n.clamp(max=N - 1)
    unit = unit - unit_first[n]
    i_tile = unit // splits[n].clamp(min=1)
    key = key_first[n] + (unit - i_tile * splits[n]) * split[n]
    row_end = end[n] * cut.packed
    row = torch.where(real, first[n] * cut.packed + i_tile * cut.rows, row_end)
    units = torch.stack([row, row_end, key, torch.minimum(key + split[n], key_end[n])], 1)

    slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    n = index.clamp(min=0)
    count = torch.where(index >= 0, splits[n], 0)
    rows = torch.stack([(slot - first[n]) * cut.packed, unit_first[n], count], 1)
    return PrefixTables(order.int(), units.int(), rows.int())


def ceil_to(total: Tensor, parts: int, step: int) -> Tensor:
    """The smallest multiple of `step` that, `parts` times, is at least the total."""
    return (total + parts * step - 1) // (parts * step) * step


class TableCache:
    """Tables by the identity and the version of `prefix_index` and `prefix_lengths`.

    The version is the counter that every in-place operation of PyTorch raises. Some changes do not
    raise it: the replay of a CUDA graph, another library's kernel, `.data`. They need an explicit
    plan. Tensors made in `torch.inference_mode` have no version, so their tables are not cached.

    The cache keeps no tensor alive: entries hold weak references and go when their tensors do.
    Tables belong to the stream that built them. Tables built while a CUDA graph is captured serve
    only that capture, so that a replay of the graph computes them again.

    Several threads may use it at the same time.
    """

    SIZE = 32  # entries; the one that was used longest ago goes first

    def __init__(self) -> None:
        """An empty cache."""
        self._lock = threading.RLock()  # reentrant: a weak reference may die inside
        self._entries: OrderedDict[Any, Any] = OrderedDict()
        self._captured: OrderedDict[Any, Any] = OrderedDict()

    def get(self, prefix_index: Tensor, prefix_lengths: Tensor, cut: PrefixCut) -> PrefixTables:
        """The tables of these arguments, as :func:`build_tables` makes them."""
        if prefix_index.is_inference() or prefix_lengths.is_inference():
            return build_tables(prefix_index, prefix_lengths, cut)
        tensors = (prefix_index, prefix_lengths)
        stream, capturing = 0, False
        if prefix_index.is_cuda:
            stream = torch.cuda.current_stream(prefix_index.device).cuda_stream
            capturing = torch.cuda.is_current_stream_capturing()
        key = (*((id(t), t._version) for t in tensors), stream, cut)
        with self._lock:
            if not capturing:
                self._captured.clear()
            entries = self._captured if capturing else self._entries
            found = entries.get(key)
            if found is not None and all(r() is t for r, t in zip(found[0], tensors, strict=True)):
                entries.move_to_end(key)
                return found[1]
            tables = build_tables(*tensors, cut)

            def forget(_: Any) -> None:
                with self._lock:
                    entries.pop(key, None)

            entries[key] = (tuple(weakref.ref(t, forget) for t in tensors), tables)
            while len(entries) > self.SIZE:
                entries.popitem(last=False)
            return tables

    def __len__(self) -> int:
        """How many entries there are."""
        with self._lock:
            return len(self._entries) + len(self._captured)


CACHE = TableCache()
