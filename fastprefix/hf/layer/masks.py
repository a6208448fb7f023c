"""Attention masks for the "fastprefix" implementation, kept compact where the mask is standard.

What a model's layers receive as ``attention_mask``, and what
:mod:`fastprefix.hf.layer.attention` reads:

- None: no padding; causal or not as the module's mask was when the model was patched (see
  :data:`MADE`), and as the module says where it had none.
- [B, Lk] bool: causal, whatever the module says, aligned to the end, with padding (True = real
  token).
- [B, 1, 1, Lk] bool: not causal, with padding.
- anything else of four dimensions: an explicit mask [B, 1 or Hq, Lq, Lk], which the standard ones
  are as well for models that cut their masks to the last queries.

The prefix appears in none of them: every query sees all of it.

All this holds for models that were patched. Of one that was only given the implementation's name
nothing is known, neither whether its modules say the truth nor which of them use this attention. It
gets the masks that "eager" gets, of which every model knows what to do with them.
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

# While models are probed: every mask that was made, and whether it is causal. None is left out
# then, so that each layer is seen to be handed one or the other. What a module says of itself need
# not be true where a model's own attention looks at the mask alone (BigBird-Pegasus).
MADE: list[list[tuple[Tensor, bool]]] = []
# Masks of these kinds are noted, and whether they are causal.
_KINDS = {causal_mask_function: True, bidirectional_mask_function: False}
# The configs of patched models, by id: they compare by what is in them.
_PATCHED: set[int] = set()


def add_patched(config: Any) -> None:
    """From now on the models of a config get compact masks."""
    if id(config) not in _PATCHED:
        _PATCHED.add(id(config))
        weakref.finalize(config, _PATCHED.discard, id(config)).atexit = False


def remove_patched(config: Any) -> None:
    """From now on they get explicit masks."""
    _PATCHED.discard(id(config))


def _is_patched(config_id: int) -> bool:
    """Whether a config is a patched model's."""
    return config_id in _PATCHED


# What torch.compiler.assume_constant_result sets, without an import of the compiler: looked up when
# a graph is traced. Else every graph would depend on all models that are patched, and be traced
# anew with each. Patching itself changes modules, on which a graph depends.
vars(_is_patched)["_dynamo_marked_constant"] = True


def made_causal(mask: Tensor | None) -> bool | None:
    """Whether a mask, or a part of one, was made to be causal; None for one not known."""
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
        # sdpa's rules for leaving the mask out align to the start; ours to the end
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
    """Whether nothing is padded, asked only where the answer costs no synchronisation."""
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling() or attention_mask.device.type != "cpu":
        return False
    return bool(attention_mask.all())
