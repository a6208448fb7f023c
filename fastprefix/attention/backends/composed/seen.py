"""What the queries of one kernel call see of its keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Seen(NamedTuple):
    """What the queries see; without any of these, every query sees every key.

    Attributes:
        is_causal: query i sees keys 0 .. i (with as many keys as queries).
        mask: added to the scores, broadcastable to [B, H, Lq, Lk]; FLOOR hides a key.
        window: query i sees the keys j with |i + Lk - Lq - j| < window. Only for kernels that
            take all (:class:`~fastprefix.attention.backends.composed.kernels.Kernels`), whose
            causality is aligned to the last key, too.
        cu_seqlens: [M + 1] int32, offsets of sequences that see only themselves. Only for kernels
            that take all, with B = 1.
    """

    is_causal: bool = False
    mask: Tensor | None = None
    window: int | None = None
    cu_seqlens: Tensor | None = None


ALL = Seen()
