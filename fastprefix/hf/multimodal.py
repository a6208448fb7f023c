"""Models that see or hear: only the language model inside them attends to the prefix.

The outer model puts images among the text's embeddings and computes their positions. The language
model receives both in their final form. The towers in front of it attend without a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.hf.versions import parameters


@dataclass(frozen=True, eq=False)
class OuterInputs:
    """What the caller passed to the outer model, which passes its own masks and positions on.

    Attributes:
        attention_mask: as given: [B, L], 1 = real token; or a finished mask; or None.
        position_ids: whether any were given.
    """

    attention_mask: Any
    position_ids: bool

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> OuterInputs:
        """Reads them from a call's keyword arguments."""
        return cls(kwargs.get("attention_mask"), kwargs.get("position_ids") is not None)


def language_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """The language model inside a model that sees or hears; None for a plain language model."""
    text = model.config.get_text_config()
    if text is model.config or isinstance(model.config, type(text)):
        return None
    if "decoder_input_ids" in parameters(model):  # its decoder is no model that runs alone
        return None
    for module in model.modules():
        if (
            module is not model
            and isinstance(module, PreTrainedModel)
            and isinstance(module.config, type(text))
            and {"inputs_embeds", "position_ids"} <= set(parameters(module))
        ):
            return module
    return None


def models_around(model: PreTrainedModel, inside: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that contain a language model, the outermost one included."""
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and module is not inside
        and any(part is inside for part in module.modules())
    ]


def next_position(tokens: int, positions: Tensor | None) -> int:
    """Position of the text that follows a prompt: an image takes fewer positions than tokens.

    Args:
        tokens: length of the prompt.
        positions: position_ids of its language model. They have 3 dimensions if images have
            positions of their own: [3 or 4 axes, B, L], where the first of 4 axes counts tokens.
    """
    if positions is None or positions.dim() != 3:
        return tokens
    return int(positions[-3:].max()) + 1
