"""The forward pre-hook of a patched model: the active prefix joins the call, positions move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from fastprefix.hf.attention import NAME, ActivePrefix
from fastprefix.hf.packing import inputs_of, no_mask, refuse_packed, unpack
from fastprefix.hf.state import ACTIVE, HOOKED, Placing, State
from fastprefix.kv import PackedPrefixKV, PrefixKV

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
    if isinstance(kwargs.get("cache"), PagedAttentionCache):
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
    placed = kwargs.get(NAME)
    if placed is None:
        active = getattr(ACTIVE, state.key, None)
        if active is None and state.prefixes:
            raise RuntimeError(
                f"{type(module).__name__}: a use_prefix block is open in another thread and none "
                "in this one, which would run without its prefix; open one here as well: "
                "use_prefix(model, kv), or use_prefix(model, None) for no prefix"
            )
    elif isinstance(placed, ActivePrefix):
        active = placed
    else:
        return None  # a recorder
    if placing == "embedding" and (active is None or not active.positioned):
        setattr(ACTIVE, state.key + OFFSET, 0)
    if active is None or active.kv is None:
        return None
    if active.positioned:  # the outer model's hook was here
        if active.cu_seqlens is None:
            return None
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return (), {**kwargs, "attention_mask": no_mask(kwargs)}
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
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
    """Says where a call's text and rows are, and moves the text behind the prefix."""
    kv, index, cu_seqlens = active.kv, active.prefix_index, None
    assert kv is not None
    if placing == "argument":
        cu_seqlens = unpack(module.config, kwargs, names)
    else:
        refuse_packed(module, kwargs)
    placed_text = _text(kwargs) if kv.in_window else {}
    offset: int | Tensor
    if isinstance(kv, PackedPrefixKV):
        index, offset = _each_row(kv, index, inputs_of(kwargs), cu_seqlens)
    else:
        offset = kv.position_offset
    if placing == "argument":
        kwargs["position_ids"] = _positions(kwargs, offset, state.num_positions)
    elif placing == "embedding":
        setattr(ACTIVE, state.key + OFFSET, offset)
    elif placing == "given" and (isinstance(offset, Tensor) or offset):
        if kwargs.get("position_ids") is None:
            raise ValueError(
                f"position_offset: got {offset}, for which {type(module).__name__} takes "
                "position_ids: it alone knows its default"
            )
        kwargs["position_ids"] = kwargs["position_ids"] + offset
    prefix_bias = None
    if placing == "distance" and isinstance(kv, PrefixKV):
        prefix_bias = _distances(module, kwargs, kv) if kv.position_offset else None
    elif placing == "distance" and isinstance(offset, Tensor) and int(offset.max()):
        raise NotImplementedError(
            f"{type(module).__name__}: makes a bias of distances, which rows with prefixes of "
            "their own have none of yet; train the prefixes with position_offset=0"
        )
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
    offset: int | Tensor = getattr(ACTIVE, state.key + OFFSET, 0)
    if isinstance(offset, int) and offset == 0:
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
    elif isinstance(offset, int):
        kwargs[CACHED] = kwargs.get(CACHED, 0) + offset
    else:
        raise NotImplementedError(
            f"{type(module).__name__}: places all rows of a batch alike, so that rows with "
            "prefixes of different position offsets are not supported; give position_ids, or "
            "train the prefixes with position_offset=0"
        )
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


def _each_row(
    kv: PackedPrefixKV, index: Tensor | None, inputs: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which prefix each row or packed sequence attends to, where generate() repeats rows.

    Returns:
        [B] or [M], and the position behind its prefix of each row [B, 1] or token [1, L].
    """
    B = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    R = 0 if index is None else index.shape[0]
    if index is None or B % R != 0 or (cu_seqlens is not None and B != R):
        what = "rows, or for each group of them that generate() makes of a row"
        raise ValueError(
            f"rows: got {R} names, takes one for each of the batch's {B} "
            f"{what if cu_seqlens is None else 'packed sequences'}"
        )
    if B != R:
        index = index.repeat_interleave(B // R, output_size=B)
    offsets = kv.position_offsets[index]
    if cu_seqlens is None:
        return index, offsets[:, None]
    return index, offsets.repeat_interleave(cu_seqlens.diff(), output_size=inputs.shape[1])[None]


def _positions(kwargs: dict[str, Any], offset: int | Tensor, most: int | None) -> Tensor:
    """Positions of the text behind the prefix; padding takes none.

    Explicit position_ids count the text from 0. Without them positions follow the attention mask,
    as generate() does: pads between prefix and text must not push the text away.

    Args:
        kwargs: of the call.
        offset: position of the token behind the prefix, of all rows, or as :func:`_each_row` says.
        most: positions that the model has learned, or None for no such number.

    Raises:
        ValueError: there are not enough of them.
    """
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        length = inputs_of(kwargs).shape[1]
        attention_mask = kwargs.get("attention_mask")
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            position_ids = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -length:]
        else:
            cache = kwargs.get("past_key_values")
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(length, device=inputs_of(kwargs).device) + seen)[None]
    position_ids = position_ids + offset
    if most is not None and not torch.compiler.is_compiling():
        _check_learned(position_ids, kwargs.get("attention_mask"), offset, most)
    return position_ids


def _check_learned(position_ids: Tensor, mask: Any, offset: int | Tensor, most: int) -> None:
    """Positions behind the prefix, [B, L], against a table of ``most`` learned ones."""
    known = isinstance(offset, int) and isinstance(mask, Tensor) and mask.dim() == 2
    if known and offset + mask.shape[1] <= most:
        return  # without waiting for the device
    last = int(position_ids.max())
    if last >= most:
        taken = offset if isinstance(offset, int) else int(offset.max())
        raise ValueError(
            f"position_ids: the text reaches position {last} behind a prefix that takes {taken}, "
            f"and the model has learned positions 0 to {most - 1}"
        )


def relative_biases(stack: nn.Module) -> list[nn.Module]:
    """The attention modules that make a bias of the distance between tokens (T5)."""
    return [
        module
        for module in stack.modules()
        if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias")
    ]


def _distances(stack: nn.Module, kwargs: dict[str, Any], kv: PrefixKV) -> Tensor:
    """[Hq, Lq, P]: the bias that a decoder has for the prefix as the first tokens of its text."""
    inputs, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    tokens = kwargs["inputs_embeds"] if inputs is None else inputs
    seen = cache.get_seq_length() if cache is not None else 0
    (module,) = relative_biases(stack)
    bias: Tensor = module.compute_bias(  # type: ignore[operator]
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


def _text(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where the call's text lies in the layers' keys: `placement` and `text_mask`."""
    attention_mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ())):
        return {"placement": "mask"}
    if attention_mask is None:
        position_ids = kwargs.get("position_ids")
        if position_ids is None or cache is not None or position_ids.shape[-1] < 2:
            return {}
        # where these leave out a step, transformers' masks may keep packed sequences apart
        packed = torch.compiler.is_compiling() or bool((position_ids.diff(dim=-1) != 1).any())
        return {"placement": "mask"} if packed else {}
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return {"placement": "unknown"}
    seen = cache.get_seq_length() if cache is not None else 0
    return {"text_mask": attention_mask[:, : seen + inputs_of(kwargs).shape[1]]}


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
