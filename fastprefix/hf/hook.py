"""The forward pre-hook of a patched model: the active prefix joins the call, positions move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from fastprefix.hf.active import ActivePrefix
from fastprefix.hf.attention import NAME
from fastprefix.hf.packing import inputs_of, no_mask, refuse_packed, unpack
from fastprefix.hf.room import check_room
from fastprefix.hf.state import ACTIVE, HOOKED, Placing, State
from fastprefix.hf.versions import cache_of, cached_name, length_of
from fastprefix.kv import PackedPrefixKV, PrefixKV

# Behind a state's key: by how much the stack at hand moves its text, at most and by row.
OFFSET = "_offset"


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
    if isinstance(cache_of(kwargs), PagedAttentionCache):
        raise NotImplementedError(
            f"{type(module).__name__}: continuous batching keeps keys and values in a paged cache, "
            "which fastprefix does not read; use generate(), or unpatch_model(model)"
        )
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
    active = kwargs.get(NAME)
    if active is None:
        active = getattr(ACTIVE, state.key, None)
        if active is None and state.prefixes:
            raise RuntimeError(
                f"{type(module).__name__}: a use_prefix block is open in another thread and none "
                "in this one, which would run without its prefix; open one here as well: "
                "use_prefix(model, kv), or use_prefix(model, None) for no prefix"
            )
    # (names are cut to args: Dynamo in torch 2.9 refuses a zip of unequal lengths)
    if isinstance(active, ActivePrefix) and active.positioned:  # the outer model's hook was here
        if active.cu_seqlens is None:
            return None
        kwargs = {**dict(zip(names[: len(args)], args, strict=False)), **kwargs}
        return (), {**kwargs, "attention_mask": no_mask(kwargs)}
    if placing == "embedding":
        setattr(ACTIVE, state.key + OFFSET, (0, 0))  # whatever a call that failed has left
    if not isinstance(active, ActivePrefix) or active.kv is None:
        return None  # nothing, or a recorder
    kwargs = {**dict(zip(names[: len(args)], args, strict=False)), **kwargs}
    _check_checkpointing(module, state)
    if placing == "inner":
        kwargs[NAME] = active
        return (), kwargs
    kwargs[NAME] = active = _place(module, active, kwargs, state, names, placing)
    if active.cu_seqlens is not None and module.base_model is module:
        kwargs["attention_mask"] = no_mask(kwargs)
    return (), kwargs


def _place(
    module: nn.Module,
    active: ActivePrefix,
    kwargs: dict[str, Any],
    state: State,
    names: tuple[str, ...],
    placing: Placing,
) -> ActivePrefix:
    """Says where a call's rows and text are, and moves the text behind the prefix."""
    kv, cu_seqlens = active.kv, None
    assert kv is not None
    if placing == "argument":
        cu_seqlens = unpack(module.config, kwargs, names)
    else:
        refuse_packed(module, kwargs)
    placed_text = _text(kwargs) if kv.in_window else {}
    index, offset = _of_rows(active, module, kwargs, cu_seqlens)
    most, prefix_bias = kv.position_offset, None
    if placing == "embedding":
        setattr(ACTIVE, state.key + OFFSET, (most, offset))
    elif placing == "distance" and most:
        if not isinstance(kv, PrefixKV):
            raise NotImplementedError(
                f"rows: {type(module).__name__} makes a bias of distances, and of one distance for "
                "all rows; takes prefixes with a position_offset of 0"
            )
        prefix_bias = _distances(module, kwargs, kv)
    elif placing == "argument" or (placing == "given" and (most or state.positions_known is None)):
        # Without learned positions distances alone matter, and pads between prefix and text must
        # not count (ModernBERT); learned ones are the model's own affair.
        learned = placing == "given" and state.positions_known is not None
        if learned and kwargs.get("position_ids") is None:
            raise ValueError(
                f"position_offset: got {most}, for which {type(module).__name__} takes "
                "position_ids: it alone knows its default"
            )
        positions = kwargs["position_ids"] = _positions(kwargs, offset)
        check_room(state.positions_known, most, _reach(kwargs) + most, positions)
    # a new count of turns: the call may be one of several before a backward
    return replace(
        active,
        positioned=True,
        prefix_index=index,
        cu_seqlens=cu_seqlens,
        prefix_bias=prefix_bias,
        turns={},
        **placed_text,
    )


def shift(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a position embedding: the prefix counts as keys in the cache, as in PEFT."""
    state: State = getattr(module, HOOKED)
    most, offset = getattr(ACTIVE, state.key + OFFSET, (0, 0))
    if most == 0:
        return None
    setattr(ACTIVE, state.key + OFFSET, (0, 0))  # for the stack's own call alone
    kwargs = {**dict(zip(names[: len(args)], args, strict=False)), **kwargs}
    if isinstance(offset, Tensor) and not {"inputs_embeds", "position_ids"} <= set(names):
        raise NotImplementedError(
            f"rows: {type(module).__name__} cannot be told of positions that differ by row; takes "
            "prefixes with a position_offset of 0"
        )
    argument = cached_name(module)
    cached = 0 if argument is None else kwargs.get(argument, 0)
    positions, reach = kwargs.get("position_ids"), 0
    if positions is not None:
        positions = positions + offset
    elif hasattr(module, "create_position_ids_from_input_ids"):  # RoBERTa counts no padding
        make: Any = module
        if kwargs.get("input_ids") is not None:
            positions = make.create_position_ids_from_input_ids(
                kwargs["input_ids"], make.padding_idx, cached + offset
            )
        else:  # which does not look at the cache's length
            positions = make.create_position_ids_from_inputs_embeds(
                kwargs["inputs_embeds"], make.padding_idx
            )
            positions = positions + cached + offset
    elif isinstance(offset, Tensor):
        # rows differ, and the module would slice its positions by one number (BERT)
        positions = torch.arange(inputs_of(kwargs).shape[1], device=offset.device) + cached + offset
    else:
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        reach = offset + cached + (inputs.shape[1] if isinstance(inputs, Tensor) else 0)
        assert argument is not None
        kwargs[argument] = cached + offset
    if positions is not None:
        kwargs["position_ids"] = positions
    check_room(state.positions_known, most, reach, positions)
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


def _of_rows(
    active: ActivePrefix, module: nn.Module, kwargs: dict[str, Any], cu_seqlens: Tensor | None
) -> tuple[Tensor | None, int | Tensor]:
    """Which of several prefixes each row or packed sequence attends to, [B] or [M].

    And by how much it moves its text, [B, 1], or each token of the packed row, [1, L]. Of a single
    prefix None, and one number for all.
    """
    if not isinstance(active.kv, PackedPrefixKV):
        assert active.kv is not None
        return None, active.kv.position_offset
    names = ("input_ids", "inputs_embeds", getattr(module, "main_input_name", ""))
    sizes = [kwargs[name].shape[0] for name in names if kwargs.get(name) is not None]
    what = "rows, or for each group of them that generate() makes of a row"
    if cu_seqlens is not None:
        sizes, what = [cu_seqlens.shape[0] - 1], "packed sequences"
    index = active.prefix_index
    R = 0 if index is None else index.shape[0]
    B = sizes[0] if sizes else 0
    if index is None or B % R != 0 or (cu_seqlens is not None and B != R):
        raise ValueError(f"rows: got {R} names, takes one for each of the batch's {B} {what}")
    if B != R:
        index = index.repeat_interleave(B // R, output_size=B)
    if active.kv.position_offset == 0:
        return index, 0
    offsets = active.kv.position_offsets[index]
    if cu_seqlens is None:
        return index, offsets[:, None]
    tokens = inputs_of(kwargs).shape[1]
    return index, offsets.repeat_interleave(cu_seqlens.diff(), output_size=tokens)[None]


def _positions(kwargs: dict[str, Any], offset: int | Tensor) -> Tensor:
    """Positions of the text behind the prefix, offset as :func:`_of_rows` says; pads take none.

    Explicit position_ids count the text from 0. Without them positions follow the attention mask,
    as generate() does: pads between prefix and text must not push the text away.
    """
    position_ids = kwargs.get("position_ids")
    if position_ids is not None:
        return position_ids + offset
    inputs = inputs_of(kwargs)
    length = inputs.shape[1]
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        positions = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -length:]
    else:
        seen = length_of(cache_of(kwargs))
        positions = (torch.arange(length, device=inputs.device) + seen)[None]
    return positions + offset


def relative_biases(stack: nn.Module) -> list[nn.Module]:
    """The attention modules that make a bias of the distance between tokens (T5)."""
    return [
        module
        for module in stack.modules()
        if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias")
    ]


def _distances(stack: nn.Module, kwargs: dict[str, Any], kv: PrefixKV) -> Tensor:
    """[Hq, Lq, P]: the bias that a decoder has for the prefix as the first tokens of its text."""
    tokens, seen = inputs_of(kwargs), length_of(cache_of(kwargs))
    module: Any
    (module,) = relative_biases(stack)
    bias: Tensor = module.compute_bias(
        tokens.shape[1],
        kv.num_virtual_tokens,
        device=tokens.device,
        past_seen_tokens=seen + kv.position_offset,
    )
    if bias.requires_grad:
        raise NotImplementedError(
            f"{type(stack).__name__}: a bias on the prefix's scores gets no gradient yet; freeze "
            "what makes it (requires_grad_(False))"
        )
    return bias[0]


def _reach(kwargs: dict[str, Any]) -> int:
    """How many positions the text takes at most, what is in the cache included."""
    length = inputs_of(kwargs).shape[1]
    seen = length_of(cache_of(kwargs))
    return length + (seen if isinstance(seen, int) else 0)  # a static cache keeps a tensor


def _text(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where the call's text lies in the layers' keys: `placement` and `text_mask`."""
    attention_mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
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
    length = inputs_of(kwargs).shape[1]
    return {"text_mask": attention_mask[:, : length_of(cache) + length]}


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
