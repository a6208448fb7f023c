"""Prompts on models whose layers keep a state of the text besides keys and values.

Convolutions and recurrences of hybrid models leave their state in the cache. The prefix of a prompt
contains that state for one row. When a call with this prefix starts a cache, the cache gets a copy
of the state for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.layer.packing import inputs_of, starts_anew
from fastprefix.hf.patch.patch import Patch, patch_of
from fastprefix.hf.patch.threads import ACTIVE
from fastprefix.hf.states.caches import Keeping, fill_states, new_cache, states_in
from fastprefix.hf.states.keeping import keeping_of, refuse
from fastprefix.hf.states.pieces import PARTS, plan
from fastprefix.hf.versions import cache_name, cache_of, length_of
from fastprefix.kv import LayerState, PackedPrefixKV, PrefixKV


def check_states(model: PreTrainedModel, kv: PrefixKV | PackedPrefixKV) -> None:
    """Refuses prompts whose states do not fit the model, or that lack states that it needs.

    Raises:
        NotImplementedError: the model cannot start from a state.
        ValueError: the states are another model's, or missing.
    """
    patch = patch_of(model)
    prompts = _prompts(kv)
    if all(states is None for states in prompts):
        if kv.in_window and patch.stateful:
            raise NotImplementedError(
                f"kv: {type(model).__name__} does not take a prompt's keys and values alone for "
                "its text, its layers keep a state besides, which this prefix does not hold; "
                "PrefixKV.prefill(model, ids) makes one that does, where the model can start from "
                "it (a learned prefix is no text, and works)"
            )
        return
    keeping = keeping_of(model)
    refuse(model, keeping)
    windows = kv.windowed if isinstance(kv, PackedPrefixKV) else (kv.in_window,)
    for states, windowed in zip(prompts, windows, strict=True):
        if states is None and windowed:
            raise ValueError("kv: got prompts with the layers' states and without, takes all with")
        if states is None:
            continue
        got = {(one.layer, name): x.shape for one in states for name, x in one.tensors.items()}
        want = {place: shape for place, (shape, _) in keeping.forms.items()}
        if got != want:
            raise ValueError(f"kv: got states {got}, takes {want} for this {type(model).__name__}")


def start_from_prompt(
    module: nn.Module,
    active: ActivePrefix,
    kwargs: dict[str, Any],
    patch: Patch,
    names: tuple[str, ...],
) -> None:
    """Puts the states of a call's prompts into its cache if that is still empty.

    Args:
        module: the model, or the part of it that is called.
        active: the prefix of the call, whose text is placed already.
        kwargs: of the call; gets a cache where it has none.
        patch: of the patched model.
        names: parameters of the module's forward.

    Raises:
        NotImplementedError: the call has no cache and wants none, packs sequences, or has padding
            that cannot be skipped.
        ValueError: the cache has no place for states, or contains a text that began without them.
    """
    assert active.kv is not None
    prompts = _prompts(active.kv)
    if all(states is None for states in prompts):
        return
    keeping = patch.keeping
    assert keeping is not None  # since check_states
    kind, config = type(module).__name__, module.config
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(config.get_text_config(), "use_cache", True)  # type: ignore[union-attr, operator]
    cache, argument = cache_of(kwargs), cache_name(names)
    if active.cu_seqlens is not None or starts_anew(kwargs):
        raise NotImplementedError(
            f"{kind}: packed sequences do not go with a prompt whose state starts a cache; takes "
            "them padded, in rows"
        )
    if argument is None or (not use_cache and (cache is None or kwargs.get("use_cache") is False)):
        raise NotImplementedError(
            f"use_cache: got {use_cache}, takes True for {kind} with a prompt: its layers start "
            "from the prompt's state in the cache"
        )
    if module.training and any(
        getattr(part, "gradient_checkpointing", False) for part in module.modules()
    ):
        raise NotImplementedError(
            "gradient checkpointing: takes the cache away, in which a prompt's state travels"
        )
    if module.training and torch.is_grad_enabled() and keeping.stepwise:
        raise NotImplementedError(
            f"{kind}: has no gradient behind a prompt's state, from which its layers start for "
            "single tokens only, and overwrite it; takes eval() or no_grad()"
        )
    inputs = inputs_of(kwargs)
    rows, length = inputs.shape[:2]
    if cache is None:
        cache = kwargs[argument] = new_cache(module, keeping)
        kwargs["use_cache"] = True
    if not states_in(cache):
        if isinstance(length_of(cache), int) and length_of(cache) > 0:
            raise ValueError(
                f"{argument}: got one that holds a text but no states for {kind}, takes an empty "
                "one, or one that began under the same prompt"
            )
        states = _states_of_rows(prompts, active.prefix_index, rows, keeping)
        fill_states(cache, states, argument)
    setattr(ACTIVE, patch.key + PARTS, plan(kind, kwargs, keeping, rows, length))


def forget_pieces(patch: Patch) -> None:
    """Forgets the pieces of a call that has ended or failed."""
    if getattr(ACTIVE, patch.key + PARTS, None) is not None:
        setattr(ACTIVE, patch.key + PARTS, None)


def _prompts(kv: PrefixKV | PackedPrefixKV) -> tuple[tuple[LayerState, ...] | None, ...]:
    return kv.states if isinstance(kv, PackedPrefixKV) else (kv.states,)


def _states_of_rows(
    prompts: Sequence[tuple[LayerState, ...] | None],
    index: Tensor | None,
    rows: int,
    keeping: Keeping,
) -> dict[int, dict[str, Tensor]]:
    """The states of each row, [B, ...]; zeros for rows without a prompt, as models start."""
    found: dict[int, dict[str, Tensor]] = {}
    given = [
        {(one.layer, name): x for one in states or () for name, x in one.tensors.items()}
        for states in prompts
    ]
    for (layer, name), (_, dtype) in keeping.forms.items():
        some = next(one[layer, name] for one in given if one)
        columns = [one.get((layer, name), torch.zeros_like(some)).to(dtype) for one in given]
        if index is None:
            whole = columns[0].expand(rows, *some.shape).clone()
        else:  # index -1 takes the last one, zeros
            whole = torch.stack([*columns, torch.zeros_like(columns[0])])[index.to(some.device)]
        found.setdefault(layer, {})[name] = whole
    return found
