"""Whether the layers of a model keep a state of the text, and whether they can start from it.

A model is run once on a few tokens to find out. It is refused if it does not go on from a prompt's
state as if prompt and text were one sequence.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from fastprefix.hf.devices import device_of
from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.facts import Facts
from fastprefix.hf.patch.patch import HOOKED, Patch, patch_of
from fastprefix.hf.patch.threads import ACTIVE
from fastprefix.hf.states.caches import (
    Keeping,
    cache_in,
    states_in,
)
from fastprefix.hf.states.pieces import PARTS, join, split
from fastprefix.hf.states.seam import PADS, Seam, run, tokens_of_text
from fastprefix.hf.versions import parameters

# Names in a config's layer_types of layers that keep nothing but keys and values.
_PLAIN_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "attention", "moe", "mlp", "dense",
    "sparse", "dummy",
}  # fmt: skip
_PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
_STATE_LAYERS = {
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
_LOCK = threading.RLock()
_FACTS = Facts[Keeping]()


def says_stateful(model: PreTrainedModel) -> bool:
    """Whether a model's class or config says that its layers keep more than keys and values."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False)) or not set(types) <= _PLAIN_TYPES


def keeping_of(model: PreTrainedModel) -> Keeping:
    """What the layers of a patched decoder-only model keep of a text; runs it the first time."""
    patch = patch_of(model)
    with _LOCK:
        keeping = _FACTS.recall(model)
        if keeping is None:
            with evaluating(model):
                keeping = _find(model, patch)
            _FACTS.remember(model, keeping)
        _install(model, patch, keeping)
    return keeping


def refuse(model: PreTrainedModel, keeping: Keeping) -> None:
    """Raises NotImplementedError for a model that cannot use prefilled prompts."""
    if keeping.why_not:
        raise NotImplementedError(
            f"kv: {type(model).__name__} does not take a prompt's keys and values for its text, "
            f"{keeping.why_not}; put the prompt into input_ids (a learned prefix is no text, and "
            "works)"
        )


def _find(model: PreTrainedModel, patch: Patch) -> Keeping:
    """Runs a model on a few tokens to see what its layers keep, and whether they go on from it."""
    said, names = says_stateful(model), parameters(model)
    if "use_cache" not in names and "kwargs" not in names:
        return Keeping(said, "its layers keep a state besides" if said else None)
    ids = tokens_of_text(model)
    places = torch.arange(ids.shape[1], device=device_of(model))[None]
    try:
        whole = run(model, ids, places)
    except Exception as error:  # it needs more than a text, or accepts no cache
        why_not = f"it does not run on a few tokens with a cache ({error!r})"
        return Keeping(said, why_not if said else None)
    keeping = _kept_in(cache_in(whole), said)
    if not keeping.forms:
        return keeping
    if patch.sharding is not None:
        return Keeping(True, "its layers keep a state besides, which tensor parallelism divides")
    seam = Seam(model, patch, keeping, ids, places, whole)
    keeping.owners = seam.owners
    _install(model, patch, keeping)
    try:
        keeping.stepwise = not seam.goes_on(False, 0)
        keeping.pads = seam.goes_on(keeping.stepwise, PADS)
        if keeping.stepwise and not seam.goes_on(True, 0):
            keeping.why_not = (
                "its layers keep a state besides, and do not go on from it by several tokens as if "
                "these were one text with the prompt"
            )
        elif not seam.goes_on_from_prompt(0):
            keeping.why_not = (
                "its layers keep a state besides, and compute something else behind them than "
                "behind the prompt itself"
            )
        keeping.pads = keeping.pads and seam.goes_on_from_prompt(PADS)
    finally:
        setattr(ACTIVE, patch.key + PARTS, None)
    return keeping


def _kept_in(cache: Any, said: bool) -> Keeping:
    """What a run has left in a cache besides keys and values; without forms if nothing.

    Args:
        cache: the cache of the run; None if the model returned none.
        said: whether the model says that its layers keep a state.
    """
    outside = Keeping(said, "its layers keep a state outside the cache" if said else None)
    if cache is None:
        return outside
    strange = {
        type(layer).__name__
        for layer in getattr(cache, "layers", ())
        if type(layer).__name__ not in _PLAIN_LAYERS | _STATE_LAYERS
    }
    if strange:
        what = f"its cache keeps more than keys and values ({', '.join(sorted(strange))})"
        return Keeping(True, what)
    held = states_in(cache)
    if not held:
        return outside
    forms = {
        (layer, name): (x.shape[1:], x.dtype)
        for layer, tensors in held.items()
        for name, x in tensors.items()
    }
    return Keeping(True, forms=forms, cache=type(cache))


def _install(model: PreTrainedModel, patch: Patch, keeping: Keeping) -> None:
    """Registers hooks on the modules that own a state, once per Patch."""
    if patch.keeping is not None:
        patch.keeping = keeping
        return
    patch.keeping = keeping
    for name, layers in keeping.owners.items():
        module = model.get_submodule(name)
        setattr(module, HOOKED, patch)
        hook = partial(split, layers=layers)
        patch.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        patch.handles.append(module.register_forward_hook(partial(join, layers=layers)))
