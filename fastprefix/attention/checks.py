"""Argument checks of the operator: each error names the argument, what it got, what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_unbuilt(arguments: dict[str, Any]) -> None:
    """Raises NotImplementedError for an argument of the contract that no backend can do yet."""
    for name, value in arguments.items():
        if value is not None and value is not False and value != 0.0:
            raise NotImplementedError(
                f"{name}: not supported yet by any backend; leave it at its default"
            )


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
) -> None:
    """Shapes, dtypes and devices of the five differentiable tensors."""
    for name, tensor, shape in (
        ("query", query, "[B, Hq, Lq, D]"),
        ("key", key, "[B, Hkv, Lk, D]"),
        ("value", value, "[B, Hkv, Lk, Dv]"),
        ("prefix_key", prefix_key, "[Hkv, P, D]"),
        ("prefix_value", prefix_value, "[Hkv, P, Dv]"),
    ):
        _is_tensor(name, tensor)
        if tensor.dim() != shape.count(",") + 1:
            raise ValueError(f"{name}: got shape {_shape(tensor)}, takes {shape}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, takes a floating-point dtype")
        for what in ("dtype", "device"):
            if getattr(tensor, what) != getattr(query, what):
                raise ValueError(
                    f"{name}: got {what} {getattr(tensor, what)}, takes the query's "
                    f"{getattr(query, what)}"
                )
    B, Hq, _, D = query.shape
    _, Hkv, Lk, Dv = value.shape
    P = prefix_value.shape[1]
    for name, tensor, expected, meaning in (
        ("key", key, (B, Hkv, Lk, D), "B and D of query, Hkv and Lk of value"),
        ("value", value, (B, Hkv, Lk, Dv), "B of query"),
        ("prefix_key", prefix_key, (Hkv, P, D), "Hkv of value, P of prefix_value, D of query"),
        ("prefix_value", prefix_value, (Hkv, P, Dv), "Hkv and Dv of value"),
    ):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name}: got shape {_shape(tensor)}, takes {list(expected)} ({meaning})"
            )
    if D == 0 or Dv == 0:
        raise ValueError(f"query, value: got head sizes {D} and {Dv}, takes at least 1")
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"query: got {Hq} heads, takes a multiple of the {Hkv} key/value heads")


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


def _is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")


def _same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, takes the query's {query.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
