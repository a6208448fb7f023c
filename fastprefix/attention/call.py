"""What a call asks for beyond its tensors, as one value from the public function to the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The checked arguments of a call besides query, key, value and the prefix.

    Fields are named like the arguments of :func:`fastprefix.prefix_attention`, and in the order of
    :data:`SCHEMA`. None, 0.0 and False stand for what the call does not use.

    Attributes:
        is_causal: query i sees sequence keys 0 .. p_i, where p_i = i + Lk - Lq.
        scale: factor on the scores.
        sinks: [Hq].
        prefix_bias: [Hq], or [Hq, Lq, P] by packed column.
        key_padding_mask: [B, Lk] bool, True = real token.
        attn_mask: bool or additive, broadcastable to [B, Hq, Lq, Lk].
        prefix_index: [B] int32 ([M] with cu_seqlens), -1 for no prefix.
        prefix_lengths: [N] int32.
        cu_seqlens: [M + 1] int32.
        sliding_window: keys with |p_i - j| < sliding_window are seen.
        softcap: scores become softcap * tanh(score / softcap).
        prefix_in_window: the prefix slides out of the window as text would.
        dropout_p: share of the weights that is dropped.
        dropout_seed: [1] int64 on the query's device; there if and only if dropout_p is.
        batch_invariant: a sequence's output has the same bits whatever the others are.
    """

    is_causal: bool
    scale: float
    sinks: Tensor | None = None
    prefix_bias: Tensor | None = None
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    prefix_index: Tensor | None = None
    prefix_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    prefix_in_window: bool = False
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    batch_invariant: bool = False

    def keywords(self) -> dict[str, Any]:
        """is_causal, scale and what else the call uses, by name: the launchers' keywords."""
        return {
            name: value
            for name, value in zip(self._fields, self, strict=True)
            if name in ("is_causal", "scale")
            or (value is not None and value is not False and (name != "dropout_p" or value > 0.0))
        }


# The fields as arguments of a registered op.
SCHEMA = (
    "bool is_causal, float scale, Tensor? sinks, Tensor? prefix_bias, Tensor? key_padding_mask, "
    "Tensor? attn_mask, Tensor? prefix_index, Tensor? prefix_lengths, Tensor? cu_seqlens, "
    "SymInt? sliding_window, float? softcap, bool prefix_in_window, float dropout_p, "
    "Tensor? dropout_seed, bool batch_invariant"
)
