"""The forward pre-hook of a patched model: the active prefix joins the call, positions move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention import NAME, ActivePrefix
from fastprefix.hf.state import ACTIVE, HOOKED, State
from fastprefix.kv import PackedPrefixKV


def inject(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: adds the active prefix and moves positions behind it."""
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
    elif isinstance(placed, ActivePrefix) and not placed.positioned:
        active = placed
    else:
        return None  # a recorder, or the outer model's hook was here
    if active is None or active.kv is None:
        return None
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    _check_checkpointing(module, state)
    placed_text = _text(kwargs) if active.kv.in_window else {}
    offset: int | Tensor
    index = active.prefix_index
    if isinstance(active.kv, PackedPrefixKV):
        index = _each_row(index, _inputs(kwargs).shape[0])
        offset = active.kv.position_offsets[index][:, None]
    else:
        offset = active.kv.position_offset
    kwargs[NAME] = replace(active, positioned=True, prefix_index=index, **placed_text)
    kwargs["position_ids"] = _positions(kwargs, offset)
    return (), kwargs


def contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of the head: generate() hands it the last token of each row, a strided view.

    torch.matmul multiplies that by a frozen weight as a batch of products, each with its own copy
    of the whole vocabulary's weights: most of the memory that a prompt's forward takes.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def _inputs(kwargs: dict[str, Any]) -> Tensor:
    """Token ids [B, L], or embeddings [B, L, hidden]."""
    inputs = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if inputs is None else inputs


def _each_row(index: Tensor | None, B: int) -> Tensor:
    """Which prefix each row of a batch attends to, [B], where generate() repeats rows."""
    R = 0 if index is None else index.shape[0]
    if index is None or B % R != 0:
        raise ValueError(
            f"rows: got {R} names, takes one for each of the batch's {B} rows, or for "
            "each group of them that generate() makes of a row"
        )
    return index if B == R else index.repeat_interleave(B // R, output_size=B)


def _positions(kwargs: dict[str, Any], offset: int | Tensor) -> Tensor:
    """Positions of the text behind the prefix, offset an int or [B, 1]; padding takes none.

    Explicit position_ids count the text from 0. Without them positions follow the attention mask,
    as generate() does: pads between prefix and text must not push the text away.
    """
    position_ids = kwargs.get("position_ids")
    if position_ids is not None:
        return position_ids + offset
    inputs = _inputs(kwargs)
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
    length = _inputs(kwargs).shape[1]
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
