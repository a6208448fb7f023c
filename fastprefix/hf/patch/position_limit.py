"""Learned absolute positions end somewhere: a text moved behind a prefix must still fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def position_limit(model: PreTrainedModel, stack: nn.Module) -> int | None:
    """How many positions a stack of layers has embeddings for; None where there is no end.

    The embedding is the one that is as long as the config says, the tokens' own aside, but for rows
    that it keeps for itself (OPT, BART).
    """
    config = model.config.get_text_config()
    fields = ("max_position_embeddings", "max_target_positions")
    lengths = {getattr(config, field, None) for field in fields}
    for module in stack.modules():
        if isinstance(module, nn.Embedding) and _is_no_vocabulary(module, model):
            known = module.num_embeddings - getattr(module, "offset", 0)
            if known in lengths:
                return known
    return None


def check_position_limit(
    limit: int | None, offset: int, reach: int, positions: Tensor | None
) -> None:
    """Raises ValueError where a text's last position lies beyond the last one that is known.

    Args:
        limit: see :func:`position_limit`.
        offset: by how much the prefix moved the text.
        reach: how far the moved text reaches at most: with padding, which takes no position.
        positions: of the moved text; None if it reaches exactly that far. Only looked at where the
            answer costs no synchronisation, or may be an error.
    """
    if limit is None or not offset or torch.compiler.is_compiling():
        return
    if positions is not None and (reach > limit or positions.device.type == "cpu"):
        reach = int(positions.max()) + 1
    if reach > limit:
        raise ValueError(
            f"position_offset: got {offset}, which moves the text's last token to position "
            f"{reach - 1}; the model has learned {limit} positions, 0 to {limit - 1}"
        )


def _is_no_vocabulary(embedding: nn.Embedding, model: PreTrainedModel) -> bool:
    try:
        vocabulary: Any = model.get_input_embeddings()
    except NotImplementedError:  # a model that reads no text
        vocabulary = None
    return embedding.weight is not getattr(vocabulary, "weight", None)
