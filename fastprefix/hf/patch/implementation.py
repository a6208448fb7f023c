"""Sets our attention implementation in a model, and puts back what was there before."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from fastprefix.hf.layer.attention import NAME
from fastprefix.hf.layer.masks import add_patched, remove_patched
from fastprefix.hf.patch.patch import PATCH, Patch
from fastprefix.hf.patch.probe import UnsupportedModelError
from fastprefix.hf.versions import set_attention

# All patched models. Two of them may share a config.
PATCHED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """The configs of a model and of its parts, and the implementation to restore in each."""
    before = {
        id(config): implementation
        for patch in _patches()
        for config, implementation in patch.previous
    }
    configs = {
        id(config): config
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for config in _with_sub_configs(part.config)
    }
    return [
        (config, before.get(key, config._attn_implementation_internal))
        for key, config in configs.items()
    ]


def _with_sub_configs(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _with_sub_configs(part)


def restore(previous: list[tuple[Any, str | None]]) -> None:
    """Restores implementations, except in configs that another patched model shares."""
    shared = {id(config) for patch in _patches() for config, _ in patch.previous}
    for config, implementation in previous:
        if id(config) not in shared:
            config._attn_implementation_internal = implementation
            remove_patched(config)


def set_default(model: PreTrainedModel) -> None:
    """Gives a model the attention that transformers chooses by default: sdpa, or else eager."""
    set_attention(model, model.get_correct_attn_implementation(None))


def set_implementation(model: PreTrainedModel, own_use: bool = True) -> None:
    """Makes ours the attention implementation of a model.

    Args:
        model: the model.
        own_use: whether it uses causal masks itself, or may do so.

    Raises:
        UnsupportedModelError: its attention does not go through transformers' interface.
    """
    set_attention(model, NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not route its attention through transformers' "
            "AttentionInterface, so no other attention can take its place"
        )
    for config, _ in implementations(model):
        add_patched(config, own_use)


def _patches() -> Iterator[Patch]:
    """What patching left on all models that are patched."""
    for model in PATCHED:
        patch: Patch | None = getattr(model, PATCH, None)
        if patch is not None:
            yield patch
