"""Runs a text in two parts, to see whether a model goes on as in one sequence."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.checking.samples import tokens
from fastprefix.hf.devices import device_of
from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.patch.patch import Patch
from fastprefix.hf.patch.threads import ACTIVE
from fastprefix.hf.states.caches import (
    Keeping,
    cache_in,
    is_state_layer,
    new_cache,
    prompt_states,
    states_in,
)
from fastprefix.hf.states.pieces import PARTS, plan
from fastprefix.hf.versions import CACHE_NAMES, cache_name, parameters
from fastprefix.kv import PrefixKV

# Numbers of tokens in front of the seam and behind it, and of pads between them.
_FRONT, _REST, PADS = 4, 4, 2


class Seam:
    """A text in two parts: does a model go on from the first part as in one sequence?

    Args:
        model: patched.
        patch: the model's.
        keeping: what its layers keep.
        ids: [1, L] of both parts.
        places: [1, L] their positions.
        whole: output of the model on both in one sequence.

    Attributes:
        owners: see :class:`fastprefix.hf.states.caches.Keeping`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        patch: Patch,
        keeping: Keeping,
        ids: Tensor,
        places: Tensor,
        whole: Any,
    ) -> None:
        self.model, self.patch = model, patch
        start = new_cache(model, keeping)
        recorder = Recorder()
        front, where = torch.cat([ids[:, :_FRONT]] * 2), places[:, :_FRONT].expand(2, -1)
        with _watching(model, start) as owners:
            begun = run(model, front, where, start, carried=recorder)
        self.owners = {name: tuple(layers) for name, layers in owners.items()}
        self.start = cache_in(begun)
        self.prompt = PrefixKV(
            tuple(key[0] for key in recorder.keys),
            tuple(value[0] for value in recorder.values),
            position_offset=_FRONT,
            in_window=True,
            states=prompt_states(begun),
        )
        self.rest = torch.cat([ids[:, _FRONT:]] * 2)
        self.places = places[:, _FRONT:].expand(2, -1)
        self.wanted = _logits(whole)[0, _FRONT:]
        self.held = states_in(cache_in(whole))

    def goes_on(self, stepwise: bool, pads: int) -> bool:
        """Whether the model goes on right from its own cache; the second row has pads first."""
        ids, positions, mask = self._behind_pads(pads)
        with suppress(Exception):  # if the model raises anything, it cannot do this
            given = {"attention_mask": mask, "input_ids": ids}
            trial = Keeping(True, pads=True, stepwise=stepwise)
            parts = plan("", given, trial, 2, _REST)
            setattr(ACTIVE, self.patch.key + PARTS, parts)
            start = copy.deepcopy(self.start)
            after = run(self.model, ids, positions, start, mask if pads else None)
            return self._is_right(after, pads)
        return False

    def goes_on_from_prompt(self, pads: int) -> bool:
        """The same from a prompt that the rows share."""
        ids, positions, mask = self._behind_pads(pads)
        with suppress(Exception):
            text = mask[:, _FRONT:] if pads else None
            prompt = self.prompt.to(device_of(self.model), self.model.dtype)
            active = ActivePrefix(prompt, self.patch.backend)
            after = run(self.model, ids, positions - _FRONT, mask=text, carried=active)
            return self._is_right(after, pads)
        return False

    def _behind_pads(self, pads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and positions [2, L] of the second part, and the mask of both parts."""
        ids, positions = self.rest.clone(), self.places.clone()
        mask = torch.ones(2, _FRONT + _REST, dtype=torch.long, device=ids.device)
        if pads:
            ids[1] = torch.cat([self.rest[1, :1].expand(pads), self.rest[1, :-pads]])
            positions[1] = torch.cat([self.places[1, :1].expand(pads), self.places[1, :-pads]])
            mask[1, _FRONT : _FRONT + pads] = 0
        return ids, positions, mask

    def _is_right(self, after: Any, pads: int) -> bool:
        """Whether logits and states equal those of one sequence."""
        got, left = _logits(after), states_in(cache_in(after))
        pairs = [(got[0], self.wanted), (got[1, pads:], self.wanted[: _REST - pads])]
        pairs += [
            (left[layer][name][0], x[0])
            for layer, tensors in self.held.items()
            for name, x in tensors.items()
        ]
        return all(_close(one, other, self.model.dtype) for one, other in pairs)


def tokens_of_text(model: PreTrainedModel) -> Tensor:
    """Token ids [1, L] of both parts."""
    ids: Tensor = tokens(model, 1, _FRONT + _REST)["input_ids"]
    return ids


def run(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    cache: Any = None,
    mask: Tensor | None = None,
    carried: Recorder | ActivePrefix | None = None,
) -> Any:
    """The output of a model on token ids [B, L] at positions [B, L] or [1, L]."""
    names = parameters(model)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
    inputs["fastprefix"] = carried or Recorder()
    if "position_ids" in names:
        inputs["position_ids"] = positions
    if cache is not None:
        inputs[cache_name(names) or CACHE_NAMES[0]] = cache
    if mask is not None:
        inputs["attention_mask"] = mask
    return model(**inputs)


@contextmanager
def _watching(model: nn.Module, cache: Any) -> Iterator[dict[str, list[int]]]:
    """The innermost modules that put states into a cache in this block, and into which layers."""
    owners: dict[str, list[int]] = {}
    running: list[str] = []
    thread = threading.get_ident()
    handles: list[Any] = []

    def note(layer: int) -> None:
        layers = owners.setdefault(running[-1], [])
        if layer not in layers:
            layers.append(layer)

    def enter(name: str, *_: Any) -> None:
        if threading.get_ident() == thread:
            running.append(name)

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread:
            running.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(leave))

    if hasattr(cache, "linear_cache"):
        keep = cache.set_linear_cache

        def linear(layer: int, *args: Any) -> None:
            note(layer)
            keep(layer, *args)

        cache.set_linear_cache = linear
        wrapped = [(cache, "set_linear_cache")]
    else:
        wrapped = []
        for layer, place in enumerate(cache.layers):
            if not is_state_layer(place):
                continue
            for method in ("update_conv_state", "update_recurrent_state"):

                def noted(*args: Any, _keep: Any, _layer: int, **kwargs: Any) -> Any:
                    note(_layer)
                    return _keep(*args, **kwargs)

                whole = getattr(place, method)
                setattr(place, method, partial(noted, _keep=whole, _layer=layer))
                wrapped.append((place, method))
    try:
        yield owners
    finally:
        for handle in handles:
            handle.remove()
        for thing, method in wrapped:
            delattr(thing, method)


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    return output[0] if found is None else found


def _close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding in this dtype; the error of a lost state is far larger."""
    limit = 0.01 if dtype in (torch.float32, torch.float64) else 0.1
    got, wanted = got.double(), wanted.double()
    return bool((got - wanted).norm() <= limit * wanted.norm() + 1e-12)
