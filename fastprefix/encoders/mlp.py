"""The encoder that computes keys and values with a perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.encoders.network_encoder import NetworkEncoder
from fastprefix.encoders.networks import last_linear, orthogonalize, perceptron
from fastprefix.kv import LayerShape


@methods_refuse_unknown_arguments
class MLPEncoder(NetworkEncoder):
    """embedding -> linear (-> tanh -> linear) (Li and Liang 2021, section 4.3).

    Args:
        shapes: see :class:`Encoder`.
        lengths: see :class:`Encoder`.
        embedding_size: the width of the embedding.
        hidden_size: the width of the hidden layers.
        num_layers: the number of linear layers, 1, 2 (as in the paper) or 3, with tanh between
            them.
        per_layer: whether every attention layer has a perceptron of its own. They share one
            embedding.
        orthogonal: whether the weights start orthogonal.
        init_std: the standard deviation of the prefix at the random start.
        options: the other arguments of :class:`Encoder`.

    Attributes:
        transform: the perceptron; with per_layer, a list of them.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        lengths: int | Sequence[int],
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 2,
        per_layer: bool = False,
        orthogonal: bool = False,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(shapes, lengths, embedding_size=embedding_size, **options)
        self.per_layer = per_layer
        hidden = [embedding_size] + [hidden_size] * (num_layers - 1)
        self.transform: nn.Sequential | nn.ModuleList
        if per_layer:
            networks = (perceptron([*hidden, width], nn.Tanh) for width in self.layout.widths)
            self.transform = nn.ModuleList(networks)
        else:
            self.transform = perceptron([*hidden, self.layout.width], nn.Tanh)
        if orthogonal:
            orthogonalize(self.transform)
        self._scale(init_std)

    def run(self, embedding: Tensor) -> Tensor:
        """See :meth:`NetworkEncoder.run`."""
        if self.per_layer:
            return torch.cat([transform(embedding) for transform in self.transform], dim=1)
        return self.transform(embedding)

    def outputs(self) -> Sequence[nn.Linear]:
        """See :meth:`NetworkEncoder.outputs`."""
        networks = self.transform.children() if self.per_layer else [self.transform]
        return [last_linear(network) for network in networks]
