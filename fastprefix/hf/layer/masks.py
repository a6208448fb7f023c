"""Attention masks of the "fastprefix" implementation. Standard masks stay compact.

What a model's layers receive as ``attention_mask``, and what
:mod:`fastprefix.hf.layer.attention` reads:

- None: no padding. The call is causal if the module's mask was causal when the model was patched
  (see :data:`MADE`); if the module had no mask then, ``module.is_causal`` decides.
- [B, Lk] bool, True = real token: causal, aligned to the end, with padding. ``module.is_causal`` is
  ignored.
- [B, 1, 1, Lk] bool: not causal, with padding.
- [B, 1, 1, n] int32 or int64: causal over the keys in use of a buffer, or in a sliding window; see
  :mod:`fastprefix.hf.layer.buffered`.
- anything else of four dimensions: an explicit mask [B, 1 or Hq, Lq, Lk]. Models that cut their
  masks to the last queries get their standard masks in this form too.

The prefix is part of none of them: every query sees all of it.

All this holds for patched models. A model may also have been given the implementation's name
without being patched. Then we know neither whether its modules tell the truth about causality nor
which of them use this attention, so it gets the masks that "eager" gets. Every model can use those.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from fastprefix.attention.selection import has_feature
from fastprefix.hf.layer.buffered import pack

# For each probe that runs: every mask that was made, and whether it is causal. Meanwhile no mask is
# left out, so that we see which kind each layer receives. ``module.is_causal`` cannot be trusted if
# the model's own attention looks at nothing but the mask (BigBird-Pegasus).
MADE: list[list[tuple[Tensor, bool]]] = []
# Masks of these kinds are noted, and whether they are causal.
_KINDS = {causal_mask_function: True, bidirectional_mask_function: False}
# For each probe that runs: True for each causal mask that the model asked for in full, for a use of
# its own. In other calls a static cache may be the reason for such a request.
OWN_USE: list[list[bool]] = []
# The configs of patched models, by id since configs with the same contents are equal, and whether
# their models use causal masks themselves.
_PATCHED: dict[int, bool] = {}
# What sliding_window_causal_mask_function makes, to be recognised by its code.
_SLIDING = sliding_window_causal_mask_function(1)
_OVERLAY = sliding_window_overlay(1)


def add_patched(config: Any, own_use: bool = True) -> None:
    """Has the models of a config get compact masks from now on.

    Args:
        config: of a patched model.
        own_use: whether the model uses causal masks itself, or may do so.
    """
    if id(config) not in _PATCHED:
        weakref.finalize(config, _PATCHED.pop, id(config), None).atexit = False
    _PATCHED[id(config)] = own_use


def remove_patched(config: Any) -> None:
    """Has the models of a config get explicit masks from now on."""
    _PATCHED.pop(id(config), None)


def _is_patched(config_id: int) -> bool:
    """Whether a config is a patched model's."""
    return config_id in _PATCHED


def _has_own_use(config_id: int) -> bool:
    """Whether the models of a config use causal masks themselves, or may do so."""
    return _PATCHED.get(config_id, True)


# This is what torch.compiler.assume_constant_result sets; done by hand to avoid an import of the
# compiler. Dynamo calls the function while it traces and keeps the result. Otherwise every graph
# would depend on the set of all patched models, and patching any model would recompile it. The
# result stays right because patching also changes the model's modules, which the graph guards.
for _function in (_is_patched, _has_own_use):
    vars(_function)["_dynamo_marked_constant"] = True


def made_causal(mask: Tensor | None) -> bool | None:
    """Whether a mask, or a part of one, was noted as causal; None if it was not noted."""
    if mask is None:
        return None
    for made in MADE:
        for other, causal in made:
            if mask is other or (
                not mask.is_meta
                and mask.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            ):
                return causal
    return None


def prefix_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function for transformers' AttentionMaskInterface; arguments are the interface's."""
    request: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
    }
    if OWN_USE and not allow_is_causal_skip and _is_standard(mask_function):
        for asked in OWN_USE:
            asked.append(True)
    if MADE and mask_function in _KINDS:
        return _noted(request)
    config = kwargs.get("config")
    if config is not None and not _is_patched(id(config)):
        return eager_mask(**request, allow_is_bidirectional_skip=False)
    whole = kv_offset == 0 and (attention_mask is None or attention_mask.shape[-1] == kv_length)
    known_ends = isinstance(q_offset, int) and q_offset + q_length == kv_length
    if mask_function is causal_mask_function and allow_is_causal_skip and whole and known_ends:
        if _all_real(attention_mask):
            return None
        if not _cut_by_query(config):
            return attention_mask
    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip and whole:
        if _all_real(attention_mask) or attention_mask is None:
            return None
        return attention_mask[:, None, None, :]
    if _may_be_packed(request, allow_is_causal_skip):
        return _packed(request)
    return sdpa_mask(
        **request,
        local_size=local_size,
        # where sdpa leaves a causal mask out, it aligns queries to the first key; we to the last
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
    )


def _noted(request: dict[str, Any]) -> Tensor:
    """A mask that is made in full while a model is probed, and noted with its kind."""
    made = sdpa_mask(**request, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert made is not None
    for masks in MADE:
        masks.append((made, _KINDS[request["mask_function"]]))
    return made


def _may_be_packed(request: dict[str, Any], allow_is_causal_skip: bool) -> bool:
    """Whether a mask is causal, with or without a window, and only the layers will read it.

    For a single query and a static cache transformers never allows that a mask is left out. In that
    case the probe has seen whether the model uses its masks itself.
    """
    config, device = request.get("config"), torch.device(request.get("device", "cpu"))
    if not has_feature("auto", device.type, "key_lengths"):
        return False
    if config is None or _cut_by_query(config) or _has_own_use(id(config)):
        return False
    if not (allow_is_causal_skip or request["q_length"] == 1):
        return False
    first_query = request["q_offset"] - request["kv_offset"]
    if not isinstance(first_query, Tensor):
        in_use = first_query + request["q_length"]
        if not request["q_length"] <= in_use <= request["kv_length"]:
            return False
    window = _window(request["mask_function"])
    if window is None:
        return request["mask_function"] is causal_mask_function
    return window == getattr(config, "sliding_window", None)


def _is_standard(mask_function: Callable) -> bool:
    """Whether a mask function of transformers is causal and hides nothing else but by a window."""
    return mask_function is causal_mask_function or _window(mask_function) is not None


def _window(mask_function: Callable) -> int | None:
    """The window of a mask function of transformers that is causal and has one; None for others."""
    if torch.compiler.is_compiling():  # which cannot trace the question
        return None
    if not _same_code(mask_function, _SLIDING):
        return None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if len(parts) != 2 or not _same_code(parts[0], _OVERLAY):
        return None
    window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
    return window if parts[1] is causal_mask_function else None


def _same_code(function: Callable, other: Callable) -> bool:
    """Whether two functions were made by the same lines, apart from what they close over."""
    return getattr(function, "__code__", None) is getattr(other, "__code__", function)


def _packed(request: dict[str, Any]) -> Tensor:
    """The mask of a request in the form of :mod:`fastprefix.hf.layer.buffered`."""
    B, Lq, Lk = (request[name] for name in ("batch_size", "q_length", "kv_length"))
    start, device = request["kv_offset"], request.get("device", "cpu")
    in_use = request["q_offset"] + Lq - start
    windowed = request["mask_function"] is not causal_mask_function
    padding: Tensor | None = request["attention_mask"]
    ends_known = isinstance(in_use, int) and in_use == Lk
    if padding is not None and _all_real_so_far(padding, start, in_use):
        padding = None
    padding = prepare_padding_mask(padding, Lk, start)
    if padding is not None:
        padding = padding[:, start : start + Lk].bool()
    if padding is None and ends_known:
        # the columns show a layer that its keys are those of the mask
        padding = torch.ones(B, Lk, dtype=torch.bool, device=device)
    if isinstance(in_use, Tensor):
        lengths = in_use.to(device).expand(B)
    else:
        lengths = torch.full((B,), in_use, dtype=torch.int32, device=device)
    return pack(lengths, padding, windowed)


def _all_real_so_far(attention_mask: Tensor, start: int, in_use: int | Tensor) -> bool:
    """Whether no key in use is padding; False where the answer would cost a synchronisation.

    There the kernels find out, once for all layers.
    """
    if torch.compiler.is_compiling() or attention_mask.device.type != "cpu":
        return False
    end = start + int(in_use)
    return attention_mask.shape[1] >= end and bool(attention_mask[:, start:end].all())


def _cut_by_query(config: Any) -> bool:
    """Whether a model cuts its masks to some queries (Gemma4, whose last layers share keys)."""
    return bool(getattr(config, "num_kv_shared_layers", 0))


def _all_real(attention_mask: Tensor | None) -> bool:
    """Whether nothing is padded; False where the answer would cost a synchronisation."""
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling() or attention_mask.device.type != "cpu":
        return False
    return bool(attention_mask.all())
