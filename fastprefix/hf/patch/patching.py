"""Patching a model, unpatching it, and blocks in which it attends to a prefix."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedModel

from fastprefix.arguments import check_flag, check_type, refuses_unknown_arguments
from fastprefix.attention.selection import BACKENDS
from fastprefix.hf.checking.check_prefix import check_prefix
from fastprefix.hf.expand.hooks import check_fallback
from fastprefix.hf.expand.probe import can_expand, patch_expanded
from fastprefix.hf.layer.attention import CAUSAL, SLOT
from fastprefix.hf.patch.activation import Prefixes, activate
from fastprefix.hf.patch.implementation import PATCHED, restore
from fastprefix.hf.patch.installing import patch_attention
from fastprefix.hf.patch.patch import HOOKED, PATCH, is_patched, patch_of
from fastprefix.hf.patch.probe import UnsupportedModelError
from fastprefix.hf.patch.running import LOCK, count_forwards, holding_up_forwards
from fastprefix.hf.patch.threads import ACTIVE

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
    their keys and values have. Without an active prefix the model computes what it did before. This
    is checked on a few tokens, once per model (:mod:`fastprefix.hf.checking`).

    Args:
        model: a transformers model whose attention goes through AttentionInterface: a decoder, an
            encoder of text or images, or an encoder-decoder. In a model that sees or hears, the
            language model inside attends to the prefix.
        backend: the backend argument of :func:`fastprefix.prefix_attention` for all layers.
        example: keyword arguments of one forward call. Needed for models whose input is none of
            token ids, images and log-mel spectrograms.
        check: False leaves out this check, and the checks of the prefixes that the model gets.
        fallback: what to do with a decoder that cannot be patched. None refuses it. "expand" puts
            its prefixes into its own KV cache: the results are the same, but each row gets a copy
            of the prefix. A warning says so once. Models that can be patched are not affected.

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
        patch = patch_of(model)
        patch.backend, patch.lasting = backend, True
    return model


@refuses_unknown_arguments
def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`patch_model`: the model is what it was, attention implementation included.

    Open :func:`use_prefix` blocks, in any thread, keep their prefixes. In that case the last block
    to end restores the model.

    Raises:
        ValueError: the model is not patched.
    """
    with LOCK:
        patch = patch_of(model)
        if patch.blocks:
            patch.lasting = False
            return model
        for handle in patch.handles:
            handle.remove()
        for module in model.modules():
            for name in (SLOT, HOOKED, CAUSAL):
                if hasattr(module, name):
                    delattr(module, name)
        delattr(model, PATCH)
        restore(patch.previous)
    return model


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

    ``generate()``, padding on either side and caches work as without a prefix: the cache and the
    attention mask contain only the text, and position_ids count it from 0. A block within a block
    replaces the prefix. A model that was not patched is patched for the block and then restored.

    Threads may run one model with different prefixes. A block belongs to its thread: a thread that
    generates for a streamer opens its own block. While any block with a prefix is open, the model
    refuses threads that have no block, so that none runs without its prefix unnoticed.

    Args:
        model: see :func:`patch_model`.
        kv: one prefix, which is moved to the model's device and dtype if necessary. Gradients flow
            to it. Or several prefixes by name, one for each row of a batch: a dict; a
            :class:`fastprefix.PrefixBank`, which loads only the names in rows; or a
            :class:`fastprefix.PackedPrefixKV`, which need not be packed again.
            Or None for no prefix, inside another block or while other threads have blocks.
        rows: with several prefixes, each row's name, or None for a row without a prefix. A batch
            may have k times as many rows as there are names. Each name then stands for k rows in
            succession, as ``generate()`` repeats rows for beams and num_return_sequences.
        check: see :func:`patch_model`.
        fallback: see :func:`patch_model`.

    Raises:
        TypeError: kv is not a PrefixKV, nor several by name, nor None; or rows are not names.
        ValueError: kv does not fit the model's layers, or rows does not fit kv. In the forward:
            rows does not fit the batch.
        UnsupportedModelError: see :func:`patch_model`.

    Example:
        >>> kv = {name: PrefixKV.load(f"{name}.safetensors") for name in ("poet", "cook")}
        >>> with use_prefix(model, kv, rows=["poet", "cook", None, "poet"]):
        ...     ids = model.generate(**batch_of_four)
    """
    with patched(model, fallback, check=check):
        active, patch = activate(model, kv, rows, check=check), patch_of(model)
        key, counts = patch.key, kv is not None
        outer = getattr(ACTIVE, key, None)
        with LOCK:
            patch.prefixes += counts
            patch.opened = (*patch.opened, (threading.get_ident(), active))
        setattr(ACTIVE, key, active)
        try:
            yield model
        finally:
            with LOCK:
                patch.prefixes -= counts
                patch.opened = tuple(one for one in patch.opened if one[1] is not active)
            setattr(ACTIVE, key, outer)
            if outer is None:
                delattr(ACTIVE, key)


@contextlib.contextmanager
def patched(
    model: PreTrainedModel, fallback: Fallback | None = None, *, check: bool = True
) -> Iterator[PreTrainedModel]:
    """Patches the model for this block; the last block to end restores it if none had patched it.

    Raises:
        UnsupportedModelError: see :func:`patch_model`.
        ValueError: unknown fallback.
    """
    _check_type(model)
    check_fallback(fallback)
    with LOCK:
        if not is_patched(model):
            _patch(model, None, check, fallback)
            count_forwards(model, patch_of(model), unpatch_model)
        patch = patch_of(model)
        patch.blocks += 1
    try:
        yield model
    finally:
        with LOCK:
            patch.blocks -= 1
            if not (patch.blocks or patch.running or patch.lasting) and is_patched(model):
                unpatch_model(model)


def _check_type(model: object) -> None:
    check_type("model", model, PreTrainedModel, "a transformers PreTrainedModel")


def _patch(
    model: PreTrainedModel,
    example: Mapping[str, Any] | None,
    check: bool,
    fallback: Fallback | None,
) -> None:
    """Patches a model; through its KV cache if nothing else works and the caller allows it."""
    try:
        with holding_up_forwards(model):
            patch = patch_attention(model, example, check)
        if fallback is not None and check:
            setattr(model, PATCH, patch)
            try:
                check_prefix(model)
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
        patch = patch_expanded(model, refusal)
    setattr(model, PATCH, patch)
    PATCHED.add(model)
