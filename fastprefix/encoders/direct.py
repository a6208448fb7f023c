"""Keys and values themselves as parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprefix.encoders.flat import check_start, flat_width, to_prefix_kv
from fastprefix.kv import LayerShape, PrefixKV


class DirectEncoder(nn.Module):
    """One trainable number for each number of the prefix (Li and Liang 2021, "no reparam").

    Args:
        shapes: the layers' key and value shapes.
        num_virtual_tokens: P.
        position_offset: position of the first token behind the prefix; P if None.
        dropout: probability of zeroing a number of the prefix in training.
        init_std: standard deviation of the random start.

    Attributes:
        embedding: [P, width], in the layout of :mod:`fastprefix.encoders.flat`.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_virtual_tokens: int,
        *,
        position_offset: int | None = None,
        dropout: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.shapes = tuple(shapes)
        self.position_offset = position_offset
        self.embedding = nn.Parameter(
            init_std * torch.randn(num_virtual_tokens, flat_width(self.shapes))
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self) -> PrefixKV:
        """The prefix, with gradients; dropout applies in training."""
        return to_prefix_kv(self.dropout(self.embedding), self.shapes, self.position_offset)

    @torch.no_grad()
    def start_from(self, flat: Tensor) -> None:
        """Starts from given numbers [P, width].

        Raises:
            ValueError: flat has another shape.
        """
        check_start(flat, self.embedding.shape[0], self.shapes)
        self.embedding.copy_(flat)
