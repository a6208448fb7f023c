"""The encoders that callbacks work on."""

from __future__ import annotations

from torch import nn

from fastprefix.encoders import Encoder


def trained_encoders(model: nn.Module) -> list[Encoder]:
    """The encoders of a model that are trained.

    Raises:
        ValueError: none is trained.
    """
    encoders = [
        module
        for module in model.modules()
        if isinstance(module, Encoder) and module.embedding.requires_grad
    ]
    if not encoders:
        raise ValueError(
            f"model: got a {type(model).__name__} without a trainable prefix, takes one with"
        )
    return encoders
