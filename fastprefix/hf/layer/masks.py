"""Attention masks of the "fastprefix" implementation. Standard masks stay compact.

What a model's layers receive as ``attention_mask``, and what
:mod:`fastprefix.hf.layer.attention` reads:

- None: no padding. The call is causal if the module's mask was causal when the model was patched
  (see :data:`MADE`); if the module had no mask then, ``module.is_causal`` decides.
- [B, Lk] bool, True = real token: causal, aligned to the end, with padding. ``module.is_causal`` is
  ignored.
- [B, 1, 1, Lk] bool: not causal, with padding.
- anything else of four dimensions: an explicit mask [B, 1 or Hq, Lq, Lk]. Models that cut their
  masks to the last queries get their standard masks in this form too.

The prefix is part of none of them: every query sees all of it.

All this holds for patched models. A model may also have been given the implementation's name
without being patched. Then we know neither whether its modules tell the truth about causality nor
which of them use this attention, so it gets the masks that "eager" gets. Every model can use those.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

# For each probe that runs: every mask that was made, and whether it is causal. Meanwhile no mask is
# left out, so that we see which kind each layer receives. ``module.is_causal`` cannot be trusted if
# the model's own attention looks at nothing but the mask (BigBird-Pegasus).
MADE: list[list[tuple[Tensor, bool]]] = []
# Masks of these kinds are noted, and whether they are causal.
_KINDS = {causal_mask_function: True, bidirectional_mask_function: False}
# Ids of the configs of patched models. Ids, since configs with the same contents are equal.
_PATCHED: set[int] = set()


def add_patched(config: Any) -> None:
    """Has the models of a config get compact masks from now on."""
    if id(config) not in _PATCHED:
        _PATCHED.add(id(config))
        weakref.finalize(config, _PATCHED.discard, id(config)).atexit = False


def remove_patched(config: Any) -> None:
    """Has the models of a config get explicit masks from now on."""
    _PATCHED.discard(id(config))


def _is_patched(config_id: int) -> bool:
    """Whether a config is a patched model's."""
    return config_id in _PATCHED


# This is what torch.compiler.assume_constant_result sets; done by hand to avoid an import of the
# compiler. Dynamo calls the function while it traces and keeps the result. Otherwise every graph
# would depend on the set of all patched models, and patching any model would recompile it. The
# result stays right because patching also changes the model's modules, which the graph guards.
vars(_is_patched)["_dynamo_marked_constant"] = True


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
