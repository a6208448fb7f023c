"""The forward pre-hooks of a patched model: the active prefix joins the call, positions move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.layer.attention import NAME, warn_of_no_weights
from fastprefix.hf.layer.packing import no_mask
from fastprefix.hf.patch.calls import StackCall
from fastprefix.hf.patch.patch import HOOKED, Patch
from fastprefix.hf.patch.positions import Placing
from fastprefix.hf.patch.threads import active_of
from fastprefix.hf.states.cached_state import forget_pieces, start_from_prompt
from fastprefix.hf.versions import by_name, cache_of


def inject(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    names: tuple[str, ...],
    placing: Placing,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: adds the active prefix and moves positions behind it.

    Args:
        module: a patched model, or a part of it.
        args: of its forward.
        kwargs: of its forward.
        names: of the forward's parameters.
        placing: how to tell this module where its text stands.
    """
    patch: Patch = getattr(module, HOOKED)
    config: Any = module.config
    if isinstance(cache_of(kwargs), PagedAttentionCache):
        raise NotImplementedError(
            f"{type(module).__name__}: continuous batching keeps keys and values in a paged cache, "
            "which fastprefix does not read; use generate(), or unpatch_model(model)"
        )
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        warn_of_no_weights()
    if config._attn_implementation != NAME:
        raise RuntimeError(
            f"{type(module).__name__}: its attention implementation was set to "
            f"{config._attn_implementation!r} after it was patched, so that no prefix would be "
            "seen; call unpatch_model and patch_model"
        )
    active = active_of(module, kwargs.get(NAME), patch)
    if isinstance(active, ActivePrefix) and active.positioned:  # the outer model's hook placed it
        if active.cu_seqlens is None:
            return None
        kwargs = by_name(names, args, kwargs)
        return (), {**kwargs, "attention_mask": no_mask(kwargs)}
    placing.forget()
    if isinstance(active, Recorder):
        placing.record(active, names, args, kwargs)
        return None
    forget_pieces(patch)
    if active is None and patch.backend == "auto":
        return None
    if active is None or active.kv is None:  # plain attention, by the chosen backend
        return args, {**kwargs, NAME: ActivePrefix(None, patch.backend, positioned=True)}
    kwargs = by_name(names, args, kwargs)
    _check_checkpointing(module, patch)
    active = placing.place(StackCall(module, names, kwargs, active))
    kwargs[NAME] = active
    if active.positioned:
        start_from_prompt(module, active, kwargs, patch, names)
    if active.cu_seqlens is not None and module.base_model is module:
        kwargs["attention_mask"] = no_mask(kwargs)
    return (), kwargs


def tell_layers_apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a module that several layers share: tells them apart by the order of calls."""
    active = kwargs.get(NAME)
    if not isinstance(active, ActivePrefix):
        return None
    turn = active.turns.get(id(module), 0)
    active.turns[id(module)] = turn + 1
    return args, {**kwargs, NAME: replace(active, turn=turn)}


def count_calls(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, each: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a module that attends several times in a run: counts from 0 in each run.

    So its calls get the same numbers when gradient checkpointing runs it again.

    Args:
        module: the module.
        args: of its forward.
        kwargs: of its forward.
        each: how often it attends in a run.
    """
    active = kwargs.get(NAME)
    if not isinstance(active, ActivePrefix):
        return None
    return args, {**kwargs, NAME: replace(active, turn=active.turn * each, attended=[0])}


def contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of the LM head: makes its input contiguous.

    generate() passes the last token of each row, which is a strided view. With a frozen weight,
    torch.matmul turns that into a batch of products and copies the weight for each row. This copy
    would be most of the memory of a prompt's forward.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def _check_checkpointing(module: nn.Module, patch: Patch) -> None:
    """Refuses checkpointing that would run layers again, in the backward, without the prefix."""
    if not (module.training and torch.is_grad_enabled()):
        return
    functions = [
        getattr(layer, "_gradient_checkpointing_func", None)
        for layer in module.modules()
        if getattr(layer, "gradient_checkpointing", False)
    ]
    if not functions:
        return
    if not patch.lasting:
        raise ValueError(
            "gradient checkpointing: the backward runs layers again, possibly after use_prefix has "
            "restored the model; call patch_model(model) before the block"
        )
    # the reentrant variant computes gradients for positional inputs only; the prefix is a keyword
    if any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions):
        raise ValueError(
            "gradient checkpointing: the reentrant variant would lose the prefix's gradient; "
            "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
