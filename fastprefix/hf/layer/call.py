"""One layer's call of the operator, on its way from what a model hands down."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastprefix.attention.api import attention_with_options
from fastprefix.attention.step import Step
from fastprefix.options import Options


class Call(NamedTuple):
    """A call of the operator, and how each head weights the prefix.

    Attributes:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        options: of the operator.
        prefix_key: [Hkv, P, D], or None.
        prefix_value: [Hkv, P, Dv], or None.
        backend: of the operator.
        head_bias: [Hq], added to the scores of the prefix; [Hq, N] for N packed prefixes.
        gate: [Hq], or [Hq, N]; see :class:`fastprefix.kv.Reweighting`.
        gated: which of N packed prefixes have a gate.
        prefix_ids: prefix_index as numbers on the host: one for each row, or one for each group of
            rows if the groups are equally large. Given only if packed prefixes have a head_bias or
            a gate.
        step: what the layers of this forward share, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: Options
    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None
    backend: str = "auto"
    head_bias: Tensor | None = None
    gate: Tensor | None = None
    gated: frozenset[int] = frozenset()
    prefix_ids: tuple[int, ...] = ()
    step: Step | None = None

    def run(self) -> Tensor:
        """[B, Hq, Lq, Dv]. Ignores head_bias and gate: :mod:`fastprefix.hf.layer.reweighted`."""
        out, _ = attention_with_options(
            self.query,
            self.key,
            self.value,
            self.prefix_key,
            self.prefix_value,
            self.options,
            self.backend,
            self.step,
        )
        return out

    def with_options(self, **changes: Any) -> Call:
        """The call with other values of some options."""
        return self._replace(options=self.options._replace(**changes))

    def without_prefix(self) -> Call:
        """The call over the text only."""
        call = self._replace(prefix_key=None, prefix_value=None, head_bias=None)
        return call.with_options(
            prefix_index=None, prefix_lengths=None, prefix_bias=None, prefix_in_window=False
        )
