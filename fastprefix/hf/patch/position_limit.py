"""Models with learned absolute positions know a limited number; a moved text must still fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def position_limit(model: PreTrainedModel, stack: nn.Module) -> int | None:
    """How many positions a stack of layers has embeddings for; None without a limit.

    We look for an ``nn.Embedding``, other than the token embedding, whose length equals the
    config's maximum position. Extra rows that OPT and BART reserve (``offset``) are not counted.
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
    """Raises ValueError if a text's last position is beyond the last one that the model knows.

    Args:
        limit: see :func:`position_limit`.
        offset: by how much the prefix moved the text.
        reach: upper bound on where the moved text ends; it counts padding, which takes no position.
        positions: of the moved text; None if it ends exactly at reach. Their values are read only
            if that costs no synchronisation, or if reach is beyond the limit.
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
