"""Models that see or hear besides: prefixes belong to the language model inside, and to it alone.

The outer model puts images among the text's embeddings and knows their positions; the language
model gets both when they are final. The towers in front of it attend without a prefix.
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
    """What the caller told the outer model, which hands masks and positions of its own down.

    Attributes:
        attention_mask: as given: [B, L], 1 = real token; or one that was made already; or None.
        position_ids: whether any were given.
    """

    attention_mask: Any
    position_ids: bool

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> OuterInputs:
        """From a call's keyword arguments."""
        return cls(kwargs.get("attention_mask"), kwargs.get("position_ids") is not None)


def language_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """The language model inside a model that sees or hears; None for a model that is one itself."""
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
    """The models that a language model is part of, the whole one among them."""
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
        tokens: of the prompt.
        positions: what its language model was told; of 3 axes, or of 4 where the first one counts
            tokens, wherever images have positions of their own.
    """
    if positions is None or positions.dim() != 3:
        return tokens
    return int(positions[-3:].max()) + 1
