"""Makes "fastprefix" an ``attn_implementation`` of transformers, without importing transformers.

``import fastprefix`` is enough for ``from_pretrained(..., attn_implementation="fastprefix")``,
whichever of the two libraries is imported first. What is registered here hands its calls on to
:mod:`fastprefix.hf`, which is imported with the first of them and then registers its own functions.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from fastprefix.after_import import after_import

NAME = "fastprefix"


def attention(*args: Any, **kwargs: Any) -> Any:
    """See :func:`fastprefix.hf.layer.attention.attention_interface`."""
    from fastprefix.hf.layer.attention import attention_interface

    return attention_interface(*args, **kwargs)


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """See :func:`fastprefix.hf.layer.masks.prefix_attention_mask`."""
    from fastprefix.hf.layer.masks import prefix_attention_mask

    return prefix_attention_mask(*args, **kwargs)


def _register_attention(module: ModuleType) -> None:
    if NAME not in module.AttentionInterface().valid_keys():
        module.AttentionInterface.register(NAME, attention)


def _register_mask(module: ModuleType) -> None:
    if NAME not in module.AttentionMaskInterface().valid_keys():
        module.AttentionMaskInterface.register(NAME, attention_mask)


def register() -> None:
    """Registers with transformers when it comes to that: two modules of it, each for itself."""
    after_import("transformers.modeling_utils", _register_attention)
    after_import("transformers.masking_utils", _register_mask)
