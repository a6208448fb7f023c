"""Patching a model: its attention, its slots, and the hook that injects the active prefix.

Nothing is monkey-patched. ``patch_model`` sets transformers' own attention implementation, numbers
the attention modules, and registers a forward pre-hook, which adds the active prefix to the call's
keyword arguments and moves the text's positions behind it. The prefix thus travels with the call,
so that gradient checkpointing replays it and several forwards before a backward do not mix.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.arguments import check_flag, check_names, check_type, refuses_unknown_arguments
from fastprefix.attention.selection import BACKENDS
from fastprefix.hf.checking.check import ask, ask_prefix, compare_patch, recall, remember
from fastprefix.hf.devices import device_of, dtype_of
from fastprefix.hf.expand.hooks import check_expanded, check_fallback
from fastprefix.hf.expand.probe import can_expand, patch_expanded
from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.layer.attention import CAUSAL, SLOT
from fastprefix.hf.multimodal import around, language_model
from fastprefix.hf.patch.frequencies import thresholds
from fastprefix.hf.patch.hooks import (
    contiguous_input,
    count_calls,
    inject,
    relative_biases,
    shift,
    take_turn,
)
from fastprefix.hf.patch.implementation import (
    NAME,
    PATCHED,
    implementations,
    restore,
    set_default,
    set_implementation,
)
from fastprefix.hf.patch.placing import placing_of, position_embeddings
from fastprefix.hf.patch.position_limit import positions_known
from fastprefix.hf.patch.positions import counts_padding
from fastprefix.hf.patch.probe import UnsupportedModelError, is_encoder_decoder, probe
from fastprefix.hf.patch.running import LOCK, count_forwards, held_up
from fastprefix.hf.patch.sharding import Sharding, find_sharding, refuse_split_heads
from fastprefix.hf.patch.state import ACTIVE, HOOKED, STATE, Placing, State
from fastprefix.hf.states.cached_state import check_states
from fastprefix.hf.states.keeping import says_stateful
from fastprefix.hf.versions import parameters
from fastprefix.kv import Group, LayerShape, PackedPrefixKV, PrefixBank, PrefixKV

# One prefix for all rows, or several by name.
Prefixes = PrefixKV | PackedPrefixKV | Mapping[str, PrefixKV]

# What else to try with a model that cannot be patched.
Fallback = Literal["expand"]


@refuses_unknown_arguments
def patch_model(
    model: PreTrainedModel,
    backend: str = "auto",
    *,
    example: Mapping[str, Any] | None = None,
    check: bool = True,
    fallback: Fallback | None = None,
) -> PreTrainedModel:
    """Makes a model attend through fastprefix, ready for :func:`use_prefix`.

    Runs the model once on one token to see which modules attend, in which order, and what shape
    their keys and values have. Without an active prefix the model computes what it did before;
    that it does is checked on a few tokens, once per model (:mod:`fastprefix.hf.checking.check`).

    Args:
        model: a transformers model whose attention goes through AttentionInterface: a decoder, an
            encoder of text or images, an encoder-decoder; of one that sees or hears besides text,
            the language model inside takes the prefix.
        backend: of :func:`fastprefix.prefix_attention`, for all layers.
        example: keyword arguments of one forward call, for models that run on anything but
            token ids, images or log-mel spectrograms.
        check: False leaves out this check, and those of the prefixes that the model is given.
        fallback: what to do with a decoder that cannot be patched. None refuses it. "expand" gives
            it its prefixes through its own KV cache: the same results, at the price of a copy of
            the prefix for each row, of which a warning tells once. Others are patched as ever.

    Returns:
        The model itself. Patching a patched model only sets the backend.

    Raises:
        TypeError: not a transformers model, or example no mapping.
        ValueError: unknown backend or fallback.
        UnsupportedModelError: the model cannot take a prefix. It is left as it was.
    """
    _check_type(model)
    if backend not in ("auto", *BACKENDS):
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: got {backend!r}, takes one of {names}")
    check_fallback(fallback)
    check_flag("check", check)
    if example is not None:
        check_type("example", example, Mapping, "the keyword arguments of a forward, or None")
    with LOCK:
        if not is_patched(model):
            _patch(model, example, check, fallback)
        state = state_of(model)
        state.backend, state.lasting = backend, True
    return model


@refuses_unknown_arguments
def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`patch_model`: the model is what it was, attention implementation included.

    While :func:`use_prefix` blocks are open, in any thread, they keep their prefixes: the last of
    them restores the model.

    Raises:
        ValueError: the model is not patched.
    """
    with LOCK:
        state = state_of(model)
        if state.blocks:
            state.lasting = False
            return model
        for handle in state.handles:
            handle.remove()
        for module in model.modules():
            for name in (SLOT, HOOKED, CAUSAL):
                if hasattr(module, name):
                    delattr(module, name)
        delattr(model, STATE)
        restore(state.previous)
    return model


@refuses_unknown_arguments
def is_patched(model: PreTrainedModel) -> bool:
    """Whether :func:`patch_model` holds for a model."""
    return getattr(model, STATE, None) is not None


@refuses_unknown_arguments
def layer_shapes(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """Key and value shapes of a patched model's attention layers, as seen in a forward pass.

    Of a tensor-parallel model with the heads of all ranks, as its prefixes have them.
    """
    return state_of(model).shapes


def query_heads(model: PreTrainedModel) -> tuple[int, ...]:
    """How many query heads each attention layer of a patched model has, all ranks together."""
    return state_of(model).query_heads


def sharding_of(model: PreTrainedModel) -> Sharding | None:
    """Which heads this rank has of a patched tensor-parallel model; None for any other."""
    return state_of(model).sharding


def is_expanded(model: PreTrainedModel) -> bool:
    """Whether a patched model takes its prefixes through its KV cache (fallback="expand")."""
    return state_of(model).expanded is not None


@refuses_unknown_arguments
def layer_groups(model: PreTrainedModel) -> tuple[Group, ...]:
    """Which part of a patched model each attention layer belongs to, in the same order."""
    return state_of(model).groups


@refuses_unknown_arguments
def layer_sources(model: PreTrainedModel) -> tuple[int, ...]:
    """Which layer of a patched model each layer has the text's keys and values from.

    Itself where it makes its own; -1 where it has another layer's keys with other values. Prefixes
    have keys and values for every layer, but PEFT, which puts them in the cache, only for those
    that make their own.
    """
    state = state_of(model)
    return state.sources or tuple(range(len(state.shapes)))


def default_offset(model: PreTrainedModel, num_virtual_tokens: int) -> int:
    """By how many positions a learned prefix moves the text of a patched model.

    As PEFT does it, which puts prefixes in the cache: by the prefix's length in decoder-only models
    and in encoders that count cached keys as text (BERT, RoBERTa, ELECTRA); else by 0. PEFT moves
    the text of some encoder-decoders' decoders too (BART), which here takes an explicit offset.
    """
    state = state_of(model)
    moves = state.placing in ("argument", "embedding") and not is_encoder_decoder(model)
    return num_virtual_tokens if moves else 0


def check_prefix(model: PreTrainedModel) -> None:
    """Checks, once, that each layer of a patched model sees its own share of a prefix.

    Raises:
        UnsupportedModelError: one does not.
    """
    ask_prefix(model, state_of(model))


@refuses_unknown_arguments
@contextlib.contextmanager
def use_prefix(
    model: PreTrainedModel,
    kv: Prefixes | None,
    rows: Sequence[str | None] | None = None,
    *,
    check: bool = True,
    fallback: Fallback | None = None,
) -> Iterator[PreTrainedModel]:
    """Every forward of the model in this block, and in this thread, attends to the prefix.

    ``generate()``, padding on either side and caches work as without it: the cache and the
    attention mask hold the text alone, position_ids count it from 0. A block within a block
    replaces the prefix. A model that was not patched is patched for the block and restored.

    Threads may run one model with different prefixes. A block belongs to its thread: a thread that
    generates for a streamer opens its own. While any block with a prefix is open, threads in no
    block are refused by the model, so that none loses a prefix unnoticed.

    Args:
        model: see :func:`patch_model`.
        kv: the prefix; moved to the model's device and dtype if need be. Gradients flow to it.
            Or several by name, of which each row of a batch has its own: a dict, a
            :class:`fastprefix.PrefixBank`, of which only what rows name is loaded, or the
            :class:`fastprefix.PackedPrefixKV` of one, which spares packing it anew.
            None for no prefix, within another block or beside other threads.
        rows: with several prefixes, each row's name, or None for a row without a prefix. A batch
            may have a multiple of as many rows, which then stand in groups, as ``generate()``
            repeats rows for beams and num_return_sequences; anything else is an error.
        check: see :func:`patch_model`.
        fallback: see :func:`patch_model`.

    Raises:
        TypeError: kv is not a PrefixKV, nor several by name, nor None, or rows are no names.
        ValueError: kv does not fit the model's layers, or rows does not fit kv; in the forward,
            rows does not fit the batch.
        UnsupportedModelError: see :func:`patch_model`.

    Example:
        >>> kv = {name: PrefixKV.load(f"{name}.safetensors") for name in ("poet", "cook")}
        >>> with use_prefix(model, kv, rows=["poet", "cook", None, "poet"]):
        ...     ids = model.generate(**batch_of_four)
    """
    with patched(model, fallback, check=check):
        active, state = activate(model, kv, rows, check=check), state_of(model)
        key, counts = state.key, kv is not None
        outer = getattr(ACTIVE, key, None)
        with LOCK:
            state.prefixes += counts
            state.opened = (*state.opened, (threading.get_ident(), active))
        setattr(ACTIVE, key, active)
        try:
            yield model
        finally:
            with LOCK:
                state.prefixes -= counts
                state.opened = tuple(one for one in state.opened if one[1] is not active)
            setattr(ACTIVE, key, outer)
            if outer is None:
                delattr(ACTIVE, key)


@contextlib.contextmanager
def patched(
    model: PreTrainedModel, fallback: Fallback | None = None, *, check: bool = True
) -> Iterator[PreTrainedModel]:
    """The model is patched in this block; the last block to end restores it, unless it was before.

    Raises:
        UnsupportedModelError: see :func:`patch_model`.
        ValueError: unknown fallback.
    """
    _check_type(model)
    check_fallback(fallback)
    with LOCK:
        if not is_patched(model):
            _patch(model, None, check, fallback)
            count_forwards(model, state_of(model), unpatch_model)
        state = state_of(model)
        state.blocks += 1
    try:
        yield model
    finally:
        with LOCK:
            state.blocks -= 1
            if not (state.blocks or state.running or state.lasting) and is_patched(model):
                unpatch_model(model)


def activate(
    model: PreTrainedModel,
    kv: Prefixes | None,
    rows: Sequence[str | None] | None = None,
    *,
    check: bool = True,
) -> ActivePrefix:
    """What to hand to a patched model's forward as ``fastprefix=`` for one call with this prefix.

    Raises:
        UnsupportedModelError: the first prefix of a model whose layers do not see their own.
        TypeError: kv is not a PrefixKV, nor several by name, nor None.
        ValueError: the model is not patched or has no weights, kv does not fit its layers, or rows
            does not fit kv.
        NotImplementedError: kv is a prompt, and the model keeps more of a text than the prompt
            holds or than it can start from, or sees it in chunks.
    """
    device, dtype = device_of(model), dtype_of(model)
    if device.type == "meta":
        raise ValueError(
            "model: its weights are on the meta device. FSDP's cpu_ram_efficient_loading puts them "
            "there and brings back what state_dict() holds, which of a tuned model is the adapter "
            "alone: switch it off"
        )
    state = state_of(model)
    if rows is not None:
        check_names("rows", rows, "a name, or None, for each row of the batch")
    if kv is None:
        if rows is not None:
            raise ValueError("rows: got names with no prefix, takes several by name as kv")
        return ActivePrefix(None, state.backend)
    # what follows is converted once here, not in every layer
    if isinstance(kv, Mapping):
        # of a bank, those alone that a row asks for: the others may lie on a disk
        named = kv.select(rows) if isinstance(kv, PrefixBank) and rows is not None else kv
        fitting = {
            n: x.to(device, dtype) if isinstance(x, PrefixKV) else x for n, x in named.items()
        }
        kv = PackedPrefixKV.pack(fitting)
    if not isinstance(kv, (PrefixKV, PackedPrefixKV)):
        raise TypeError(
            f"kv: got {type(kv).__name__}, takes a PrefixKV, or several by name (a dict or a "
            "PackedPrefixKV)"
        )
    index: Tensor | None = None
    numbers: tuple[int, ...] = ()
    if isinstance(kv, PackedPrefixKV):
        if rows is None:
            raise ValueError("rows: got None with several prefixes, takes a name for each row")
        index, numbers = kv.index(rows).to(device), kv.numbers(rows)
    elif rows is not None:
        raise ValueError("rows: got names with one PrefixKV, takes several by name as kv")
    if kv.num_layers != len(state.shapes):
        raise ValueError(
            f"kv: got a prefix of {kv.num_layers} layers, takes one of {len(state.shapes)} "
            f"for this {type(model).__name__}"
        )
    for layer, (got, want) in enumerate(zip(kv.shapes, state.shapes, strict=True)):
        if got != want:
            raise ValueError(f"kv: got {got} in layer {layer}, takes {want}")
    if state.expanded is not None:
        check_expanded(model, kv, state)
    for layer, (heads, wanted) in enumerate(zip(_heads(kv), state.query_heads, strict=True)):
        if heads not in (0, wanted):
            raise ValueError(
                f"kv: got a reweighting of {heads} query heads in layer {layer}, takes {wanted}"
            )
    if kv.position_offset and state.placing == "fixed":
        raise ValueError(
            f"position_offset: got {kv.position_offset}, takes 0 for this {type(model).__name__}, "
            "which cannot be told where its text stands"
        )
    if kv.in_window:
        if set(state.groups) != {"decoder"}:
            raise ValueError(
                "in_window: got a prefilled prompt, takes a learned prefix for this "
                f"{type(model).__name__}; prompts slide in decoder-only models alone"
            )
        _check_prompt(model)
    if check:
        ask_prefix(model, state)
    check_states(model, kv)
    kv = kv.to(device, dtype)
    kv = state.sharding.narrow(kv) if state.sharding else kv
    return ActivePrefix(kv, state.backend, index, numbers)


def _heads(kv: PrefixKV | PackedPrefixKV) -> tuple[int, ...]:
    """Of how many query heads each layer has numbers that reweight them."""
    if isinstance(kv, PackedPrefixKV):
        return kv.num_heads
    return kv.reweighting.num_heads if kv.reweighting is not None else (0,) * kv.num_layers


def _check_prompt(model: PreTrainedModel) -> None:
    """A prompt's keys and values must be all that its text does to what follows."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "chunked_attention" in layers:
        raise NotImplementedError(
            f"kv: {type(model).__name__} does not take a prompt's keys and values for its text, "
            "the text's place among its chunks matters as well; put the prompt into input_ids (a "
            "learned prefix is no text, and works)"
        )


def state_of(model: PreTrainedModel) -> State:
    """What patching did to a model.

    Raises:
        ValueError: it is not patched.
    """
    state = getattr(model, STATE, None)
    if state is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched; call patch_model")
    return state


def _check_type(model: object) -> None:
    check_type("model", model, PreTrainedModel, "a transformers PreTrainedModel")


def _patch(
    model: PreTrainedModel,
    example: Mapping[str, Any] | None,
    check: bool,
    fallback: Fallback | None,
) -> None:
    try:
        with held_up(model):
            state = _patch_attention(model, example, check)
        if fallback is not None and check:
            setattr(model, STATE, state)
            try:
                ask_prefix(model, state)
            except UnsupportedModelError:
                unpatch_model(model)
                raise
    except UnsupportedModelError as refusal:
        if fallback is None:
            if not can_expand(model):
                raise
            raise UnsupportedModelError(
                f"{refusal}. fallback='expand' gives it its prefixes through its own KV cache, a "
                "copy for each row"
            ) from refusal
        state = patch_expanded(model, refusal)
    setattr(model, STATE, state)
    PATCHED.add(model)


def _patch_attention(
    model: PreTrainedModel, example: Mapping[str, Any] | None, check: bool
) -> State:
    state = State(implementations(model), "auto", example=example)
    known = recall(model) if example is None else None
    try:
        set_implementation(model)
        refuse_split_heads(model)
        if known is None:
            known = remember(model, probe(model, example))
        slots = known.slots
        for module, causal in slots.causal.items():
            setattr(module, CAUSAL, causal)
        if check:
            state.known = known
            named = any(implementation == NAME for _, implementation in state.previous)
            # ours is not to be compared with ours
            bare = partial(set_default, model) if named else partial(restore, state.previous)
            ours = partial(set_implementation, model)
            ask(model, known, "patch", lambda: compare_patch(model, slots, example, bare, ours))
        state.sharding = find_sharding(model)
    except Exception:
        for module in known.slots.causal if known is not None else ():
            delattr(module, CAUSAL)
        restore(state.previous)
        raise
    state.shapes, state.groups = slots.shapes, slots.groups
    state.stateful = says_stateful(model)
    state.query_heads, state.sources = slots.query_heads, slots.sources
    if state.sharding is not None:
        state.query_heads = tuple(total for _, _, total in state.sharding.query_heads)
        state.shapes = state.sharding.whole_shapes(slots.shapes)
    for slot, module in enumerate(slots.modules):
        setattr(module, SLOT, (*getattr(module, SLOT, ()), slot))
    for module in slots.shared:
        state.handles.append(module.register_forward_pre_hook(take_turn, with_kwargs=True))
    for module, each in slots.several.items():  # behind the hook above, where it has both
        hook = partial(count_calls, each=each)
        state.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    # Inner models get the hook too: calling one alone, as generate() calls an encoder, must not
    # silently run without the prefix.
    hooked: dict[nn.Module, Placing] = {}
    if is_encoder_decoder(model):
        stack = model.get_decoder()
        told: Placing = "distance" if len(relative_biases(stack)) == 1 else "fixed"
        state.placing = "embedding" if position_embeddings(stack) else told
        hooked = {model: "inner", model.base_model: "inner"}
        hooked |= {model.get_encoder(): "fixed", stack: state.placing}
    else:
        stack = language_model(model) or model
        state.placing = placing_of(stack, causal="decoder" in state.groups)
        if stack is not model:
            hooked = dict.fromkeys(around(model, stack), "outer")
        hooked |= {stack: state.placing, stack.base_model: state.placing}
    embeddings = position_embeddings(stack) if state.placing == "embedding" else []
    state.positions_known = positions_known(model, stack)
    state.counts_padding, state.frequencies = counts_padding(stack), thresholds(model.config)
    for module, placing in hooked.items():
        hook = partial(inject, names=parameters(module), placing=placing)
        state.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(module, HOOKED, state)
    for module in embeddings:
        hook = partial(shift, names=parameters(module))
        state.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(module, HOOKED, state)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        state.handles.append(head.register_forward_pre_hook(contiguous_input))
    return state


__all__ = [
    "Fallback",
    "UnsupportedModelError",
    "activate",
    "check_prefix",
    "default_offset",
    "is_expanded",
    "is_patched",
    "layer_groups",
    "layer_shapes",
    "layer_sources",
    "patch_model",
    "patched",
    "query_heads",
    "sharding_of",
    "state_of",
    "unpatch_model",
    "use_prefix",
]
