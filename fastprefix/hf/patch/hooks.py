"""The forward pre-hook of a patched model: the active prefix joins the call, positions move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from fastprefix.hf.devices import is_replica
from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.layer.attention import NAME, warn_of_no_weights
from fastprefix.hf.layer.packing import inputs_of, no_mask, refuse_packed, unpack
from fastprefix.hf.multimodal import Asked
from fastprefix.hf.patch.frequencies import check_cache, check_frequencies
from fastprefix.hf.patch.position_limit import check_room
from fastprefix.hf.patch.positions import behind_prefix
from fastprefix.hf.patch.state import ACTIVE, HOOKED, WANTING_NONE, Placing, State
from fastprefix.hf.states.cached_state import begin, clear
from fastprefix.hf.versions import by_name, cache_of, cached_name, length_of
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
        warn_of_no_weights()
    if config._attn_implementation != NAME:
        raise RuntimeError(
            f"{type(module).__name__}: its attention implementation was set to "
            f"{config._attn_implementation!r} after it was patched, so that no prefix would be "
            "seen; call unpatch_model and patch_model"
        )
    active = active_of(module, kwargs.get(NAME), state)
    if isinstance(active, ActivePrefix) and active.positioned:  # the outer model's hook was here
        if active.cu_seqlens is None:
            return None
        kwargs = by_name(names, args, kwargs)
        return (), {**kwargs, "attention_mask": no_mask(kwargs)}
    if not isinstance(active, Recorder):
        clear(state)
    if placing == "embedding":
        setattr(ACTIVE, state.key + OFFSET, (0, 0))  # whatever a call that failed has left
    if isinstance(active, Recorder) and placing == "argument":
        active.positions = by_name(names, args, kwargs).get("position_ids")
    if isinstance(active, Recorder) or (active is None and state.backend == "auto"):
        return None
    if active is None or active.kv is None:  # plain attention, by the backend that was asked for
        return args, {**kwargs, NAME: ActivePrefix(None, state.backend, positioned=True)}
    kwargs = by_name(names, args, kwargs)
    _check_checkpointing(module, state)
    if placing == "outer":
        kwargs[NAME] = active if active.asked else replace(active, asked=Asked.of(kwargs))
        return (), kwargs
    if placing == "inner":
        kwargs[NAME] = active
        return (), kwargs
    kwargs[NAME] = active = _place(module, active, kwargs, state, names, placing)
    if active.cu_seqlens is not None and module.base_model is module:
        kwargs["attention_mask"] = no_mask(kwargs)
    return (), kwargs


def active_of(module: nn.Module, given: Any, state: State) -> Any:
    """The prefix of a call: the one that it was given, or its thread's; None for none.

    Raises:
        RuntimeError: this thread has none, and another has a use_prefix block open.
    """
    active = getattr(ACTIVE, state.key, None) if given is None else given
    if active is None and state.opened and is_replica(module):
        # nn.DataParallel runs it in a thread for the one that called; which is clear if it is one
        threads = {thread for thread, _ in state.opened}
        active = state.opened[-1][1] if len(threads) == 1 else None
    if active is None and state.prefixes and not getattr(ACTIVE, WANTING_NONE, False):
        raise RuntimeError(
            f"{type(module).__name__}: a use_prefix block is open in another thread and none "
            "in this one, which would run without its prefix; open one here as well: "
            "use_prefix(model, kv), or use_prefix(model, None) for no prefix"
        )
    return active


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
    if state.frequencies and placing == "argument":
        check_cache(module, kwargs)
    _check_lengths(kwargs, kv.position_offset)
    if placing == "argument":
        cu_seqlens = unpack(module.config, kwargs, names)
    else:
        refuse_packed(module, kwargs)
    placed_text = _text(kwargs, active.asked) if kv.in_window else {}
    index, offset = rows_of(active, module, kwargs, cu_seqlens)
    begin(module, kv, index, kwargs, state, names, cu_seqlens)
    most, prefix_bias = kv.position_offset, None
    if placing == "embedding":
        if kv.in_window and kwargs.get("position_ids") is not None:
            raise NotImplementedError(
                f"position_ids: {type(module).__name__} counts from another number than 0 where it "
                "is left to itself, and a prompt's keys stand where it does so: call it without "
                "position_ids. generate() makes some, from 0: put the prompt into input_ids"
            )
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
        bare = None
        if index is not None and cu_seqlens is None and state.counts_padding:
            bare = (index < 0)[:, None]
        positions = behind_prefix(kwargs, offset, bare, active.asked)
        kwargs["position_ids"] = positions
        check_room(state.positions_known, most, _reach(kwargs) + most, positions)
        if state.frequencies and kv.in_window:
            prompts = _prompts(active)
            check_frequencies(state.frequencies, prompts, _reach(kwargs) + most, positions)
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
    kwargs = by_name(names, args, kwargs)
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
    elif "position_ids" in names and hasattr(module, "create_position_ids_from_input_ids"):
        # RoBERTa counts no padding
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


def count_calls(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, each: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a module that attends several times: counts from 0 whenever it runs.

    Gradient checkpointing runs it again, and its calls take the same places again.

    Args:
        module: which attends.
        args: of its forward.
        kwargs: of its forward.
        each: how often it attends in a run.
    """
    active = kwargs.get(NAME)
    if not isinstance(active, ActivePrefix):
        return None
    return args, {**kwargs, NAME: replace(active, turn=active.turn * each, attended=[0])}


def contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of the head: generate() hands it the last token of each row, a strided view.

    torch.matmul multiplies that by a frozen weight as a batch of products, each with its own copy
    of the whole vocabulary's weights: most of the memory that a prompt's forward takes.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def rows_of(
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


def _check_lengths(kwargs: dict[str, Any], offset: int) -> None:
    """Masks and positions are the text's alone, not of prefix and text as beside a DynamicCache.

    What the device alone knows (a static cache's length) is not waited for.

    Raises:
        ValueError: one of them counts the prefix.
    """
    given = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    text = next((x for x in given if _is_text(x)), None)
    if text is None:
        return
    B, L = text.shape[:2]
    cache, compiling = cache_of(kwargs), torch.compiler.is_compiling()
    seen = length_of(cache)
    if isinstance(seen, Tensor):
        seen = int(seen) if seen.device.type == "cpu" and not compiling else None
    encoded: Tensor | None = kwargs.get("encoder_hidden_states")
    limits = {
        "attention_mask": None if seen is None else seen + L,
        "encoder_attention_mask": None if encoded is None else encoded.shape[1],
        "token_type_ids": L,
        "position_ids": L,
    }
    for name, most in limits.items():
        x = kwargs.get(name)
        if most is None or not isinstance(x, Tensor) or x.shape[-1] <= most:
            continue
        if x.dim() == 2 or name == "position_ids":
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, takes [B, L] = {[B, most]}, that of the text "
                "alone (and of what is in the cache): the prefix is not part of it"
            )
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or not offset or compiling:
        return
    # generate() leaves a mask of ones alone away, and makes positions of it before
    on_host = positions.device.type == "cpu" or cache is not None
    if not on_host or seen is None or (L == 1 and seen > 0):
        return
    behind = seen + offset
    if bool((positions.amin(-1) == behind).any()):
        raise ValueError(
            f"attention_mask, position_ids: got positions from {behind} on, takes those of the "
            f"text alone, from 0 (here {seen}): an attention_mask counts no prefix, nor do "
            f"position_ids, which are moved behind its {offset} tokens"
        )


def _is_text(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() in (2, 3)


def _prompts(active: ActivePrefix) -> list[int]:
    """How many positions the prompts among a call's prefixes take, those alone that a row has."""
    kv = active.kv
    if isinstance(kv, PackedPrefixKV):
        used = {n for n in active.numbers if n >= 0 and kv.windowed[n]}
        return [kv.offsets[n] for n in used]
    return [] if kv is None else [kv.position_offset]


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
    return bias[0]


def _reach(kwargs: dict[str, Any]) -> int:
    """How many positions the text takes at most, what is in the cache included."""
    length = inputs_of(kwargs).shape[1]
    seen = length_of(cache_of(kwargs))
    return length + (seen if isinstance(seen, int) else 0)  # a static cache keeps a tensor


def _text(kwargs: dict[str, Any], asked: Asked | None = None) -> dict[str, Any]:
    """Where the call's text lies in the layers' keys: `placement` and `text_mask`."""
    attention_mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
    attention_mask = attention_mask if asked is None else asked.attention_mask
    if any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ())):
        return {"placement": "mask"}
    if attention_mask is None:
        position_ids = kwargs.get("position_ids")
        if (
            position_ids is not None and position_ids.dim() == 3
        ):  # of 4 axes the first is the text's
            position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
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
