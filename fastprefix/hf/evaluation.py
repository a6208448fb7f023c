"""Runs of a model that leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, in this block; the modules' modes are put back.

    A model that sees also remembers by how much its last call's images moved the positions of what
    follows them. That is put back too.
    """
    training = [module for module in model.modules() if module.training]
    remembered = {x: x.rope_deltas for x in model.modules() if hasattr(x, "rope_deltas")}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for seeing, deltas in remembered.items():
            seeing.rope_deltas = deltas
