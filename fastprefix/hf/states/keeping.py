"""Which models' layers keep a state of the text, and whether they can start from it.

Found out by running a model once on a few tokens. What does not go on from a prompt's state as if
prompt and text were one sequence is refused.
"""

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

from fastprefix.hf.devices import device_of
from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.facts import Facts
from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.patch.patch import HOOKED, Patch, patch_of
from fastprefix.hf.patch.threads import ACTIVE
from fastprefix.hf.states.caches import Keeping, cache_in, is_state_layer, kept, new_cache, take
from fastprefix.hf.states.pieces import PARTS, join, plan, split
from fastprefix.hf.versions import CACHE_NAMES, cache_name, parameters
from fastprefix.kv import PrefixKV

# What a config's layer_types call layers that keep keys and values at most.
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
# Tokens of the runs that find out about a model: those before and behind the seam, and pads.
_FRONT, _REST, _PADS = 4, 4, 2

_LOCK = threading.RLock()
_FACTS = Facts[Keeping]()


def says_stateful(model: PreTrainedModel) -> bool:
    """Whether a model's class or config says that its layers keep more than keys and values."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False)) or not set(types) <= _PLAIN_TYPES


def keeping_of(model: PreTrainedModel) -> Keeping:
    """What a patched decoder-only model's layers keep of a text; runs it, the first time only."""
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
    """Raises NotImplementedError for a model that no prompt can be prefilled for."""
    if keeping.why_not:
        raise NotImplementedError(
            f"kv: {type(model).__name__} does not take a prompt's keys and values for its text, "
            f"{keeping.why_not}; put the prompt into input_ids (a learned prefix is no text, and "
            "works)"
        )


def _find(model: PreTrainedModel, patch: Patch) -> Keeping:
    """Runs a model on a few tokens: which layers keep what, and whether they go on from it."""
    said, names = says_stateful(model), parameters(model)
    if "use_cache" not in names and "kwargs" not in names:
        return Keeping(said, "its layers keep a state besides" if said else None)
    ids = _tokens(model)
    places = torch.arange(ids.shape[1], device=device_of(model))[None]
    placed = "position_ids" in names

    def run(
        tokens: Tensor,
        positions: Tensor,
        cache: Any = None,
        mask: Tensor | None = None,
        carried: Recorder | ActivePrefix | None = None,
    ) -> Any:
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
        inputs["fastprefix"] = carried or Recorder()
        if placed:
            inputs["position_ids"] = positions
        if cache is not None:
            inputs[cache_name(names) or CACHE_NAMES[0]] = cache
        if mask is not None:
            inputs["attention_mask"] = mask
        return model(**inputs)

    try:
        whole = run(ids, places)
    except Exception as error:  # takes more than a text, or no cache: its prompts will show it
        why_not = f"it does not run on a few tokens with a cache ({error!r})"
        return Keeping(said, why_not if said else None)
    cache = cache_in(whole)
    if cache is None:
        return Keeping(said, "its layers keep a state outside the cache" if said else None)
    strange = {
        type(layer).__name__
        for layer in getattr(cache, "layers", ())
        if type(layer).__name__ not in _PLAIN_LAYERS | _STATE_LAYERS
    }
    if strange:
        what = f"its cache keeps more than keys and values ({', '.join(sorted(strange))})"
        return Keeping(True, what)
    held = kept(cache)
    if not held:
        return Keeping(said, "its layers keep a state outside the cache" if said else None)

    if patch.sharding is not None:
        return Keeping(True, "its layers keep a state besides, which tensor parallelism divides")
    front = torch.cat([ids[:, :_FRONT]] * 2), places[:, :_FRONT].expand(2, -1)
    keeping = Keeping(
        True,
        forms={
            (layer, name): (x.shape[1:], x.dtype)
            for layer, tensors in held.items()
            for name, x in tensors.items()
        },
        cache=type(cache),
    )
    start = new_cache(model, keeping)
    recorder = Recorder()
    with _watching(model, start) as owners:
        begun = run(*front, start, carried=recorder)
    start = cache_in(begun)
    prompt = PrefixKV(
        tuple(key[0] for key in recorder.keys),
        tuple(value[0] for value in recorder.values),
        position_offset=_FRONT,
        in_window=True,
        states=take(begun),
    )
    keeping.owners = {name: tuple(layers) for name, layers in owners.items()}
    _install(model, patch, keeping)

    rest, later = torch.cat([ids[:, _FRONT:]] * 2), places[:, _FRONT:].expand(2, -1)
    wanted = _logits(whole)[0, _FRONT:]

    def right(stepwise: bool, pads: int, shared: bool = False) -> bool:
        """Whether the model goes on rightly, from its own cache or from a shared prompt.

        In the second row behind pads.
        """
        tokens, positions = rest.clone(), later.clone()
        mask = torch.ones(2, _FRONT + _REST, dtype=torch.long, device=ids.device)
        if pads:
            tokens[1] = torch.cat([rest[1, :1].expand(pads), rest[1, :-pads]])
            positions[1] = torch.cat([later[1, :1].expand(pads), later[1, :-pads]])
            mask[1, _FRONT : _FRONT + pads] = 0
        with suppress(Exception):  # what a model raises here it cannot do either
            if shared:
                text = mask[:, _FRONT:] if pads else None
                active = ActivePrefix(prompt.to(device_of(model), model.dtype), patch.backend)
                after = run(tokens, positions - _FRONT, mask=text, carried=active)
            else:
                given = {"attention_mask": mask, "input_ids": tokens}
                trial = Keeping(True, pads=True, stepwise=stepwise)
                setattr(ACTIVE, patch.key + PARTS, plan("", given, trial, 2, _REST))
                after = run(tokens, positions, copy.deepcopy(start), mask if pads else None)
            got, left = _logits(after), kept(cache_in(after))
            pairs = [(got[0], wanted), (got[1, pads:], wanted[: _REST - pads])]
            pairs += [
                (left[layer][name][0], x[0])
                for layer, tensors in held.items()
                for name, x in tensors.items()
            ]
            return all(_close(one, other, model.dtype) for one, other in pairs)
        return False

    try:
        keeping.stepwise = not right(False, 0)
        keeping.pads = right(keeping.stepwise, _PADS)
        if keeping.stepwise and not right(True, 0):
            keeping.why_not = (
                "its layers keep a state besides, and do not go on from it by several tokens as if "
                "these were one text with the prompt"
            )
        elif not right(keeping.stepwise, 0, shared=True):
            keeping.why_not = (
                "its layers keep a state besides, and compute something else behind them than "
                "behind the prompt itself"
            )
        keeping.pads = keeping.pads and right(keeping.stepwise, _PADS, shared=True)
    finally:
        setattr(ACTIVE, patch.key + PARTS, None)
    return keeping


@contextmanager
def _watching(model: nn.Module, cache: Any) -> Iterator[dict[str, list[int]]]:
    """By name, the innermost modules that hand a cache states in this block, and their layers."""
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


def _install(model: PreTrainedModel, patch: Patch, keeping: Keeping) -> None:
    """Hooks on the modules that own a state, once for each time that a model is patched."""
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


def _tokens(model: PreTrainedModel) -> Tensor:
    """[1, 8] token ids that mean nothing special."""
    config = model.config
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "token" in name and isinstance(value, (int, list)):
                special |= set(value) if isinstance(value, list) else {value}
    size = config.get_text_config().vocab_size
    plain = [i for i in range(min(size, 1000)) if i not in special] or [0]
    count = _FRONT + _REST
    chosen = [plain[(i * len(plain) // count + 7 * i) % len(plain)] for i in range(count)]
    return torch.tensor([chosen], device=device_of(model))


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    return output[0] if found is None else found


def _close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Within what rounding explains in a model of a dtype; a lost state is off by far more."""
    limit = 0.01 if dtype in (torch.float32, torch.float64) else 0.1
    got, wanted = got.double(), wanted.double()
    return bool((got - wanted).norm() <= limit * wanted.norm() + 1e-12)
