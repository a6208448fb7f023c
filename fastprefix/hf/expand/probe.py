"""Learns a model's layers from its KV cache, and checks that a prefix in the cache is exact.

All this is found by running the model's own stack of layers on a few tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fastprefix.hf.devices import device_of
from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.expand.cache import Expanded
from fastprefix.hf.expand.hooks import install
from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.patch.patch import HOOKED, Patch
from fastprefix.hf.patch.position_limit import position_limit
from fastprefix.hf.patch.probe import UnsupportedModelError, is_encoder_decoder, takes
from fastprefix.hf.versions import cache_name, parameters
from fastprefix.kv import PrefixKV

_PREFIX, _TEXT = 3, 4  # tokens


def can_expand(model: PreTrainedModel) -> bool:
    """Whether a model looks like one whose cache could hold a prefix."""
    return not is_encoder_decoder(model) and _find_stack(model) is not None


def patch_expanded(model: PreTrainedModel, refusal: UnsupportedModelError) -> Patch:
    """Learns a model's layers from its cache, registers the hooks, and checks what they do.

    Args:
        model: a model that cannot be patched. It is left as it was if it is refused here as well.
        refusal: why it cannot be patched.

    Raises:
        UnsupportedModelError: its cache does not help either; the message says why.
    """

    def refused(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{refusal}; and fallback='expand' does not help: {why}")

    stack = _find_stack(model)
    if why := _why_not(model, stack):
        raise refused(why)
    assert stack is not None
    vocabulary = int(stack.config.get_text_config().vocab_size)
    ids = (torch.arange(_PREFIX + _TEXT, device=device_of(model)) + 1)[None] % vocabulary
    with evaluating(model):
        try:
            cache = DynamicCache(config=stack.config)
            whole = _run(stack, ids, cache=cache)
            kv = _of_cache(cache, ids.shape[1])
            other = ids.clone()
            other[0, -1] = 0
            causal = torch.equal(_run(stack, other)[:, :-1], _run(stack, ids)[:, :-1])
            by_slots = not _is_told_positions(stack, ids)
        except Exception as error:
            raise refused(str(error)) from error
        how = Expanded(str(refusal), by_slots, True, position_limit(model, stack))
        patch = Patch([], "auto", shapes=kv.shapes, expanded=how)
        patch.groups = ("decoder" if causal else "encoder",) * kv.num_layers
        patch.query_heads = (stack.config.num_attention_heads,) * kv.num_layers
        patch.sources = tuple(range(kv.num_layers))
        install(model, stack, patch)
        try:
            try:
                pads_free = _are_pads_free(stack, kv, ids, whole, by_slots)
            except Exception as error:
                raise refused(f"{type(error).__name__}: {error}") from error
            if pads_free is None:
                raise refused(
                    f"what {type(model).__name__} computes behind keys and values in its cache is "
                    "not what it computes behind the text that they are of"
                )
            patch.expanded = replace(how, pads_free=pads_free)
        except BaseException:
            for handle in patch.handles:
                handle.remove()
            for module in {model, stack}:
                delattr(module, HOOKED)
            raise
    return patch


def _why_not(model: PreTrainedModel, stack: PreTrainedModel | None) -> str:
    """Why a model's cache cannot hold a prefix, if that shows without a run; else ""."""
    if is_encoder_decoder(model):
        return "it is for decoder-only models"
    if stack is None:
        return f"{type(model).__name__} takes no KV cache"
    if model.main_input_name != "input_ids":
        return f"{type(model).__name__} reads {model.main_input_name} and no text"
    if getattr(model, "tp_size", None) not in (None, 1):
        return "it does not know which heads of a tensor-parallel model a rank has"
    for layer in DynamicCache(config=stack.config).layers:
        if type(layer) is not DynamicLayer:
            return f"its cache has a {type(layer).__name__}, which drops what it holds"
    return ""


def _are_pads_free(
    stack: PreTrainedModel, kv: PrefixKV, ids: Tensor, whole: Tensor, by_slots: bool
) -> bool | None:
    """Whether padding on the left of a text leaves the results as they are.

    Args:
        stack: the stack with the hooks.
        kv: what its layers put into the cache for the token ids.
        ids: [1, L].
        whole: [1, L, hidden], what it makes of them.
        by_slots: see :class:`fastprefix.hf.expand.cache.Expanded`.

    Returns:
        None if a text behind a prefix gets other results than in one sequence.
    """
    front = kv.map(lambda x: x[:, :_PREFIX])
    front = PrefixKV(front.keys, front.values, _PREFIX)
    text = ids[:, _PREFIX:]
    alone = _run(stack, text)
    if not _agrees(stack, front, text, whole, alone, left=0, right=1):
        return None
    pads_free = _agrees(stack, front, text, whole, alone, left=2, right=0)
    return pads_free and not (by_slots and _keys_hold_slots(stack, text))


def cached_keys_values(model: PreTrainedModel, inputs: dict[str, Tensor]) -> PrefixKV:
    """The keys and values of one text in a model patched with fallback="expand".

    Args:
        model: it is left as it was.
        inputs: input_ids [1, P] or inputs_embeds [1, P, hidden].

    Raises:
        NotImplementedError: there are other inputs, for example images.
    """
    if len(inputs) != 1:
        raise NotImplementedError(
            f"{', '.join(sorted(set(inputs) - {'input_ids', 'inputs_embeds'}))}: "
            f"{type(model).__name__} with fallback='expand' takes a prompt of text alone"
        )
    stack = _find_stack(model)
    assert stack is not None
    cache = DynamicCache(config=stack.config)
    (length,) = {x.shape[1] for x in inputs.values()}
    with evaluating(model):
        _run(stack, cache=cache, fastprefix=ActivePrefix(None), **inputs)
    return _of_cache(cache, length)


def _find_stack(model: PreTrainedModel) -> PreTrainedModel | None:
    """The stack of layers: the innermost model with a cache argument. None unless just one."""
    takers = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and cache_name(parameters(part)) is not None
    ]
    inner = [x for x in takers if not any(y is not x and y in set(x.modules()) for y in takers)]
    return inner[0] if len(inner) == 1 else None


def _run(
    stack: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    cache: DynamicCache | None = None,
    **kwargs: Any,
) -> Tensor:
    """Last hidden states [B, L, hidden]."""
    if cache is not None:
        name = cache_name(parameters(stack))
        assert name is not None
        kwargs[name] = cache
    if takes(stack, "use_cache"):
        kwargs["use_cache"] = cache is not None
    if input_ids is not None:
        kwargs["input_ids"] = input_ids
    hidden: Tensor = stack(**kwargs)[0]
    return hidden


def _of_cache(cache: DynamicCache, length: int) -> PrefixKV:
    """The keys and values in a cache for one row of the given length."""
    keys, values = (
        [getattr(layer, what, None) for layer in cache.layers] for what in ("keys", "values")
    )
    shapes = [None if x is None else tuple(x.shape) for x in keys]
    if all(shape is None for shape in shapes):
        raise ValueError("it keeps nothing in its cache, as encoders do (is_decoder=False)")
    for x in (*keys, *values):
        if x is None or (x.dim(), x.shape[0], x.shape[2]) != (4, 1, length):
            raise ValueError(f"its cache holds keys {shapes}, not [B, Hkv, L, D] in every layer")
    return PrefixKV(
        tuple(x[0].clone() for x in keys if x is not None),
        tuple(x[0].clone() for x in values if x is not None),
        position_offset=0,
    )


def _is_told_positions(stack: PreTrainedModel, ids: Tensor) -> bool:
    """Whether position_ids have an effect, or only the slots of the cache."""
    if not takes(stack, "position_ids"):
        return False
    near = torch.arange(ids.shape[1], device=ids.device)[None]
    far = near.clone()
    far[0, -1] += 2  # moving all would not show in a model of distances
    mask = torch.ones_like(ids)
    told = [_run(stack, ids, position_ids=x, attention_mask=mask) for x in (near, far)]
    return not torch.equal(*told)


def _keys_hold_slots(stack: PreTrainedModel, text: Tensor) -> bool:
    """Whether the first layer's keys depend on the slots of a text, so that pads shift them."""
    keys = []
    for left in (0, 2):
        cache = DynamicCache(config=stack.config)
        ids = torch.nn.functional.pad(text, (left, 0))
        mask = torch.nn.functional.pad(torch.ones_like(text), (left, 0))
        _run(stack, ids, cache=cache, attention_mask=mask, fastprefix=ActivePrefix(None))
        keys.append(_of_cache(cache, ids.shape[1]).keys[0][:, left:].float())
    noise = 8 * torch.finfo(stack.dtype).eps * keys[0].abs().max()
    return bool((keys[0] - keys[1]).abs().max() > noise)


def _agrees(
    stack: PreTrainedModel,
    front: PrefixKV,
    text: Tensor,
    whole: Tensor,
    alone: Tensor,
    *,
    left: int,
    right: int,
) -> bool:
    """Whether a text behind a prefix, with pads around it, gets the results of one sequence."""
    ids = torch.nn.functional.pad(text, (left, right))
    mask = torch.nn.functional.pad(torch.ones_like(text), (left, right))
    active = ActivePrefix(front)
    found = _run(stack, ids, attention_mask=mask, fastprefix=active)
    wanted = whole[:, _PREFIX:].float()
    found = found[:, left : left + text.shape[1]].float()
    error = (found - wanted).abs().max()
    effect = (alone.float() - wanted).abs().max()
    noise = 8 * torch.finfo(whole.dtype).eps * wanted.abs().max()
    return bool(error <= torch.maximum(0.02 * effect, noise))
