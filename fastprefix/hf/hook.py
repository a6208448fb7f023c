"""The forward pre-hook of a patched model: the active prefix joins the call, positions move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention import NAME, ActivePrefix
from fastprefix.hf.state import ACTIVE, HOOKED, Placing, State

OFFSET = ".offset"  # behind a state's key: by how much the stack at hand moves its text
CACHED = "past_key_values_length"  # what transformers calls it where embeddings place the text


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
        module: a patched model, or the part of it that the hook is on.
        args: of its forward.
        kwargs: of its forward.
        names: of the forward's parameters.
        placing: how this module learns where its text stands.
    """
    state: State = getattr(module, HOOKED)
    config: Any = module.config
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions: fastprefix never forms attention weights; unpatch the model and "
            "run it with attn_implementation='eager' to see them"
        )
    if config._attn_implementation != NAME:
        raise RuntimeError(
            f"{type(module).__name__}: its attention implementation was set to "
            f"{config._attn_implementation!r} after it was patched, so that no prefix would be "
            "seen; call unpatch_model and patch_model"
        )
    placed = kwargs.get(NAME)
    if placed is None:
        active = getattr(ACTIVE, state.key, None)
    elif isinstance(placed, ActivePrefix):
        active = placed
    else:
        return None  # a recorder
    if placing == "embedding" and (active is None or not active.positioned):
        kv = active.kv if active is not None else None
        setattr(ACTIVE, state.key + OFFSET, kv.position_offset if kv is not None else 0)
    if active is None or active.kv is None or active.positioned:
        return None  # nothing to add, or the outer model's hook was here
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    _check_checkpointing(module, state)
    if placing == "inner":
        kwargs[NAME] = active
        return (), kwargs
    placed_text = _text(kwargs) if active.kv.in_window else {}
    # a new count of turns: the call may be one of several before a backward
    kwargs[NAME] = replace(active, positioned=True, turns={}, **placed_text)
    if placing == "argument":
        kwargs["position_ids"] = _positions(kwargs, active.kv.position_offset)
    elif placing == "given" and active.kv.position_offset:
        if kwargs.get("position_ids") is None:
            raise ValueError(
                f"position_offset: got {active.kv.position_offset}, for which "
                f"{type(module).__name__} takes position_ids: it alone knows its default"
            )
        kwargs["position_ids"] = kwargs["position_ids"] + active.kv.position_offset
    return (), kwargs


def shift(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a position embedding: the prefix counts as keys in the cache, as in PEFT."""
    state: State = getattr(module, HOOKED)
    offset = getattr(ACTIVE, state.key + OFFSET, 0)
    if not offset:
        return None
    setattr(ACTIVE, state.key + OFFSET, 0)  # for the stack's own call alone
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    default: Any = getattr(module, "create_position_ids_from_inputs_embeds", None)
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + offset
    elif default is not None and kwargs.get("input_ids") is None:
        # which does not look at the cache's length (RoBERTa)
        made = default(kwargs["inputs_embeds"], module.padding_idx)
        kwargs["position_ids"] = made + offset
    else:
        kwargs[CACHED] = kwargs.get(CACHED, 0) + offset
    return (), kwargs


def take_turn(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a module that several layers share: tells these layers apart, by their order."""
    active = kwargs.get(NAME)
    if not isinstance(active, ActivePrefix):
        return None
    turn = active.turns.get(id(module), 0)
    active.turns[id(module)] = turn + 1
    return args, {**kwargs, NAME: replace(active, turn=turn)}


def contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of the head: generate() hands it the last token of each row, a strided view.

    torch.matmul multiplies that by a frozen weight as a batch of products, each with its own copy
    of the whole vocabulary's weights: most of the memory that a prompt's forward takes.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def _positions(kwargs: dict[str, Any], offset: int) -> Tensor:
    """Positions of the text behind the prefix; padding takes none.

    Explicit position_ids count the text from 0. Without them positions follow the attention mask,
    as generate() does: pads between prefix and text must not push the text away.
    """
    position_ids = kwargs.get("position_ids")
    if position_ids is not None:
        return position_ids + offset
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    length = inputs.shape[1]
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        positions = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -length:]
    else:
        cache = kwargs.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        positions = (torch.arange(length, device=inputs.device) + seen)[None]
    return positions + offset


def _text(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where the call's text lies in the layers' keys: `placement` and `text_mask`."""
    attention_mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ())):
        return {"placement": "mask"}
    if attention_mask is None:
        position_ids = kwargs.get("position_ids")
        if position_ids is None or cache is not None or torch.compiler.is_compiling():
            return {}
        # transformers takes positions that start anew for packed sequences, as we do here
        packed = position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) != 1).any())
        return {"placement": "mask"} if packed else {}
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return {"placement": "unknown"}
    inputs = kwargs.get("input_ids")
    length = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[1]
    seen = cache.get_seq_length() if cache is not None else 0
    return {"text_mask": attention_mask[:, : seen + length]}


def _check_checkpointing(module: nn.Module, state: State) -> None:
    """Gradient checkpointing runs layers again in the backward: they must find the prefix there."""
    if not (module.training and torch.is_grad_enabled()):
        return
    functions = [
        getattr(layer, "_gradient_checkpointing_func", None)
        for layer in module.modules()
        if getattr(layer, "gradient_checkpointing", False)
    ]
    if not functions:
        return
    if not state.lasting:
        raise ValueError(
            "gradient checkpointing: the backward runs layers again, possibly after use_prefix has "
            "restored the model; call patch_model(model) before the block"
        )
    # the reentrant variant finds gradients for positional inputs only, and the prefix is none
    if any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions):
        raise ValueError(
            "gradient checkpointing: the reentrant variant would lose the prefix's gradient; "
            "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
