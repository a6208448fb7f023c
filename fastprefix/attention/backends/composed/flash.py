"""PyTorch's flash kernel for CPUs: its two calls, and the layout that they take."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# PyTorch's half-precision backward takes up to nine times as long as its float32 one where queries
# or keys are fewer than this (2.13, a processor with AMX), and 0.7 to 1.8 times as long beyond.
_SHORT = 256

# Masked scores get this instead of -inf: the kernel reports lse = 0 for a row whose scores are
# all -inf, which a merge would take for a real weight. A finite floor drops out of every merge by
# underflow, and a row whose lse is still near the floor has seen nothing.
FLOOR = -1e30


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradients of query, key and value; float32 where it is faster in float32."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and min(query.shape[-2], key.shape[-2]) < _SHORT:
        grad_out, query, key, value, out = (x.float() for x in (grad_out, query, key, value, out))
        attn_mask = None if attn_mask is None else attn_mask.float()
    return _backward_kernel(
        grad_out, query, key, value, out, lse, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )


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


def additive(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool (True = attend) or additive mask as a finite additive one of four dimensions."""
    wide = torch.promote_types(dtype, torch.float32)
    if attn_mask.dtype is torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=wide, device=attn_mask.device)
        bias = bias.masked_fill_(~attn_mask, FLOOR)
    else:
        bias = attn_mask.to(wide).clamp(min=FLOOR)
    return bias[(None,) * (4 - bias.dim())]


def unsee(lse: Tensor) -> Tensor:
    """The kernel's log-sum-exp, -inf for rows all of whose scores are masked."""
    return lse.masked_fill(lse < FLOOR / 2, -math.inf)


def equal_head_sizes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pads the last dimension with zeros to the largest: exact, and what the kernel asks for.

    It also takes that dimension for contiguous without looking.
    """
    width = max(x.shape[-1] for x in tensors)
    padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in padded)
