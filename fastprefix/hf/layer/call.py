"""One layer's call of the operator, on its way from what a model hands down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastprefix.attention import prefix_attention


@dataclass(eq=False)
class Call:
    """Arguments of :func:`fastprefix.prefix_attention`, of the same names, and how heads reweight.

    Attributes:
        head_bias: [Hq] added to the scores of the prefix, or [Hq, N] for N packed ones.
        gate: [Hq], or [Hq, N]; see :class:`fastprefix.kv.Reweighting`.
        gated: which of N packed prefixes have a gate.
        numbers: prefix_index where the host knows it, one for each row or for each of as many
            groups of rows; with a head_bias or a gate of packed prefixes alone.
        options: those that hold for every part of a call alike: scale, softcap, dropout_p, sinks,
            backend.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None
    prefix_index: Tensor | None = None
    prefix_lengths: Tensor | None = None
    prefix_bias: Tensor | None = None
    prefix_in_window: bool = False
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    is_causal: bool = False
    sliding_window: int | None = None
    head_bias: Tensor | None = None
    gate: Tensor | None = None
    gated: frozenset[int] = frozenset()
    numbers: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Tensor:
        """[B, Hq, Lq, Dv], head_bias and gate left aside: :mod:`fastprefix.hf.layer.reweighted`."""
        return prefix_attention(
            self.query,
            self.key,
            self.value,
            self.prefix_key,
            self.prefix_value,
            prefix_index=self.prefix_index,
            prefix_lengths=self.prefix_lengths,
            prefix_bias=self.prefix_bias,
            prefix_in_window=self.prefix_in_window,
            attn_mask=self.attn_mask,
            key_padding_mask=self.key_padding_mask,
            cu_seqlens=self.cu_seqlens,
            is_causal=self.is_causal,
            sliding_window=self.sliding_window,
            **self.options,
        )
