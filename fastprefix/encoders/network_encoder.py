"""The base of encoders that compute a prefix with a network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.encoders.encoder import Encoder
from fastprefix.encoders.networks import learn_difference_from
from fastprefix.kv import LayerShape
from fastprefix.kv.flat import FlatLayout

_SAMPLES = 256


@methods_refuse_unknown_arguments
class NetworkEncoder(Encoder):
    """An encoder whose network reads an embedding. It runs once for a forward, not for each row.

    Export drops the network, and writes only the prefix that it computes. A subclass makes its
    network, then calls :meth:`_scale`, and implements :meth:`run` and :meth:`outputs`.

    Args:
        shapes: see :class:`Encoder`.
        lengths: see :class:`Encoder`.
        embedding_size: the width of the embedding.
        options: the other arguments of :class:`Encoder`.

    Attributes:
        embedding: [trained tokens, embedding_size], normally distributed at the start.
        start: [trained tokens, width], a constant that is added to the network's output.
    """

    start: Tensor

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        lengths: int | Sequence[int],
        *,
        embedding_size: int,
        **options: Any,
    ) -> None:
        super().__init__(shapes, lengths, **options)
        P = self.trained.num_virtual_tokens
        self.embedding = nn.Parameter(torch.randn(P, embedding_size))
        self.register_buffer("start", torch.zeros(P, self.layout.width))

    @abstractmethod
    def run(self, embedding: Tensor) -> Tensor:
        """Computes the network's output [P, width] for an embedding [P, embedding_size]."""

    @abstractmethod
    def outputs(self) -> Sequence[nn.Linear]:
        """The last layers of the network, in the order of their columns."""

    def compute(self) -> Tensor:
        """See :meth:`Encoder.compute`."""
        return self.start + self.run(self.embedding)

    @torch.no_grad()
    def _scale(self, init_std: float) -> None:
        """Gives the tokens of a new network a mean of 0 and the standard deviation init_std.

        Without this, the biases of a network make its tokens differ more from 0 than from each
        other. Mean and deviation are measured with many random embeddings, because the embedding
        itself has only a few rows.
        """
        outputs = self.run(torch.randn(_SAMPLES, self.embedding.shape[1]))
        means = outputs.mean(0).split([layer.out_features for layer in self.outputs()])
        factor = init_std / outputs.std(0).square().mean().sqrt()
        for layer, mean in zip(self.outputs(), means, strict=True):
            layer.bias.sub_(mean).mul_(factor)
            layer.weight.mul_(factor)
        if self.frozen is not None:
            self.frozen.normal_(0.0, init_std)

    def _start_from(self, flat: Tensor) -> None:
        learn_difference_from(flat, self.start, self.outputs())

    def _new_numbers(self, count: int) -> Tensor:
        return torch.randn(count)

    def _set_layout(self, layout: FlatLayout) -> None:
        more = layout.num_virtual_tokens - self.layout.num_virtual_tokens
        self.start = nn.functional.pad(self.start, (0, 0, 0, more))
        super()._set_layout(layout)
