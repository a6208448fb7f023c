"""What is right: plain transformers, which nothing of fastprefix ever touches.

A prompt is one sequence with its text. A learned prefix is put into a cache of transformers' own,
where the class keeps one layer of it for each layer of the prefix and no window would cut it; else
in front of each layer's keys and values by an attention function registered for the purpose
(:mod:`compat.oracle`), which is trusted for a class only if without a prefix it gives what the
class gives by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compat import oracle as concatenating
from walk.build import takes

PLAIN = "_walk_plain"  # marks models that fastprefix has never seen
Layers = list[tuple[Tensor, Tensor]]  # key and value [Hkv, P, D] of each layer


class NotApplicableError(Exception):
    """The plain model does not do this either."""


class BlindError(NotApplicableError):
    """A check here would pass whatever fastprefix did."""


def output_of(out: Any) -> Tensor:
    """What a head computes, in one tensor."""
    if getattr(out, "logits", None) is not None:
        return out.logits
    if getattr(out, "start_logits", None) is not None:
        return torch.stack([out.start_logits, out.end_logits], -1)
    if getattr(out, "last_hidden_state", None) is not None:
        return out.last_hidden_state
    return next(x for x in out.values() if isinstance(x, Tensor) and x.is_floating_point())


def run(model: Any, **inputs: Any) -> Tensor:
    """A model's output; whatever it draws, it draws the same every time."""
    torch.manual_seed(0)
    if getattr(model, PLAIN, False):
        forget(model)
    return output_of(model(**inputs))


def forget(model: Any) -> None:
    """Takes from a plain model what it remembers of the last image."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, in standard deviations of what is right."""
    got, want = got.detach().double(), want.detach().double()
    if not torch.isfinite(got).all():
        return float("inf")
    spread = want.std().item() if want.numel() > 1 else want.abs().item()
    return ((got - want).abs().max() / (spread or 1.0)).item()


def cache_argument(model: Any) -> str | None:
    """Under which name the forward takes a cache: it changed in transformers 5.24."""
    return next((n for n in ("cache", "past_key_values") if takes(model, n)), None)


class PrefixOracle:
    """A learned prefix in a plain model.

    Args:
        model: copied.
        shapes: of the prefix's layers, one for each call of attention.
        offset: by how much the text moves.
        inputs: of one forward, to try the ways on.
        image: whether the forwards that are asked for have images, in which places count
            differently; inputs then have none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: list[Any],
        offset: int,
        inputs: dict[str, Tensor],
        image: bool = False,
    ) -> None:
        self.image = image
        self.plain, self.shapes, self.offset = copy.deepcopy(model), shapes, offset
        self.why: list[str] = []
        self.windowed = False
        self.layers = self._cache_layers(inputs)
        self.interface = self._interface(inputs)

    def ways(self) -> list[Callable[..., Tensor]]:
        """How to run with a prefix, the most independent way first."""
        with_cache = self.layers is not None and not self.windowed and not self.image
        ways = [self._run_cached] if with_cache else []
        return ways + ([self._run_concatenated] if self.interface is not None else [])

    def _cache_layers(self, inputs: dict[str, Tensor]) -> list[int] | None:
        """Which layers of a cache hold keys; None if they are not the prefix's layers."""
        name = cache_argument(self.plain)
        if name is None or self.offset == 0 or "decoder_input_ids" in inputs:
            self.why.append("no cache in which its text stands behind the prefix")
            return None
        try:
            cache = DynamicCache(config=self.plain.config)
            with torch.no_grad():
                run(self.plain, **inputs, **{name: cache}, use_cache=True)
            found = [
                i for i, layer in enumerate(cache.layers)
                if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.dim() == 4
            ]  # fmt: skip
            # a learned prefix does not slide, and a layer that keeps a state takes keys in the
            # cache of another for a text that it has seen
            self.windowed = len(found) < len(cache.layers) or any(
                getattr(layer, "is_sliding", False) or hasattr(layer, "recurrent_states")
                for layer in cache.layers
            )
            got = [
                (cache.layers[i].keys.shape[1], cache.layers[i].keys.shape[3],
                 cache.layers[i].values.shape[3]) for i in found
            ]  # fmt: skip
        except Exception as problem:
            self.why.append(f"its cache: {type(problem).__name__}: {problem}"[:150])
            return None
        if got != [(s.num_heads, s.key_size, s.value_size) for s in self.shapes]:
            self.why.append(f"its cache holds {got}")
            return None
        return found

    def _interface(self, inputs: dict[str, Tensor]) -> Any:
        try:
            model = copy.deepcopy(self.plain)
            model.set_attn_implementation(concatenating.NAME)
            with torch.no_grad():
                want = run(self.plain, **inputs, **_no_cache(model))
                concatenating._Current.recorded = calls = []
                try:
                    got = run(model, **inputs, **_no_cache(model))
                finally:
                    concatenating._Current.recorded = None
        except Exception as problem:
            self.why.append(f"attention of our own: {type(problem).__name__}: {problem}"[:150])
            return None
        if len(calls) != len(self.shapes):
            self.why.append(f"attention of our own is called {len(calls)} times")
            return None
        if distance(got, want) > 1e-4:
            self.why.append("attention of our own changes it")
            return None
        self.order = [module for module, _, _ in calls]
        return model

    def _run_cached(self, prefix: Layers, **inputs: Any) -> Tensor:
        offset = prefix[0][0].shape[1]
        name = cache_argument(self.plain)
        assert self.layers is not None
        assert name is not None
        ids = inputs["input_ids"]
        B = len(ids)
        cache = DynamicCache(config=self.plain.config)
        for layer, (key, value) in zip(self.layers, prefix, strict=True):
            cache.update(key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1), layer)
        more: dict[str, Any] = {name: cache, "use_cache": True}
        mask = inputs.pop("attention_mask", torch.ones_like(ids))
        if takes(self.plain, "attention_mask"):
            more["attention_mask"] = torch.cat([mask.new_ones(B, offset), mask], 1)
        return run(self.plain, **inputs, **more)

    def _run_concatenated(self, prefix: Layers, **inputs: Any) -> Tensor:
        shares: dict[Any, Layers] = {}
        for module, part in zip(self.order, prefix, strict=True):
            shares.setdefault(module, []).append(part)
        model = self.interface
        if self.offset and takes(model, "position_ids") and "input_ids" in inputs:
            inputs["position_ids"] = self._positions(inputs) + self.offset
        elif self.offset:
            raise NotApplicableError("the oracle cannot tell it where its text stands")
        state = concatenating._Current
        state.shares, state.in_window = shares, False
        try:
            return run(model, **inputs, **_no_cache(model))
        finally:
            state.shares = None

    def _positions(self, inputs: dict[str, Any]) -> Tensor:
        """Where the plain model itself puts a text that stands alone."""
        B, L = inputs["input_ids"].shape
        plain = torch.arange(L).expand(B, -1) + first_position(self.plain)
        if not self.image:
            return plain
        seen: list[Tensor | None] = []

        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs.get("position_ids"))

        inner = getattr(self.plain, "model", self.plain)
        stack = getattr(inner, "language_model", None)
        if stack is None:
            return plain
        handle = stack.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.no_grad():
                run(self.plain, **inputs, **_no_cache(self.plain))
        finally:
            handle.remove()
        return plain if seen[0] is None else seen[0]


def first_position(model: Any) -> int:
    """What the model itself gives to the first token as its position."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return module.padding_idx + 1
    return 0


def _no_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if takes(model, "use_cache") else {}
