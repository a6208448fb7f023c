"""A model of the bytes that a launch requests from the memory system, against the least possible.

It counts every operand tile that the programs of a grid load or store. The least is each operand
once. The model leaves out what caches serve, and what a sliding window or a mask lets a program
skip. Packed prefixes and packed sequences count as equally long, and packed sequences as if they
were not causal. Decoding with packed prefixes has no model, because only the device knows how they
are cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import launch

ROWS = ("q", "out", "do", "lse", "delta", "dq")  # tensors of query rows
KEYS = ("k", "v")
PREFIX = ("pk", "pv")


@dataclass(frozen=True)
class Traffic:
    """The requested and the least bytes of a launch, and of each operand as (requested, least)."""

    requested: int
    least: int
    operands: dict[str, tuple[int, int]]


def traffic(step: launch.Launch) -> Traffic | None:
    """The model of a launch, or None for a kernel that has none."""
    name = step.kernel.__name__
    if name not in REREADS:
        return None
    tensors = {n: x for n, x in step.values.items() if isinstance(x, Tensor)}
    times = REREADS[name](step, tensors)
    if times is None:
        return None
    operands = {}
    for n, x in tensors.items():
        size = x.numel() * x.element_size()
        # Partial sums between two launches are not operands of the problem.
        partial = n.startswith("part") or (n in ("dpk", "dpv") and x.dim() == 4)
        operands[n] = (round(size * times.get(n, 1.0)), 0 if partial else size)
    requested, least = (sum(pair[i] for pair in operands.values()) for i in (0, 1))
    return Traffic(requested, least, operands)


def _row_sweep(step: launch.Launch, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Forward and dQ: a program has packed rows, and reads the prefix and the keys they see."""
    B, Hkv, Lk, _ = tensors["k"].shape
    Lq = tensors["q"].shape[2]
    programs = math.prod(step.grid)
    visible = 1.0
    if "cu" in tensors:
        visible = 1 / _parts(tensors["cu"])
    elif step.constants.get("CAUSAL") and Lk:
        group = tensors["q"].shape[1] // Hkv
        visible = _mean_visible(Lq, Lk, group, step.tile.rows) / Lk
    prefix = programs / Hkv / (_parts(tensors["starts"]) if "starts" in tensors else 1)
    return dict.fromkeys(PREFIX, prefix) | dict.fromkeys(KEYS, programs / (B * Hkv) * visible)


def _key_sweep(step: launch.Launch, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Gradients of K and V: a program has keys, and reads the rows that see them."""
    B, Hkv, Lk, _ = tensors["k"].shape
    Lq = tensors["q"].shape[2]
    programs = math.prod(step.grid)
    visible = 1.0
    if "cu" in tensors:
        visible = 1 / _parts(tensors["cu"])
    elif step.constants.get("CAUSAL") and Lq:
        starts = range(0, Lk, step.tile.keys)
        first = [min(max(n - (Lk - Lq), 0), Lq) for n in starts]
        visible = sum(Lq - i for i in first) / (len(first) * Lq)
    return dict.fromkeys(ROWS, programs / (B * Hkv) * visible)


def _prefix_sweep(step: launch.Launch, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Gradient of the prefix: a program has prefix positions, and reads its part of all rows."""
    Hkv, P, _ = tensors["pk"].shape
    tiles = -(-P // step.tile.keys)
    splits = math.prod(step.grid) / (Hkv * tiles)
    prefixes = _parts(tensors["starts"]) if "starts" in tensors else 1
    return dict.fromkeys(ROWS, tiles / prefixes) | dict.fromkeys(PREFIX, splits)


def _decode(step: launch.Launch, tensors: dict[str, Tensor]) -> dict[str, float] | None:
    """Both phases: tiles of all rows read the prefix, tiles of a sequence's rows its keys."""
    if "units" in tensors:
        return None
    a, rows = step.values, step.constants["GROUP"] * tensors["q"].shape[2]
    Lk, splits = tensors["k"].shape[2], a["n_splits"]
    tiles = -(-rows // step.constants["BLOCK_R"])
    visible = (Lk - a["first_key"]) / Lk if Lk else 0.0
    scanned = "spans" not in tensors
    return (
        dict.fromkeys(PREFIX, a["n_units"] / splits if splits else 0.0)
        | dict.fromkeys(KEYS, tiles * visible)
        # Every split reads its rows. It reads the padding twice: for what to skip, and to mask. If
        # the spans say what to skip, and there are no holes, it reads none.
        | {"q": splits + a["n_sequence_splits"], "pad": 2 * a["Hkv"] * tiles * visible * scanned}
    )


def _parts(boundaries: Tensor) -> int:
    """How many prefixes or sequences there are; they count as equally long."""
    return boundaries.shape[0] - 1


def _once(step: launch.Launch, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Every operand once."""
    return {}


# By kernel, how often each operand is read. Operands that are not named are read once.
REREADS: dict[str, Any] = {
    "prefix_attn_fwd_kernel": _row_sweep,
    "prefix_attn_bwd_delta_kernel": _once,
    "prefix_attn_bwd_dq_kernel": _row_sweep,
    "prefix_attn_bwd_dkv_kernel": _key_sweep,
    "prefix_attn_bwd_dprefix_kernel": _prefix_sweep,
    "prefix_attn_bwd_dprefix_reduce_kernel": _once,
    "prefix_attn_decode_kernel": _decode,
    "prefix_attn_decode_merge_kernel": lambda step, tensors: None if "rows" in tensors else {},
}


def _mean_visible(Lq: int, Lk: int, group: int, rows: int) -> float:
    """The average number of keys that a causal tile of packed rows reads."""
    total, starts = 0, range(0, group * Lq, rows)
    for first in starts:
        last = min(first + rows, group * Lq) - 1
        newest = last % Lq if first // Lq == last // Lq else Lq - 1
        total += min(max(newest + 1 + Lk - Lq, 0), Lk)
    return total / len(starts)
