"""Takes the states of layers out of a cache of transformers, and puts them into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastprefix.hf.versions import CACHE_NAMES
from fastprefix.kv import LayerState

KINDS = ("conv", "recurrent")


@dataclass
class Keeping:
    """What a model's layers keep of a text beside keys and values; see :mod:`fastprefix.hf.states`.

    Attributes:
        stateful: whether they keep anything.
        why_not: why prompts are refused; None if they are not.
        pads: whether padding between a prompt and a text can be skipped.
        stepwise: whether layers with a state must get the tokens behind a prompt one by one.
        owners: the modules that go on from a state, by name, and the layers of the cache that the
            state is in.
        forms: for each state, by layer and name: its shape without the batch, and its dtype.
        cache: the class of cache that the model makes.
    """

    stateful: bool
    why_not: str | None = None
    pads: bool = False
    stepwise: bool = False
    owners: dict[str, tuple[int, ...]] = field(default_factory=dict)
    forms: dict[tuple[int, str], tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    cache: Any = None


def prompt_states(output: Any) -> tuple[LayerState, ...]:
    """The states that a run of one row has left in its cache."""
    return tuple(
        LayerState(layer, {name: x[0].detach().clone() for name, x in tensors.items()})
        for layer, tensors in states_in(cache_in(output)).items()
    )


def states_in(cache: Any) -> dict[int, dict[str, Tensor]]:
    """The states in a cache, [B, ...] each, by layer and name."""
    if hasattr(cache, "linear_cache"):
        held = enumerate(cache.linear_cache)
        return {layer: {"linear": x} for layer, x in held if isinstance(x, Tensor)}
    found: dict[int, dict[str, Tensor]] = {}
    for layer, place in enumerate(getattr(cache, "layers", ())):
        if not is_state_layer(place):
            continue
        for number, started in place.has_previous_state.items():
            for kind in KINDS:
                tensor = getattr(place, f"{kind}_states")[number]
                if started and tensor is not None:
                    found.setdefault(layer, {})[f"{kind}.{number}"] = tensor
    return found


def fill_states(cache: Any, states: Mapping[int, Mapping[str, Tensor]], argument: str) -> None:
    """Fills the layers of an empty cache with states. The cache may overwrite the tensors later."""
    if hasattr(cache, "linear_cache"):
        for layer, tensors in states.items():
            cache.set_linear_cache(layer, tensors["linear"])
        return
    for layer, tensors in states.items():
        place = cache.layers[layer] if layer < len(cache.layers) else None
        if place is None or not is_state_layer(place):
            raise ValueError(
                f"{argument}: got a {type(cache).__name__} whose layer {layer} takes no state, "
                "takes one made for the model: DynamicCache(config=model.config), or None"
            )
        for name, tensor in tensors.items():
            kind, number = name.split(".")
            if kind == "conv":
                size = tensor.shape[-1]
                place.update_conv_state(tensor, state_idx=int(number), conv_kernel_size=size)
            else:
                place.update_recurrent_state(tensor, state_idx=int(number))
            place.has_previous_state[int(number)] = True


def is_state_layer(layer: Any) -> bool:
    return hasattr(layer, "update_conv_state") and hasattr(layer, "has_previous_state")


def holds_states(x: Any) -> bool:
    return hasattr(x, "linear_cache") or any(map(is_state_layer, getattr(x, "layers", ())))


def new_cache(module: Any, keeping: Keeping) -> Any:
    """An empty cache of the kind that the model itself makes."""
    if keeping.cache is None or keeping.cache is DynamicCache:
        return DynamicCache(config=module.config)
    return keeping.cache()


def cache_in(output: Any) -> Any:
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)
