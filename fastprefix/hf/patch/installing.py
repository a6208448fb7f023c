"""The work of patching: the probe, the checks, and the hooks of a model that passes them.

Nothing is monkey-patched. The model gets transformers' own attention implementation of our name,
slot numbers on its attention modules, and forward pre-hooks. These add the active prefix to the
call's keyword arguments and move the text's positions behind it. The prefix thus travels with the
call, so that gradient checkpointing replays it and several forwards before a backward do not mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastprefix.hf.checking.check_patch import compare_patch
from fastprefix.hf.checking.known import FACTS, Known, ask
from fastprefix.hf.layer.attention import CAUSAL, SLOT
from fastprefix.hf.multimodal import language_model, models_around
from fastprefix.hf.patch.frequencies import frequency_thresholds
from fastprefix.hf.patch.hooks import contiguous_input, count_calls, inject, tell_layers_apart
from fastprefix.hf.patch.implementation import (
    NAME,
    implementations,
    restore,
    set_default,
    set_implementation,
)
from fastprefix.hf.patch.patch import HOOKED, Patch
from fastprefix.hf.patch.position_limit import position_limit
from fastprefix.hf.patch.positions import (
    ByEmbedding,
    InLanguageModel,
    InParts,
    Placing,
    Unmovable,
    placing_of,
    placing_of_decoder,
    position_embeddings,
    shift,
)
from fastprefix.hf.patch.probe import Slots, is_encoder_decoder, probe
from fastprefix.hf.patch.running import announce_forwards
from fastprefix.hf.patch.sharding import find_sharding, refuse_split_heads
from fastprefix.hf.states.keeping import says_stateful
from fastprefix.hf.versions import parameters


def patch_attention(
    model: PreTrainedModel, example: Mapping[str, Any] | None, check: bool
) -> Patch:
    """Gives a model our attention, checks that its results stay the same, and registers the hooks.

    Args:
        model: it is left as it was if it is refused.
        example: what to run it on; made from the config if None.
        check: whether to compare its outputs before and after.

    Raises:
        UnsupportedModelError: it cannot take a prefix.
    """
    patch = Patch(implementations(model), "auto", example=example)
    known = FACTS.recall(model) if example is None else None
    try:
        set_implementation(model)
        refuse_split_heads(model)
        if known is None:
            known = FACTS.remember(model, Known(probe(model, example)))
        slots = known.slots
        set_implementation(model, slots.own_use)
        for module, causal in slots.causal.items():
            setattr(module, CAUSAL, causal)
        if check:
            patch.known = known
            named = any(implementation == NAME for _, implementation in patch.previous)
            # a model that has our implementation already is compared with its default one
            bare = partial(set_default, model) if named else partial(restore, patch.previous)
            ours = partial(set_implementation, model, slots.own_use)
            ask(model, known, "patch", lambda: compare_patch(model, slots, example, bare, ours))
        patch.sharding = find_sharding(model)
    except Exception:
        for module in known.slots.causal if known is not None else ():
            delattr(module, CAUSAL)
        restore(patch.previous)
        raise
    _describe(model, patch, slots)
    announce_forwards(model, patch)
    _hook_layers(patch, slots)
    _hook_stacks(model, patch)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        patch.handles.append(head.register_forward_pre_hook(contiguous_input))
    return patch


def _describe(model: PreTrainedModel, patch: Patch, slots: Slots) -> None:
    """Writes down what the probe found out about the layers."""
    patch.shapes, patch.query_heads = slots.shapes, slots.query_heads
    patch.groups, patch.sources = slots.groups, slots.sources
    patch.own_use = slots.own_use
    patch.stateful = says_stateful(model)
    patch.is_encoder_decoder = is_encoder_decoder(model)
    if patch.sharding is not None:
        patch.query_heads = tuple(total for _, _, total in patch.sharding.query_heads)
        patch.shapes = patch.sharding.whole_shapes(slots.shapes)


def _hook_layers(patch: Patch, slots: Slots) -> None:
    """Numbers the attention modules, and has those counted that make several calls."""
    for slot, module in enumerate(slots.modules):
        setattr(module, SLOT, (*getattr(module, SLOT, ()), slot))
    for module in slots.shared:
        patch.handles.append(module.register_forward_pre_hook(tell_layers_apart, with_kwargs=True))
    for module, each in slots.several.items():  # after the hook above, if it has both
        hook = partial(count_calls, each=each)
        patch.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


def _hook_stacks(model: PreTrainedModel, patch: Patch) -> None:
    """Registers the hooks that add the prefix to a call and place the text behind it.

    Inner models get the hook too. They may be called directly, as generate() calls an encoder, and
    must not silently run without the prefix then.
    """
    hooked: dict[nn.Module, Placing] = {}
    if patch.is_encoder_decoder:
        stack = model.get_decoder()
        limit = position_limit(model, stack)
        placing = placing_of_decoder(stack, limit)
        hooked = {model: InParts(), model.base_model: InParts()}
        hooked |= {model.get_encoder(): Unmovable(), stack: placing}
    else:
        stack = language_model(model) or model
        placing = placing_of(
            stack,
            causal="decoder" in patch.groups,
            limit=position_limit(model, stack),
            frequencies=frequency_thresholds(model.config),
        )
        if stack is not model:
            hooked = dict.fromkeys(models_around(model, stack), InLanguageModel())
        hooked |= {stack: placing, stack.base_model: placing}
    patch.placing = placing
    for module, way in hooked.items():
        hook = partial(inject, names=parameters(module), placing=way)
        patch.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(module, HOOKED, patch)
    if isinstance(placing, ByEmbedding):
        for module in position_embeddings(stack):
            hook = partial(shift, names=parameters(module), placing=placing)
            patch.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
