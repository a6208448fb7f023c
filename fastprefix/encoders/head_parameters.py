"""The biases or gates of a prefix's query heads, as parameters or as fixed numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.kv import Reweighting
from fastprefix.kv.reweighting import Kind


@methods_refuse_unknown_arguments
class HeadParameters(nn.Module):
    """The biases or gates of a prefix. A call returns a :class:`fastprefix.kv.Reweighting`.

    Args:
        kind: "bias" or "gate".
        query_heads: Hq of each layer; 0 for a layer without a prefix.
        fixed: one number for all heads, which is not trained. If None, each head has a number that
            is trained and starts at 0.

    Attributes:
        numbers: [sum of query_heads], a parameter; if fixed, a buffer.
    """

    numbers: Tensor

    def __init__(self, kind: Kind, query_heads: Sequence[int], fixed: float | None = None) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.query_heads = tuple(query_heads)
        start = torch.full((sum(self.query_heads),), 0.0 if fixed is None else fixed)
        if fixed is None:
            self.numbers = nn.Parameter(start)
        else:
            self.register_buffer("numbers", start)

    def forward(self) -> Reweighting:
        """Returns the numbers in float32, whatever dtype the module was cast to."""
        return Reweighting(self.kind, self.numbers.float().split(self.query_heads))

    @torch.no_grad()
    def start_from(self, reweighting: Reweighting | None) -> None:
        """Starts from given numbers.

        Raises:
            ValueError: they have another kind, or belong to other heads.
        """
        if reweighting is None or reweighting.kind != self.kind:
            got = "none" if reweighting is None else f"a {reweighting.kind}"
            raise ValueError(f"reweighting: got {got}, takes a {self.kind} for each head")
        if reweighting.num_heads != self.query_heads:
            raise ValueError(
                f"reweighting: got {list(reweighting.num_heads)} heads, takes "
                f"{list(self.query_heads)}"
            )
        self.numbers.copy_(torch.cat(reweighting.heads))
