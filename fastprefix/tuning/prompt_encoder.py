"""The module that computes a prompt of input embeddings from trainable parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprefix.encoders.networks import (
    last_linear,
    learn_difference_from,
    lstm_and_perceptron,
    perceptron,
)
from fastprefix.tuning.configs.prompt_config import PromptConfig


class PromptEncoder(nn.Module):
    """The embeddings of a prompt as a parameter, or a network that computes them.

    The networks are those of PEFT's PromptEncoder (P-tuning, Liu et al. 2021): an MLP of three
    linear layers, or a bidirectional LSTM followed by an MLP of two. Export drops them.

    Args:
        config: the prompt's configuration.
        width: the width of the model's embeddings.

    Attributes:
        embedding: [P, width], the prompt itself or the network's input.
        start: [P, width], a constant that is added to the network's output; None without a network.
    """

    start: Tensor | None

    def __init__(self, config: PromptConfig, width: int) -> None:
        super().__init__()
        kind = config.encoder_reparameterization_type
        std = config.init_std if config.init_std is not None else 1.0 if kind else 0.02
        self.embedding = nn.Parameter(std * torch.randn(config.num_virtual_tokens, width))
        hidden = config.encoder_hidden_size or width
        self.lstm: nn.LSTM | None = None
        self.mlp: nn.Sequential | None = None
        if kind == "LSTM":
            self.lstm, self.mlp = lstm_and_perceptron(
                width, hidden, width, config.encoder_num_layers, config.encoder_dropout
            )
        elif kind == "MLP":
            self.mlp = perceptron((width, hidden, hidden, width), nn.ReLU)
        start = torch.zeros(config.num_virtual_tokens, width) if kind else None
        self.register_buffer("start", start)

    def forward(self) -> Tensor:
        """Computes the prompt [P, width], with gradients."""
        hidden: Tensor = self.embedding
        if self.lstm is not None:
            hidden, _ = self.lstm(hidden)  # [P, 2 * hidden size], one sequence without a batch
        if self.mlp is not None:
            hidden = self.start + self.mlp(hidden)
        return hidden

    @torch.no_grad()
    def start_from(self, embeddings: Tensor) -> None:
        """Starts from given embeddings [P, width]. A network learns the difference from them.

        Raises:
            ValueError: embeddings have another shape.
        """
        if embeddings.shape != self.embedding.shape:
            raise ValueError(
                f"embeddings: got shape {list(embeddings.shape)}, takes [P, width] = "
                f"{list(self.embedding.shape)}"
            )
        if self.mlp is None or self.start is None:
            self.embedding.copy_(embeddings)
            return
        learn_difference_from(embeddings, self.start, [last_linear(self.mlp)])
