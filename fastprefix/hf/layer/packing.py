"""Packed sequences: several texts end to end in one row, as DataCollatorWithFlattening makes them.

Each text sees the prefix and itself. The operator gets the offsets of the texts, so that no mask of
L x L is needed. If offsets are not enough to say who sees whom, transformers makes its own mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.hf.versions import CACHE_NAMES, cache_of, length_of

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def unpack(config: Any, kwargs: dict[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """Offsets of a call's packed sequences; fills in position_ids and switches the cache off.

    The offsets come from cu_seq_lens_q, from seq_idx, or, in a call without mask and cache, from
    position_ids that start again from 0.

    Args:
        config: the model's.
        kwargs: of the call; changed in place.
        names: parameters of the model's forward.

    Returns:
        int32 [M + 1]; None if nothing is packed, or if transformers' mask keeps the texts apart.

    Raises:
        ValueError: packed sequences together with a mask, a cache, several rows, or keys of
            other sequences than the queries'.
        NotImplementedError: the model's masks need more than the offsets.
    """
    name = next((name for name in ("cu_seq_lens_q", "seq_idx") if kwargs.get(name) is not None), "")
    positions = kwargs.get("position_ids")
    if not name and not starts_anew(kwargs):
        return None
    if kwargs.get("use_cache"):
        raise ValueError("use_cache: got True for packed sequences, takes False or None")
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    token_types = sorted(key for key in kwargs if "token_type_ids" in key and _given(kwargs, key))
    if "chunked_attention" in layers or (name and (token_types or layers - _PLAIN_LAYERS)):
        why = token_types or sorted(layers - _PLAIN_LAYERS)
        raise NotImplementedError(
            f"{name or 'position_ids'}: packed sequences are not supported with {why}, which "
            "decides who sees whom beside them"
        )
    if "use_cache" in names:
        kwargs["use_cache"] = False  # with a cache transformers' masks keep nothing apart
    if name:
        offsets = _offsets(name, kwargs)
        if positions is None:
            kwargs["position_ids"] = _positions(offsets, inputs_of(kwargs).shape[1])
        return offsets
    if token_types or layers - _PLAIN_LAYERS or positions is None or positions.shape[0] != 1:
        return None
    return _from_starts(positions.diff(dim=-1)[0] != 1)  # as in transformers' own masks


def refuse_packed(module: Any, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for packed sequences in anything but a decoder-only model."""
    for name in ("cu_seq_lens_q", "seq_idx"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}: packed sequences are supported in decoder-only models alone, not in "
                f"{type(module).__name__}"
            )


def no_mask(kwargs: dict[str, Any]) -> Tensor:
    """A mask of four dimensions: a decoder takes it as finished and makes no L x L mask."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs_of(kwargs).device)


def starts_anew(kwargs: dict[str, Any]) -> bool:
    """Whether position_ids go back or stand still; those of a single text never do."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    if _given(kwargs, "attention_mask", *CACHE_NAMES) or torch.compiler.is_compiling():
        return False  # in these cases transformers does not take them for packed either
    return bool((positions.diff(dim=-1) < 1).any())


def _offsets(name: str, kwargs: dict[str, Any]) -> Tensor:
    """The offsets among the arguments of a call, checked against the others."""
    rows, length = inputs_of(kwargs).shape[:2]
    if rows != 1:
        raise ValueError(f"{name}: got a batch of {rows}, takes packed sequences in a single row")
    if _given(kwargs, "attention_mask"):
        raise ValueError(f"{name}, attention_mask: got both, takes one of them")
    if length_of(cache_of(kwargs)) > 0:
        raise ValueError(f"{name}, past_key_values: got both, takes packed sequences without cache")
    given: Tensor = kwargs[name]
    if name == "seq_idx":
        if tuple(given.shape) != (1, length):
            raise ValueError(f"seq_idx: got shape {list(given.shape)}, takes [1, {length}]")
        return _from_starts(given[0].diff() != 0)
    keys: Tensor = kwargs["cu_seq_lens_k"] if _given(kwargs, "cu_seq_lens_k") else given
    if keys is not given and not torch.compiler.is_compiling() and not torch.equal(keys, given):
        raise ValueError("cu_seq_lens_k: takes the same offsets as cu_seq_lens_q")
    return given.to(torch.int32)


def _from_starts(starts: Tensor) -> Tensor:
    """Offsets from [L - 1] bool: whether each token from the second on starts a sequence."""
    firsts = starts.nonzero()[:, 0] + 1
    ends = firsts.new_tensor([0]), firsts.new_tensor([starts.shape[0] + 1])
    return torch.cat([ends[0], firsts, ends[1]]).to(torch.int32)


def _positions(offsets: Tensor, length: int) -> Tensor:
    """Positions [1, L] that start from 0 in each sequence."""
    token = torch.arange(length, device=offsets.device)
    return (token - offsets[torch.searchsorted(offsets, token, right=True) - 1])[None]


def inputs_of(kwargs: dict[str, Any]) -> Tensor:
    """The text of a call: input_ids [B, L] or inputs_embeds [B, L, hidden]."""
    inputs = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if inputs is None else inputs


def _given(kwargs: dict[str, Any], *names: str) -> bool:
    return any(kwargs.get(name) is not None for name in names)
