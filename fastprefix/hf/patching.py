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
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from fastprefix.attention.selection import BACKENDS
from fastprefix.hf.attention import NAME, SLOT, ActivePrefix, Recorder
from fastprefix.hf.hook import contiguous_input, inject
from fastprefix.hf.sharding import Sharding, find_sharding, refuse_split_heads
from fastprefix.hf.state import ACTIVE, HOOKED, STATE, State
from fastprefix.kv import LayerShape, PrefixKV

_LOCK = threading.RLock()
_PATCHED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class UnsupportedModelError(ValueError):
    """The model cannot take a prefix; the message says why."""


def patch_model(model: PreTrainedModel, backend: str = "auto") -> PreTrainedModel:
    """Makes a model attend through fastprefix, ready for :func:`use_prefix`.

    Runs the model once on one token to see which modules attend, in which order, and what shape
    their keys and values have. Without an active prefix the model computes what it did before.

    Args:
        model: a transformers model whose attention goes through AttentionInterface.
        backend: of :func:`fastprefix.prefix_attention`, for all layers.

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
            _patch(model)
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
        if not _sharing_config(model):
            _set_implementation(model, state.previous)
        delattr(model, STATE)
    return model


def is_patched(model: PreTrainedModel) -> bool:
    """Whether :func:`patch_model` holds for a model."""
    return getattr(model, STATE, None) is not None


def layer_shapes(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """Key and value shapes of a patched model's attention layers, as seen in a forward pass.

    Of a tensor-parallel model with the heads of all ranks, as its prefixes have them.
    """
    return _state(model).shapes


def sharding_of(model: PreTrainedModel) -> Sharding | None:
    """Which heads this rank has of a patched tensor-parallel model; None for any other."""
    return _state(model).sharding


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
        ValueError: the model is not patched or has no weights, or kv does not fit its layers.
    """
    if model.device.type == "meta":
        raise ValueError(
            "model: its weights are on the meta device. FSDP's cpu_ram_efficient_loading puts them "
            "there and brings back what state_dict() holds, which of a tuned model is the adapter "
            "alone: switch it off"
        )
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
    # converted once here, not in every layer of every step
    kv = kv.to(model.device, model.dtype)
    return ActivePrefix(state.sharding.narrow(kv) if state.sharding else kv, state.backend)


def _state(model: PreTrainedModel) -> State:
    state = getattr(model, STATE, None)
    if state is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched; call patch_model")
    return state


def _check_type(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, takes a transformers PreTrainedModel")


def _patch(model: PreTrainedModel) -> None:
    previous = model.config._attn_implementation
    for other in _sharing_config(model):
        previous = _state(other).previous
    state = State(previous, "auto")
    _set_implementation(model, NAME)
    try:
        modules, state.shapes, state.sharding = _probe(model)
    except Exception:
        _set_implementation(model, state.previous)
        raise
    for slot, module in enumerate(modules):
        setattr(module, SLOT, slot)
    # The decoder gets the hook too: calling it alone must not silently run without the prefix.
    for hooked in {id(m): m for m in (model, model.base_model)}.values():
        parameters = tuple(inspect.signature(hooked.forward).parameters)
        hook = partial(inject, names=parameters)
        state.handles.append(hooked.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(hooked, HOOKED, state)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        state.handles.append(head.register_forward_pre_hook(contiguous_input))
    setattr(model, STATE, state)
    _PATCHED.add(model)


def _sharing_config(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Other patched models made from the same config object, which holds the implementation."""
    return [
        other
        for other in _PATCHED
        if other is not model and other.config is model.config and is_patched(other)
    ]


def _set_implementation(model: PreTrainedModel, name: str | None) -> None:
    if name is None:
        model.config._attn_implementation_internal = None
        return
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not route its attention through transformers' "
            "AttentionInterface, so no other attention can take its place"
        )


@torch.no_grad()
def _probe(
    model: PreTrainedModel,
) -> tuple[list[nn.Module], tuple[LayerShape, ...], Sharding | None]:
    """The attention modules in the order of their calls, and what they were handed."""
    if problem := refuse_split_heads(model):
        raise UnsupportedModelError(f"{type(model).__name__}: {problem}")
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__}: only decoder-only text models are supported yet"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__}: takes no position_ids, so its text cannot be placed "
            "behind a prefix; not supported yet"
        )
    recorder = Recorder()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=token, use_cache=False, fastprefix=recorder)
        sharding = find_sharding(model)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward does not pass keyword arguments down to the "
            f"attention layers ({error})"
        ) from error
    finally:
        for module in training:
            module.training = True
    if not recorder.modules:
        raise UnsupportedModelError(
            f"{type(model).__name__}: none of its attention layers received the keyword arguments "
            "of the forward call, through which a prefix travels"
        )
    if len(set(map(id, recorder.modules))) != len(recorder.modules):
        raise UnsupportedModelError(
            f"{type(model).__name__}: shares attention modules between layers; not supported yet"
        )
    shapes = tuple(
        LayerShape(key.shape[1], key.shape[3], value.shape[3])
        for key, value in zip(recorder.keys, recorder.values, strict=True)
    )
    return recorder.modules, sharding.whole_shapes(shapes) if sharding else shapes, sharding


__all__ = [
    "UnsupportedModelError",
    "activate",
    "is_patched",
    "layer_shapes",
    "patch_model",
    "patched",
    "sharding_of",
    "unpatch_model",
    "use_prefix",
]
