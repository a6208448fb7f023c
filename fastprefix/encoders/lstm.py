"""The encoder that computes keys and values with an LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.encoders.network_encoder import NetworkEncoder
from fastprefix.encoders.networks import last_linear, lstm_and_perceptron, orthogonalize
from fastprefix.kv import LayerShape


@methods_refuse_unknown_arguments
class LSTMEncoder(NetworkEncoder):
    """embedding -> bidirectional LSTM -> linear -> ReLU -> linear (Liu et al. 2021, section 3.2).

    This is P-tuning's network ("GPT Understands, Too"). Here its output is keys and values, not
    input embeddings. Each virtual token depends on the others.

    Args:
        shapes: see :class:`Encoder`.
        lengths: see :class:`Encoder`.
        embedding_size: the width of the embedding.
        hidden_size: the hidden size of the LSTM in each direction; the perceptron's is twice that.
        num_layers: the number of layers of the LSTM.
        orthogonal: whether the weights start orthogonal.
        init_std: the standard deviation of the prefix at the random start.
        options: the other arguments of :class:`Encoder`.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        lengths: int | Sequence[int],
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 2,
        orthogonal: bool = False,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(shapes, lengths, embedding_size=embedding_size, **options)
        self.lstm, self.transform = lstm_and_perceptron(
            embedding_size, hidden_size, self.layout.width, num_layers
        )
        if orthogonal:
            orthogonalize(self.lstm)
            orthogonalize(self.transform)
        self._scale(init_std)

    def run(self, embedding: Tensor) -> Tensor:
        """See :meth:`NetworkEncoder.run`."""
        hidden, _ = self.lstm(embedding)  # [P, 2 * hidden_size], one sequence without a batch
        return self.transform(hidden)

    def outputs(self) -> Sequence[nn.Linear]:
        """See :meth:`NetworkEncoder.outputs`."""
        return [last_linear(self.transform)]
