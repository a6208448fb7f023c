"""Argument checks of the operator: each error names the argument, what it got, what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_unbuilt(*, dropout_p: float, prefix_in_window: bool, **others: Any) -> None:
    """Raises NotImplementedError for an argument of the contract that no backend can do yet."""
    given = [name for name, value in others.items() if value is not None]
    if dropout_p != 0.0:
        given.append("dropout_p")
    if prefix_in_window:
        given.append("prefix_in_window")
    if given:
        raise NotImplementedError(
            f"{', '.join(given)}: not supported yet by any backend; leave at the default"
        )


def check_sequence(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Types, ranks, shapes, dtypes and devices of query, key and value."""
    _check_operand("query", query, "[B, Hq, Lq, D]", query)
    _check_operand("key", key, "[B, Hkv, Lk, D]", query)
    _check_operand("value", value, "[B, Hkv, Lk, Dv]", query)
    B, Hq, _, D = query.shape
    _, Hkv, Lk, Dv = value.shape
    _check_shape("key", key, (B, Hkv, Lk, D), "B and D of query, Hkv and Lk of value")
    _check_shape("value", value, (B, Hkv, Lk, Dv), "B of query")
    if D == 0 or Dv == 0:
        raise ValueError(f"query, value: got head sizes {D} and {Dv}, takes at least 1")
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"query: got {Hq} heads, takes a multiple of the {Hkv} key/value heads")


def check_prefix(query: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> None:
    """Types, ranks, shapes, dtypes and devices of the prefix."""
    _check_operand("prefix_key", prefix_key, "[Hkv, P, D]", query)
    _check_operand("prefix_value", prefix_value, "[Hkv, P, Dv]", query)
    Hkv, Dv = value.shape[1], value.shape[3]
    P = prefix_value.shape[1]
    _check_shape("prefix_value", prefix_value, (Hkv, P, Dv), "Hkv and Dv of value")
    expected = (Hkv, P, query.shape[3])
    _check_shape("prefix_key", prefix_key, expected, "Hkv of value, P of prefix_value, D of query")


def check_key_padding_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """key_padding_mask: bool [B, Lk] on the query's device."""
    if mask is None:
        return
    _is_tensor("key_padding_mask", mask)
    expected = (query.shape[0], key.shape[2])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"key_padding_mask: got shape {_shape(mask)}, takes [B, Lk] = {list(expected)} "
            "(the prefix is not part of it)"
        )
    if mask.dtype is not torch.bool:
        raise TypeError(
            f"key_padding_mask: got {mask.dtype}, takes torch.bool with True for real tokens"
        )
    _same_device("key_padding_mask", mask, query)


def check_attn_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """attn_mask: bool or the query's dtype (or float32), broadcastable to [B, Hq, Lq, Lk]."""
    if mask is None:
        return
    _is_tensor("attn_mask", mask)
    full = (*query.shape[:3], key.shape[2])
    shape = tuple(mask.shape)
    padded = (1,) * (4 - len(shape)) + shape
    if len(shape) > 4 or any(got not in (1, want) for got, want in zip(padded, full, strict=True)):
        raise ValueError(
            f"attn_mask: got shape {_shape(mask)}, takes one that broadcasts to "
            f"[B, Hq, Lq, Lk] = {list(full)} (the prefix is not part of it)"
        )
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask: got {mask.dtype}, takes torch.bool (True = attend), torch.float32 or "
            f"the query's {query.dtype}"
        )
    if mask.requires_grad:
        raise ValueError("attn_mask: got a tensor that requires a gradient; none is computed")
    _same_device("attn_mask", mask, query)


def check_causal(is_causal: bool, query: Tensor, key: Tensor) -> None:
    """Causal attention is aligned to the end, so there must be a key for each query."""
    if is_causal and key.shape[2] < query.shape[2]:
        raise ValueError(
            f"is_causal: got Lq = {query.shape[2]} and Lk = {key.shape[2]}, takes Lk >= Lq"
        )


def _check_operand(name: str, tensor: Any, shape: str, query: Tensor) -> None:
    _is_tensor(name, tensor)
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: got shape {_shape(tensor)}, takes {shape}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {tensor.dtype}, takes a floating-point dtype")
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, takes the query's {query.dtype}")
    _same_device(name, tensor, query)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {_shape(tensor)}, takes {list(expected)} ({meaning})")


def _is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")


def _same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, takes the query's {query.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
