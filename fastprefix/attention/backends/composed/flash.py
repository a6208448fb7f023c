"""PyTorch's flash kernel for CPUs, and the layouts and masks that all kernels take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.seen import Seen

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# PyTorch's half-precision backward takes up to nine times as long as its float32 one where queries
# or keys are fewer than this (2.13, a processor with AMX), and 0.7 to 1.8 times as long beyond.
_SHORT = 256

# Masked scores get this instead of -inf: the kernel reports lse = 0 for a row whose scores are
# all -inf, which a merge would take for a real weight. A finite floor drops out of every merge by
# underflow, and a row whose lse is still near the floor has seen nothing.
FLOOR = -1e30


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Seen
) -> tuple[Tensor, Tensor]:
    """The kernel's output and log-sum-exp."""
    out, lse = _forward_kernel(
        query, key, value, 0.0, seen.is_causal, attn_mask=seen.mask, scale=scale
    )
    return out, lse


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    seen: Seen,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradients of query, key and value; float32 where it is faster in float32."""
    mask = seen.mask
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and min(query.shape[-2], key.shape[-2]) < _SHORT:
        grad_out, query, key, value, out = (x.float() for x in (grad_out, query, key, value, out))
        mask = None if mask is None else mask.float()
    dq, dk, dv = _backward_kernel(
        grad_out, query, key, value, out, lse, 0.0, seen.is_causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def fold_rows(x: Tensor, Hkv: int) -> Tensor:
    """[B, Hq, Lq, ...] -> [1, Hkv, B·g·Lq, ...]: every query of a KV head, of the whole batch."""
    B, Hq, Lq, *tail = x.shape
    rows = x.reshape(B, Hkv, (Hq // Hkv) * Lq, *tail).transpose(0, 1)
    return rows.reshape(1, Hkv, -1, *tail)


def unfold_rows(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`fold_rows`."""
    B, Hq, Lq, *tail = shape
    Hkv = x.shape[1]
    x = x.reshape(Hkv, B, (Hq // Hkv) * Lq, *tail).transpose(0, 1)
    return x.reshape(B, Hq, Lq, *tail)


def hiding_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a mask that only hides: the query's, if it can hold the floor."""
    return torch.float32 if dtype is torch.float16 else dtype


def additive(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool (True = attend) or additive mask as a finite additive one of four dimensions."""
    dtype = torch.promote_types(attn_mask.dtype, hiding_dtype(dtype))
    if attn_mask.dtype is torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device)
        bias = bias.masked_fill_(~attn_mask, FLOOR)
    else:
        bias = attn_mask.to(dtype).clamp(min=FLOOR)
    return bias[(None,) * (4 - bias.dim())]


def unsee(lse: Tensor) -> Tensor:
    """The kernel's log-sum-exp, -inf for rows all of whose scores are masked."""
    return lse.masked_fill(lse < FLOOR / 2, -math.inf)
