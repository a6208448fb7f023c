"""Parameterisations of an input-level prompt. The module, called, gives the prompt [P, width]."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from fastprefix.tuning.configs.prompt_config import PromptConfig


class PromptEncoder(nn.Module):
    """The prompt's embeddings themselves, or a network that computes them.

    The networks are those of PEFT's PromptEncoder (P-tuning, Liu et al. 2021): an MLP of three
    linear layers, or a bidirectional LSTM with an MLP of two on top. They are dropped at export.

    Args:
        config: see :class:`PromptConfig`.
        width: of the model's embeddings.

    Attributes:
        embedding: [P, width], the prompt or what the network reads.
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
            self.lstm = nn.LSTM(
                width,
                hidden,
                config.encoder_num_layers,
                batch_first=True,
                dropout=config.encoder_dropout,
                bidirectional=True,
            )
            self.mlp = _mlp(2 * hidden, 2 * hidden, width)
        elif kind == "MLP":
            self.mlp = _mlp(width, hidden, hidden, width)
        start = torch.zeros(config.num_virtual_tokens, width) if kind else None
        self.register_buffer("start", start)

    def forward(self) -> Tensor:
        """The prompt [P, width], with gradients."""
        hidden: Tensor = self.embedding
        if self.lstm is not None:
            hidden = self.lstm(hidden[None])[0][0]
        if self.mlp is not None:
            hidden = self.start + self.mlp(hidden)
        return hidden

    @torch.no_grad()
    def start_from(self, embeddings: Tensor) -> None:
        """Starts from given embeddings [P, width].

        A network learns the difference from them: its last layer, zeroed, at first adds nothing.

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
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
        self.start.copy_(embeddings)


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
