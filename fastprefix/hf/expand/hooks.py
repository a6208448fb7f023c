"""``fallback="expand"``: prefixes for models whose attention cannot be replaced, in their KV cache.

Such a model attends to whatever its cache contains. Hooks around its stack of layers put the
prefix there, copied for each row, and adapt the mask and the positions of the text. Nothing is
approximated: what cannot be done exactly is refused. The cost is a copy of the prefix for each row,
as in other libraries.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastprefix.hf.expand.cache import (
    check_cache,
    expanded_layers,
    fill_cache,
    front_mask,
    new_cache,
    reordered_mask,
)
from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.layer.attention import NAME
from fastprefix.hf.layer.packing import inputs_of, refuse_packed
from fastprefix.hf.patch.calls import behind_prefix, rows_and_offsets
from fastprefix.hf.patch.patch import HOOKED, Patch
from fastprefix.hf.patch.position_limit import check_position_limit
from fastprefix.hf.patch.running import announce_forwards
from fastprefix.hf.patch.threads import ACTIVE, active_of
from fastprefix.hf.versions import CACHE_NAMES, by_name, cache_name, cache_of, length_of, parameters
from fastprefix.kv import PackedPrefixKV, PrefixKV

FALLBACKS = (None, "expand")

# Suffix to a Patch's key in ACTIVE: what was active before each running call of the model.
_OUTER = "_outer"
# Attribute of a cache that the hooks made for a call whose caller wants no cache.
_FOR_ONE_CALL = "_fastprefix_for_one_call"

_LOCK = threading.Lock()
_WARNED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def check_fallback(fallback: object) -> None:
    """Raises ValueError for an unknown fallback."""
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback: got {fallback!r}, takes None or 'expand'")


def install(model: PreTrainedModel, stack: PreTrainedModel, patch: Patch) -> None:
    """Registers the hooks of a model and its stack of layers, and sets their Patch."""
    announce_forwards(model, patch)
    enter = partial(_enter, names=parameters(stack))
    hooks = [stack.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks.append(stack.register_forward_hook(_leave, with_kwargs=True, always_call=True))
    if model is not stack:
        hooks.append(model.register_forward_pre_hook(_hand_down, with_kwargs=True))
        hooks.append(model.register_forward_hook(_take_back, always_call=True))
    patch.handles += hooks
    for module in (model, stack):
        setattr(module, HOOKED, patch)


def check_expanded(model: PreTrainedModel, kv: PrefixKV | PackedPrefixKV, patch: Patch) -> None:
    """Refuses prefixes that a cache cannot hold exactly; warns once per model of the cost.

    Args:
        model: patched with fallback="expand".
        kv: a prefix with the model's shapes.
        patch: the model's.

    Raises:
        NotImplementedError: a bias or a gate, or layers with prefixes of different lengths.
        ValueError: a position_offset other than the prefix's length, where the model counts the
            tokens in its cache as positions.
    """
    kind, how = type(model).__name__, patch.expanded
    assert how is not None
    if isinstance(kv, PrefixKV):
        lengths = [[key.shape[1]] for key in kv.keys]
        offsets, kinds = [kv.position_offset], [kv.reweighting and kv.reweighting.kind]
    else:
        lengths = [one.tolist() for one in kv.prefix_lengths]
        offsets, kinds = kv.position_offsets[:-1].tolist(), list(kv.kinds)
    for found in filter(None, kinds):
        raise NotImplementedError(
            f"kv: got a prefix with a {found} for each query head, takes one without for "
            f"{kind} with fallback='expand', whose own attention knows no such thing"
        )
    if any(one != lengths[0] for one in lengths):
        raise NotImplementedError(
            f"kv: got prefixes of different lengths in different layers, takes one length for "
            f"{kind} with fallback='expand', which makes one mask for all layers"
        )
    if how.by_slots and offsets != lengths[0]:
        raise ValueError(
            f"position_offset: got {offsets} with prefixes of {lengths[0]} tokens, takes the same "
            f"for {kind} with fallback='expand', which counts the tokens in its cache as positions"
        )
    if not how.pads_free and len(set(lengths[0])) > 1:
        raise NotImplementedError(
            f"rows: got prefixes of {lengths[0]} tokens, takes the same length for {kind} with "
            "fallback='expand': shorter ones are padded, and its pads take positions"
        )
    with _LOCK:
        if model in _WARNED:
            return
        _WARNED.add(model)
    F = max(lengths[0])
    width = sum(shape.width for shape in kv.shapes)
    size = F * width * kv.keys[0].element_size()
    warnings.warn(
        f"{how.reason}. With fallback='expand' the prefix is copied into the KV cache for each row "
        f"of a batch: {F} tokens, {size:,} bytes a row",
        stacklevel=4,
    )


def _hand_down(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of the model around the stack: makes a prefix in its arguments the active one."""
    key = getattr(module, HOOKED).key
    before = getattr(ACTIVE, key, None)
    outer = getattr(ACTIVE, key + _OUTER, ())
    setattr(ACTIVE, key + _OUTER, (*outer, before))
    given = kwargs.get(NAME)
    setattr(ACTIVE, key, before if given is None else given)
    return args, {name: value for name, value in kwargs.items() if name != NAME}


def _take_back(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Undoes :func:`_hand_down` when the call ends or fails."""
    key = getattr(module, HOOKED).key
    *outer, before = getattr(ACTIVE, key + _OUTER)
    setattr(ACTIVE, key, before)
    setattr(ACTIVE, key + _OUTER, tuple(outer))
    if not outer:
        delattr(ACTIVE, key + _OUTER)
    if before is None:
        delattr(ACTIVE, key)


def _enter(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of the stack: puts the prefix into the cache, and adapts mask and positions."""
    patch: Patch = getattr(module, HOOKED)
    kwargs = by_name(names, args, kwargs)
    active = active_of(module, kwargs.pop(NAME, None), patch)
    cache = cache_of(kwargs)
    if not isinstance(active, ActivePrefix) or active.kv is None:
        if expanded_layers(cache):
            raise ValueError(
                "cache: holds a prefix, and none is active: go on with it in a use_prefix block "
                "with this prefix, or start with a new cache"
            )
        return (), kwargs
    _refuse(module, kwargs, active)
    index, offset = rows_and_offsets(active, module, kwargs, None)
    kv, active = active.kv, replace(active, prefix_index=index)
    if cache is None:
        cache = new_cache(cross=kwargs.get("encoder_hidden_states") is not None)
        wanted = kwargs.get("use_cache")
        if not (getattr(module.config, "use_cache", True) if wanted is None else wanted):
            setattr(cache, _FOR_ONE_CALL, True)
    inputs = inputs_of(kwargs)
    B, L = inputs.shape[:2]
    empty = check_cache(cache, active)
    seen = 0 if empty else length_of(cache)
    mask = _text_mask(kwargs, B, seen + L, inputs)
    pads = _pads(module, patch, active, mask) if empty else expanded_layers(cache)[0].pads
    if pads is not None and not empty and kwargs.get("attention_mask") is None:
        raise ValueError(
            "attention_mask: got None with padding in the cache, takes the mask [B, L] of all its "
            "tokens and of the new ones"
        )
    front = front_mask(active, B).to(mask)
    F, most = front.shape[1], kv.position_offset
    assert patch.expanded is not None
    if not patch.expanded.by_slots:
        positions = kwargs["position_ids"] = behind_prefix(kwargs, offset)
        check_position_limit(patch.expanded.limit, most, seen + L + most, positions)
    else:
        check_position_limit(patch.expanded.limit, F, seen + L + F, None)
    mask = torch.cat([front, mask], dim=1)
    kwargs["attention_mask"] = mask if pads is None else reordered_mask(mask, pads, F)
    if empty:
        fill_cache(cache, active, B, pads)
    for name in CACHE_NAMES:
        kwargs.pop(name, None)
    kwargs[cache_name(names) or CACHE_NAMES[0]] = cache
    for layer in expanded_layers(cache):
        layer.inside = True
    return (), kwargs


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook after the stack, even if it fails: the cache shows only the text again."""
    cache = cache_of(kwargs)
    for layer in expanded_layers(cache):
        layer.inside = False
    if not getattr(cache, _FOR_ONE_CALL, False):
        return None
    if isinstance(output, ModelOutput):
        return type(output)(**{name: x for name, x in output.items() if x is not cache})
    if isinstance(output, tuple):
        return tuple(x for x in output if x is not cache)
    return None


def _refuse(module: nn.Module, kwargs: dict[str, Any], active: ActivePrefix) -> None:
    """Refuses calls that cannot be exact with a prefix in the cache."""
    kind, config = type(module).__name__, module.config
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions: not with fallback='expand', whose weights are the prefix's as well"
        )
    if active.masses is not None:
        raise NotImplementedError(
            f"{kind}: the share of the attention that a prefix takes cannot be measured with "
            "fallback='expand'"
        )
    if module.training and any(
        getattr(x, "gradient_checkpointing", False) for x in module.modules()
    ):
        raise ValueError(
            f"gradient checkpointing: transformers takes the cache away, and {kind} with "
            "fallback='expand' has its prefix there; disable it"
        )
    refuse_packed(module, kwargs)
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if (
        mask is None
        and cache_of(kwargs) is None
        and positions is not None
        and _starts_anew(positions)
    ):
        raise NotImplementedError(
            f"position_ids: start anew, as those of packed sequences, which {kind} does not take "
            "with fallback='expand'"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        found = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask: got {found}, takes [B, L] for {kind} with fallback='expand'"
        )


def _starts_anew(positions: Tensor) -> bool:
    """Whether position_ids [B, L] go back or stand still."""
    return positions.shape[-1] > 1 and bool((positions.diff(dim=-1) < 1).any())


def _text_mask(kwargs: dict[str, Any], rows: int, length: int, like: Tensor) -> Tensor:
    """The text's mask [B, L], cached tokens included."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return torch.ones(rows, length, dtype=torch.long, device=like.device)
    assert isinstance(mask, Tensor)
    if tuple(mask.shape) != (rows, length):
        raise ValueError(
            f"attention_mask: got shape {list(mask.shape)}, takes {[rows, length]}: the text's "
            "tokens, those in the cache included"
        )
    return mask


def _pads(module: nn.Module, patch: Patch, active: ActivePrefix, mask: Tensor) -> Tensor | None:
    """[B]: how many pads are in front of each row's text, if they must be moved; else None.

    They need not be moved if the model gets position_ids: it ignores what is masked anywhere.
    """
    how = patch.expanded
    assert how is not None
    real = mask != 0
    pads = real.long().argmax(dim=-1)
    if not bool((pads > 0).any()) and not (how.by_slots and bool((~real).all(dim=-1).any())):
        return None
    if not how.pads_free:
        raise NotImplementedError(
            f"attention_mask: got padding on the left, takes it on the right for "
            f"{type(module).__name__} with fallback='expand', whose pads take positions"
        )
    if not how.by_slots:
        return None
    if bool((~real).all(dim=-1).any()):
        raise NotImplementedError(
            "attention_mask: got a row of pads alone, takes a token in each for "
            f"{type(module).__name__} with fallback='expand', which counts what stands between "
            "prefix and text"
        )
    return pads
