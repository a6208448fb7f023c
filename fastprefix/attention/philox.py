"""Philox 4x32-10 (Salmon et al., SC 2011) in PyTorch: which attention weights dropout keeps.

In the reference and triton backends a weight's fate is a pure function of the seed and of its
coordinates. So both, and the backward as the forward, drop the same ones. The composed backend
drops others for the same seed (:mod:`fastprefix.attention.backends.composed.scores`): on a CPU
these ten rounds for each weight take longer than the rest of a training step. Words of 32 bits are
kept in int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)


def philox(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words for a key and a counter; int64 tensors of words, broadcast together."""
    k0, k1 = (word & _MASK for word in key)
    c0, c1, c2, c3 = (word & _MASK for word in counter)
    for _ in range(rounds):
        high0, low0 = _multiply(_ROUND[0], c0)
        high1, low1 = _multiply(_ROUND[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY[0]) & _MASK, (k1 + _KEY[1]) & _MASK
    return c0, c1, c2, c3


def keep(seed: Tensor, dropout_p: float, column: Tensor, row: Tensor, head: Tensor) -> Tensor:
    """Whether dropout keeps a weight, broadcast over its coordinates.

    Args:
        seed: [1] int64; its low and high half are the key.
        dropout_p: share to drop, 0 <= dropout_p < 1.
        column: n in [prefix ; sequence], counted from the start of the row's own prefix.
        row: i, the query's index inside its sequence.
        head: b * Hq + h.
    """
    words = philox((seed, seed >> 32), (column, row, head, torch.zeros_like(seed)))
    return words[0] >= int(dropout_p * 2**32)


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product.

    It may wrap around 64 bits, which changes neither of its words: they are read as bits.
    """
    product = factor * word
    return (product >> 32) & _MASK, product & _MASK
