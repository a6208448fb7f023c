"""Rotary frequencies that depend on how long a text is: a prompt's keys then go with some texts.

Such a model (longrope, dynamic scaling) rotates a whole sequence by frequencies that it picks by
the sequence's last position. A prompt's keys were rotated by those of the prompt alone, which one
sequence of prompt and text has as well only where both lie on the same side of a threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.layer.packing import inputs_of
from fastprefix.hf.versions import cache_of


def frequency_thresholds(config: Any) -> tuple[tuple[str, int], ...]:
    """The kinds of rotary embedding that depend on the length, and up to which they do not."""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    flat = [given] if {"rope_type", "type"} & set(given) else list(given.values())
    found: dict[tuple[str, int], None] = {}
    for one in flat:
        kind = (one.get("rope_type") or one.get("type") or "") if isinstance(one, dict) else ""
        known = getattr(text, "max_position_embeddings", 0)
        if kind == "longrope":
            original = getattr(text, "original_max_position_embeddings", None) or known
            found[kind, int(one.get("original_max_position_embeddings") or original)] = None
        elif "dynamic" in kind and known:
            found[kind, int(known)] = None
    return tuple(found)


def check_dropped_cache(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError where generate() has thrown a text's cache away (Phi3, in 5.17).

    It does so where the text alone, as long as it thinks, crosses the threshold, and goes on with
    the last token alone.
    """
    mask = kwargs.get("attention_mask")
    if cache_of(kwargs) is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    if mask.shape[1] > inputs_of(kwargs).shape[1]:
        raise NotImplementedError(
            f"{type(module).__name__}: got an attention_mask of {mask.shape[1]} tokens for "
            f"{inputs_of(kwargs).shape[1]} and no cache: this release of transformers drops it "
            "where a text grows beyond the threshold of its rotary frequencies; use_cache=False"
        )


def check_frequencies(
    limits: Iterable[tuple[str, int]], prompts: Iterable[int], reach: int, positions: Tensor
) -> None:
    """Raises NotImplementedError where a prompt's keys have other frequencies than the text's.

    Args:
        limits: see :func:`frequency_thresholds`.
        prompts: how many positions each prompt of the call takes.
        reach: how far the moved text reaches at most: with padding, which takes no position.
        positions: of the moved text. Only looked at where the answer may be an error.
    """
    if torch.compiler.is_compiling():
        return
    prompts = sorted(set(prompts))
    for kind, limit in limits:
        # beyond the threshold dynamic scaling goes on changing, and longrope does not
        short = [one for one in prompts if kind != "longrope" or one <= limit]
        if not short or (positions.device.type != "cpu" and reach <= limit):
            continue
        last = int(positions.max()) + 1
        if last > limit:
            raise NotImplementedError(
                f"{kind}: a prompt of {short[0]} positions with a text up to position {last - 1}; "
                f"beyond {limit} positions the model rotates the whole sequence by other "
                "frequencies than those of the prompt's keys; put the prompt into input_ids"
            )
