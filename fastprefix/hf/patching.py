"""Patching a model: its attention, its slots, and the hook that injects the active prefix.

Nothing is monkey-patched. ``patch_model`` sets transformers' own attention implementation, numbers
the attention modules, and registers a forward pre-hook, which adds the active prefix to the call's
keyword arguments and moves the text's positions behind it. The prefix thus travels with the call,
so that gradient checkpointing replays it and several forwards before a backward do not mix.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastprefix.attention.selection import BACKENDS
from fastprefix.hf.attention import NAME, SLOT, ActivePrefix
from fastprefix.hf.hook import CACHED, contiguous_input, inject, shift, take_turn
from fastprefix.hf.probe import UnsupportedModelError, is_encoder_decoder, probe, takes
from fastprefix.hf.state import ACTIVE, HOOKED, STATE, Placing, State
from fastprefix.kv import Group, LayerShape, PrefixKV

_LOCK = threading.RLock()
_PATCHED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def patch_model(
    model: PreTrainedModel, backend: str = "auto", *, example: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Makes a model attend through fastprefix, ready for :func:`use_prefix`.

    Runs the model once on one token to see which modules attend, in which order, and what shape
    their keys and values have. Without an active prefix the model computes what it did before.

    Args:
        model: a transformers model whose attention goes through AttentionInterface: a decoder, an
            encoder of text or images, an encoder-decoder.
        backend: of :func:`fastprefix.prefix_attention`, for all layers.
        example: keyword arguments of one forward call, for models that run on anything but
            token ids, images or log-mel spectrograms.

    Returns:
        The model itself. Patching a patched model only sets the backend.

    Raises:
        TypeError: not a transformers model.
        ValueError: unknown backend.
        UnsupportedModelError: the model cannot take a prefix. It is left as it was.
    """
    _check_type(model)
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: got {backend!r}, takes one of {names}")
    with _LOCK:
        if not is_patched(model):
            _patch(model, example)
        state = _state(model)
        state.backend, state.lasting = backend, True
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`patch_model`: the model is what it was, attention implementation included.

    Raises:
        ValueError: the model is not patched.
    """
    with _LOCK:
        state = _state(model)
        for handle in state.handles:
            handle.remove()
        for module in model.modules():
            for name in (SLOT, HOOKED):
                if hasattr(module, name):
                    delattr(module, name)
        delattr(model, STATE)
        _restore(state.previous)
    return model


def is_patched(model: PreTrainedModel) -> bool:
    """Whether :func:`patch_model` holds for a model."""
    return getattr(model, STATE, None) is not None


def layer_shapes(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """Key and value shapes of a patched model's attention layers, as seen in a forward pass."""
    return _state(model).shapes


def layer_groups(model: PreTrainedModel) -> tuple[Group, ...]:
    """Which part of a patched model each attention layer belongs to, in the same order."""
    return _state(model).groups


def default_offset(model: PreTrainedModel, num_virtual_tokens: int) -> int:
    """By how many positions a learned prefix moves the text of a patched model.

    As PEFT does it, which puts prefixes in the cache: by the prefix's length in decoder-only models
    and in encoders that count cached keys as text (BERT, RoBERTa, ELECTRA); else by 0. PEFT moves
    the text of some encoder-decoders' decoders too (BART), which here takes an explicit offset.
    """
    state = _state(model)
    moves = state.placing in ("argument", "embedding") and not is_encoder_decoder(model)
    return num_virtual_tokens if moves else 0


@contextlib.contextmanager
def use_prefix(model: PreTrainedModel, kv: PrefixKV) -> Iterator[PreTrainedModel]:
    """Every forward of the model in this block, and in this thread, attends to the prefix.

    ``generate()``, padding on either side and caches work as without it: the cache and the
    attention mask hold the text alone, position_ids count it from 0. A block within a block
    replaces the prefix. A model that was not patched is patched for the block and restored.

    Args:
        model: see :func:`patch_model`.
        kv: the prefix; moved to the model's device and dtype if need be. Gradients flow to it.

    Raises:
        TypeError: kv is not a PrefixKV.
        ValueError: kv does not fit the model's layers.
        UnsupportedModelError: see :func:`patch_model`.
    """
    with patched(model):
        active = activate(model, kv)
        key = _state(model).key
        outer = getattr(ACTIVE, key, None)
        setattr(ACTIVE, key, active)
        try:
            yield model
        finally:
            setattr(ACTIVE, key, outer)
            if outer is None:
                delattr(ACTIVE, key)


@contextlib.contextmanager
def patched(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model is patched in this block; the last block to end restores it, unless it was before.

    Raises:
        UnsupportedModelError: see :func:`patch_model`.
    """
    _check_type(model)
    with _LOCK:
        if not is_patched(model):
            _patch(model)
        state = _state(model)
        state.blocks += 1
    try:
        yield model
    finally:
        with _LOCK:
            state.blocks -= 1
            if state.blocks == 0 and not state.lasting and is_patched(model):
                unpatch_model(model)


def activate(model: PreTrainedModel, kv: PrefixKV) -> ActivePrefix:
    """What to hand to a patched model's forward as ``fastprefix=`` for one call with this prefix.

    Raises:
        TypeError: kv is not a PrefixKV.
        ValueError: the model is not patched, or kv does not fit its layers.
    """
    if not isinstance(kv, PrefixKV):
        raise TypeError(f"kv: got {type(kv).__name__}, takes a PrefixKV")
    state = _state(model)
    if kv.num_layers != len(state.shapes):
        raise ValueError(
            f"kv: got a prefix of {kv.num_layers} layers, takes one of {len(state.shapes)} "
            f"for this {type(model).__name__}"
        )
    for layer, (got, want) in enumerate(zip(kv.shapes, state.shapes, strict=True)):
        if got != want:
            raise ValueError(f"kv: got {got} in layer {layer}, takes {want}")
    if kv.position_offset and state.placing == "fixed":
        raise ValueError(
            f"position_offset: got {kv.position_offset}, takes 0 for this {type(model).__name__}, "
            "which cannot be told where its text stands"
        )
    if kv.in_window and set(state.groups) != {"decoder"}:
        raise ValueError(
            "in_window: got a prefilled prompt, takes a learned prefix for this "
            f"{type(model).__name__}; prompts slide in decoder-only models alone"
        )
    # converted once here, not in every layer of every step
    return ActivePrefix(kv.to(model.device, model.dtype), state.backend)


def _state(model: PreTrainedModel) -> State:
    state = getattr(model, STATE, None)
    if state is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched; call patch_model")
    return state


def _check_type(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, takes a transformers PreTrainedModel")


def _patch(model: PreTrainedModel, example: Mapping[str, Any] | None = None) -> None:
    state = State(_implementations(model), "auto")
    try:
        _set_implementation(model)
        slots = probe(model, example)
    except Exception:
        _restore(state.previous)
        raise
    state.shapes, state.groups = slots.shapes, slots.groups
    for slot, module in enumerate(slots.modules):
        setattr(module, SLOT, (*getattr(module, SLOT, ()), slot))
    for module in slots.shared:
        state.handles.append(module.register_forward_pre_hook(take_turn, with_kwargs=True))
    # Inner models get the hook too: calling one alone, as generate() calls an encoder, must not
    # silently run without the prefix.
    whole: dict[nn.Module, Placing] = {}
    if is_encoder_decoder(model):
        decoder = model.get_decoder()
        state.placing = "embedding" if _position_embeddings(decoder) else "fixed"
        whole = {model: "inner", model.base_model: "inner"}
        whole |= {model.get_encoder(): "fixed", decoder: state.placing}
        embeddings = _position_embeddings(decoder)
    else:
        state.placing = _placing(model, causal="decoder" in state.groups)
        whole = {model: state.placing, model.base_model: state.placing}
        embeddings = _position_embeddings(model) if state.placing == "embedding" else []
    for module, placing in whole.items():
        hook = partial(inject, names=_parameters(module), placing=placing)
        state.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(module, HOOKED, state)
    for module in embeddings:
        hook = partial(shift, names=_parameters(module))
        state.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(module, HOOKED, state)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        state.handles.append(head.register_forward_pre_hook(contiguous_input))
    setattr(model, STATE, state)
    _PATCHED.add(model)


def _placing(model: PreTrainedModel, *, causal: bool) -> Placing:
    """How a model that is one stack learns where its text stands."""
    by_argument = takes(model, "position_ids")
    if causal and by_argument:
        return "argument"
    if _position_embeddings(model):
        return "embedding"
    return "given" if by_argument else "fixed"


def _position_embeddings(stack: nn.Module) -> list[nn.Module]:
    """The modules that place a text behind the keys that are in the cache."""
    return [module for module in stack.modules() if takes(module, CACHED)]


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """The configs of a model and of the models in it, and the implementations to restore."""
    before = {
        id(config): implementation
        for other in _PATCHED
        if is_patched(other)
        for config, implementation in _state(other).previous
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


def _restore(previous: list[tuple[Any, str | None]]) -> None:
    """Sets implementations back, but in configs that another patched model shares."""
    shared = {
        id(config)
        for other in _PATCHED
        if is_patched(other)
        for config, _ in _state(other).previous
    }
    for config, implementation in previous:
        if id(config) not in shared:
            config._attn_implementation_internal = implementation


def _set_implementation(model: PreTrainedModel) -> None:
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not route its attention through transformers' "
            "AttentionInterface, so no other attention can take its place"
        )


__all__ = [
    "UnsupportedModelError",
    "activate",
    "default_offset",
    "is_patched",
    "layer_groups",
    "layer_shapes",
    "patch_model",
    "patched",
    "unpatch_model",
    "use_prefix",
]
