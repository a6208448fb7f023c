"""Positions of a text behind its prefix, where the model is told them by an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.layer.packing import inputs_of
from fastprefix.hf.multimodal import Asked
from fastprefix.hf.versions import cache_of, length_of, parameters


def behind_prefix(
    kwargs: dict[str, Any],
    offset: int | Tensor,
    bare: Tensor | None = None,
    asked: Asked | None = None,
) -> Tensor:
    """Positions of the text behind the prefix; pads take none.

    Explicit position_ids count the text from 0, and an image's own are the model's. Without them
    positions follow the attention mask, as generate() does: pads between prefix and text must not
    push the text away.

    Args:
        kwargs: of the call.
        offset: one for all, [B, 1] by row, or [1, L] by token of packed sequences.
        bare: bool [B, 1]: rows that have no prefix, and stand where the bare model puts them, which
            counts pads as well. None for no such row.
        asked: in the language model of a model that sees, what that one was told.
    """
    position_ids: Tensor | None = kwargs.get("position_ids")
    made = asked is not None and not asked.position_ids
    if position_ids is not None and (position_ids.dim() == 3 or not made):
        return position_ids + offset
    inputs = inputs_of(kwargs)
    length = inputs.shape[1]
    attention_mask = kwargs.get("attention_mask") if asked is None else asked.attention_mask
    seen = length_of(cache_of(kwargs))
    plain = positions = (torch.arange(length, device=inputs.device) + seen)[None]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        positions = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -length:]
        if bare is not None:
            positions = torch.where(bare, plain, positions)
    if position_ids is not None:  # the outer model's, which count pads, from 0 or 1 (PaliGemma)
        positions = positions + (position_ids - plain)
    # a row for each of the batch, as some models index them (Qwen4-Exp)
    return (positions + offset).expand(inputs.shape[0], -1)


def counts_padding(stack: nn.Module) -> bool:
    """Whether a bare decoder that is given no position_ids gives pads positions as well.

    Those with an embedding that reads the attention mask do not (OPT).
    """
    return not any(
        isinstance(module, nn.Embedding) and "attention_mask" in parameters(module)
        for module in stack.modules()
    )
