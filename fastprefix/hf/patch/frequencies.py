"""Rotary frequencies that depend on the length of a text: a prompt's keys then fit some texts only.

Such a model (longrope, dynamic scaling) chooses the frequencies for a whole sequence by the
sequence's last position. A prompt's keys were rotated when the prompt was the whole sequence. They
are right for prompt and text in one sequence only if both lengths lie on the same side of a
threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.layer.packing import inputs_of
from fastprefix.hf.versions import cache_of


def frequency_thresholds(config: Any) -> tuple[tuple[str, int], ...]:
    """Kinds of rotary embedding that depend on the length, and up to which length they do not."""
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
    """Raises NotImplementedError if generate() has dropped the cache of a text (Phi3, in 5.17).

    It does so when the text, by its own count, crosses the threshold. It then goes on with nothing
    but the last token.
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
    """Raises NotImplementedError if a prompt's keys have other frequencies than the text needs.

    Args:
        limits: see :func:`frequency_thresholds`.
        prompts: how many positions each prompt of the call takes.
        reach: upper bound on where the moved text ends; it counts padding, which takes no position.
        positions: of the moved text. Their values are read only if reach is beyond a threshold, or
            on the CPU.
    """
    if torch.compiler.is_compiling():
        return
    prompts = sorted(set(prompts))
    for kind, limit in limits:
        # beyond the threshold dynamic scaling keeps changing, longrope does not
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
