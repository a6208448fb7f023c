"""The networks that compute a prefix or a prompt from an embedding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

# The kinds of network, by PEFT's names.
Reparameterization = Literal["MLP", "LSTM"]


def perceptron(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers from each size to the next, with an activation between them."""
    modules: list[nn.Module] = []
    for size, next_size in pairwise(sizes):
        modules += [nn.Linear(size, next_size), activation()]
    return nn.Sequential(*modules[:-1])


def lstm_and_perceptron(
    input_size: int, hidden_size: int, output_size: int, num_layers: int, dropout: float = 0.0
) -> tuple[nn.LSTM, nn.Sequential]:
    """The network of P-tuning (Liu et al. 2021, section 3.2): LSTM -> linear -> ReLU -> linear.

    Args:
        input_size: the width of the embedding.
        hidden_size: the hidden size of the LSTM in each direction; the perceptron's is twice that.
        output_size: the width of the output.
        num_layers: the number of layers of the LSTM.
        dropout: the dropout between these layers.

    Returns:
        The bidirectional LSTM, for an input [P, input_size], and the perceptron, for its output.
    """
    lstm = nn.LSTM(input_size, hidden_size, num_layers, dropout=dropout, bidirectional=True)
    return lstm, perceptron((2 * hidden_size, 2 * hidden_size, output_size), nn.ReLU)


def last_linear(network: nn.Module) -> nn.Linear:
    """The last layer of a perceptron."""
    *_, last = network.children()
    assert isinstance(last, nn.Linear)
    return last


@torch.no_grad()
def learn_difference_from(values: Tensor, start: Tensor, outputs: Iterable[nn.Linear]) -> None:
    """Makes the sum of a constant and a network's output start from given values.

    No embedding makes a random network give chosen values. So the constant becomes these values,
    and the last layers become zero. At first the network adds nothing.

    Args:
        values: what the sum is to be at first.
        start: the constant, which is overwritten.
        outputs: the last layers of the network.
    """
    for layer in outputs:
        layer.weight.zero_()
        layer.bias.zero_()
    start.copy_(values)


def orthogonalize(network: nn.Module) -> None:
    """Makes a network's weights orthogonal, with the gain of tanh, and sets its biases to zero.

    Saxe et al. 2014. In an LSTM, each gate's part of a matrix is orthogonal by itself.
    """
    gain = nn.init.calculate_gain("tanh")
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
                continue
            gates = 4 if isinstance(module, nn.LSTM) else 1
            for part in parameter.data.chunk(gates):
                nn.init.orthogonal_(part, gain)
