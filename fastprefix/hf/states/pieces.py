"""Runs modules that go on from a state in pieces, if they would be wrong by themselves.

Pads between a prompt and its text would shift convolutions and let recurrences decay. So rows run
without their pads, and rows with the same padding run together. Some modules can start from a state
only if they get a single token; they get their tokens one by one. If gradients are wanted, modules
get states that they do not overwrite. Hooks on these modules do all this.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.layer.packing import inputs_of
from fastprefix.hf.patch.patch import HOOKED
from fastprefix.hf.patch.threads import ACTIVE
from fastprefix.hf.states.caches import KINDS, Keeping, holds_states

# Suffix to a Patch's key in ACTIVE: the pieces of the running call.
PARTS = "_parts"


@dataclass(eq=False)
class Parts:
    """The pieces in which the modules that own a state run in one call.

    Attributes:
        rows: of the batch, B.
        length: tokens of a row, L.
        pieces: rows and tokens of each piece. Pieces of the same rows follow each other.
        waiting: outputs of the pieces that have run, by module, with the caches.
        busy: whether a piece is running. The hooks then do nothing.
    """

    rows: int
    length: int
    pieces: list[tuple[Tensor, Tensor]]
    waiting: dict[int, tuple[list[Any], Any, Any]] = field(default_factory=dict)
    busy: bool = False


def plan(
    kind: str, kwargs: dict[str, Any], keeping: Keeping, rows: int, length: int
) -> Parts | None:
    """The pieces of a call; None if the modules are right by themselves."""
    if length == 1:
        return None  # it is no pad, and every model goes on from a state by one token
    mask = _padding(kwargs.get("attention_mask"))
    seen = None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"torch.compile: {kind} with a prompt's state does not take an attention_mask "
                "while compiling, whose padding is to be skipped"
            )
        seen = mask[:, -length:].bool()
        if bool(seen.all()):
            seen = None
    if seen is not None and not keeping.pads:
        raise NotImplementedError(
            f"attention_mask: {kind} does not take padding between a prompt's state and the text, "
            "its layers do not skip it; takes rows of one length, or one by one"
        )
    if seen is None and not keeping.stepwise and not torch.is_grad_enabled():
        return None
    device = inputs_of(kwargs).device
    patterns: dict[tuple[bool, ...], list[int]] = {}
    everything = [[True] * length] * rows if seen is None else seen.tolist()
    for row, pattern in enumerate(everything):
        patterns.setdefault(tuple(pattern), []).append(row)
    pieces: list[tuple[Tensor, Tensor]] = []
    for pattern, members in patterns.items():
        at = torch.tensor(members, device=device)
        tokens = torch.tensor([i for i, real in enumerate(pattern) if real], device=device).long()
        chunks = tokens.split(1) if keeping.stepwise else (tokens,)
        pieces += [(at, chunk) for chunk in chunks if len(tokens)]
    return Parts(rows, length, pieces) if pieces else None


def _padding(mask: Any) -> Any:
    """The mask for layers with a state, among finished masks (those of a static cache)."""
    if not isinstance(mask, dict):
        return mask
    found = (_padding(x) for key, x in mask.items() if "attention" not in key or "linear" in key)
    return next((x for x in found if isinstance(x, Tensor) and x.dim() == 2), None)


def split(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, layers: tuple[int, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a module that owns a state: runs all pieces of its call except the last."""
    parts: Parts | None = getattr(ACTIVE, getattr(module, HOOKED).key + PARTS, None)
    if parts is None or parts.busy:
        return None
    cache = next((x for x in (*args, *kwargs.values()) if holds_states(x)), None)
    if cache is None:
        return None
    parts.busy, outputs = True, list[Any]()
    own, before = cache, None
    for number, (rows, tokens) in enumerate(parts.pieces):
        if before is not rows:
            if before is not None:
                _give_back(own, cache, layers, before)
            own, before = _of_rows(cache, layers, rows), rows
        part = partial(_cut, parts=parts, rows=rows, tokens=tokens, cache=cache, own=own)
        part_args = tuple(part(x) for x in args)
        part_kwargs = {k: None if "mask" in k else part(x) for k, x in kwargs.items()}
        if number < len(parts.pieces) - 1:
            outputs.append(module(*part_args, **part_kwargs))
    parts.waiting[id(module)] = outputs, own, cache
    return part_args, part_kwargs


def join(
    module: nn.Module, args: tuple[Any, ...], output: Any, *, layers: tuple[int, ...]
) -> Any | None:
    """Hook after the same module: joins the outputs of all pieces; pads get zeros."""
    parts: Parts | None = getattr(ACTIVE, getattr(module, HOOKED).key + PARTS, None)
    if parts is None or id(module) not in parts.waiting:
        return None
    if len(parts.waiting[id(module)][0]) < len(parts.pieces) - 1:
        return None
    outputs, own, cache = parts.waiting.pop(id(module))
    _give_back(own, cache, layers, parts.pieces[-1][0])
    parts.busy = False
    outputs.append(output)
    if not isinstance(output, tuple):
        return _whole(outputs, parts)
    return tuple(_whole([one[i] for one in outputs], parts) for i in range(len(output)))


def _whole(outputs: Sequence[Any], parts: Parts) -> Tensor | None:
    """[B, L, ...] from the pieces' outputs [b, l, ...]; None for other outputs, such as a state."""
    for (rows, tokens), output in zip(parts.pieces, outputs, strict=True):
        if not isinstance(output, Tensor) or output.shape[:2] != (len(rows), len(tokens)):
            return None
    first = outputs[-1]
    whole = first.new_zeros(parts.rows, parts.length, *first.shape[2:])
    for (rows, tokens), output in zip(parts.pieces, outputs, strict=True):
        whole[rows[:, None], tokens[None]] = output
    return whole


def _cut(x: Any, *, parts: Parts, rows: Tensor, tokens: Tensor, cache: Any, own: Any) -> Any:
    """A piece's share of an argument."""
    if x is cache:
        return own
    if isinstance(x, tuple):
        return tuple(
            _cut(one, parts=parts, rows=rows, tokens=tokens, cache=cache, own=own) for one in x
        )
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != parts.length:
        return x
    if x.shape[0] == parts.rows:
        return x[rows[:, None], tokens[None]]
    return x[:, tokens] if x.shape[0] == 1 else x


def _of_rows(cache: Any, layers: tuple[int, ...], rows: Tensor) -> Any:
    """A shallow copy of a cache, whose states are copies for some of the rows."""
    own = copy.copy(cache)
    if hasattr(cache, "linear_cache"):
        own.linear_cache = list(cache.linear_cache)
        for layer in layers:
            own.linear_cache[layer] = cache.linear_cache[layer][rows]
        return own
    own.layers = list(cache.layers)
    for layer in layers:
        one = own.layers[layer] = copy.copy(cache.layers[layer])
        for kind in KINDS:
            held = getattr(one, f"{kind}_states")
            setattr(
                one, f"{kind}_states", {i: x if x is None else x[rows] for i, x in held.items()}
            )
        if torch.is_grad_enabled():
            one.update_recurrent_state = partial(_keep, one)
    return own


def _keep(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """Replaces a layer's own update, which overwrites the state that a backward pass needs."""
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states


def _give_back(own: Any, cache: Any, layers: tuple[int, ...], rows: Tensor) -> None:
    """Writes the states of some rows back into the whole cache, after a module has run."""
    for layer in layers:
        if hasattr(cache, "linear_cache"):
            whole = cache.linear_cache[layer].clone()
            whole[rows] = own.linear_cache[layer]
            cache.linear_cache[layer] = whole
            continue
        for kind in KINDS:
            held = getattr(cache.layers[layer], f"{kind}_states")
            for i, x in getattr(own.layers[layer], f"{kind}_states").items():
                if x is not None:
                    held[i][rows] = x
