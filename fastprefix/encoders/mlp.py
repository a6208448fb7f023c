"""Keys and values as the output of a small network over an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprefix.encoders.flat import check_start, flat_width, to_prefix_kv
from fastprefix.kv import LayerShape, PrefixKV


class MLPEncoder(nn.Module):
    """embedding -> linear -> tanh -> linear (Li and Liang 2021, section 4.3, equation 4).

    The network is run once for a forward pass, not once for a row of the batch, and is dropped at
    export: what ships is the prefix it ends up with.

    Args:
        shapes: the layers' key and value shapes.
        num_virtual_tokens: P.
        embedding_size: width of the embedding.
        hidden_size: width of the hidden layer.
        position_offset: position of the first token behind the prefix; P if None.
        dropout: probability of zeroing a number of the prefix in training.
        init_std: standard deviation of the embedding's random start.
    """

    start: Tensor

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_virtual_tokens: int,
        *,
        embedding_size: int,
        hidden_size: int,
        position_offset: int | None = None,
        dropout: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.shapes = tuple(shapes)
        self.position_offset = position_offset
        width = flat_width(self.shapes)
        self.embedding = nn.Parameter(init_std * torch.randn(num_virtual_tokens, embedding_size))
        self.transform = nn.Sequential(
            nn.Linear(embedding_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("start", torch.zeros(num_virtual_tokens, width))

    def forward(self) -> PrefixKV:
        """The prefix, with gradients; dropout applies in training."""
        flat = self.start + self.transform(self.embedding)
        return to_prefix_kv(self.dropout(flat), self.shapes, self.position_offset)

    @torch.no_grad()
    def start_from(self, flat: Tensor) -> None:
        """Starts from given numbers [P, width]: the network learns the difference from them.

        No embedding makes a random network give chosen outputs, so the numbers become a constant
        to which the network, its last layer zeroed, at first adds nothing.

        Raises:
            ValueError: flat has another shape.
        """
        check_start(flat, self.embedding.shape[0], self.shapes)
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
        self.start.copy_(flat)
