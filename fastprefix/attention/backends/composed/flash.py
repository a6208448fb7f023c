"""PyTorch's flash kernel for CPUs, and the layouts and masks that all kernels take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.seen import Seen

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

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
    """The kernel's gradients of query, key and value, in float32 for half-precision inputs.

    On a processor with AMX the kernel in half precision takes up to 9 times as long for short
    sequences, and 0.7 to 1.8 times for long ones (PyTorch 2.13). With AVX2 alone long ones, too,
    take several times as long.
    """
    mask = seen.mask
    if query.dtype in (torch.bfloat16, torch.float16):
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


def merge(
    out: Tensor, lse: Tensor, prefix_out: Tensor, prefix_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The result of two parts from each one's. The tensors of the first may be overwritten.

    The prefix weighs exp(prefix_lse) / (exp(prefix_lse) + exp(lse)), in the accumulation dtype.
    """
    weight = torch.sub(prefix_lse, lse).sigmoid_()[..., None]
    wide = out.to(weight.dtype).lerp_(prefix_out.to(weight.dtype), weight)
    return wide.to(out.dtype), torch.logaddexp(lse, prefix_lse)


def hiding_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a mask that only hides: the query's, if it can hold the floor."""
    return torch.float32 if dtype is torch.float16 else dtype


def hiding(key_padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Lk] bool, True = real token, as what is added to scores: [B, 1, 1, Lk]."""
    dtype = hiding_dtype(dtype)
    bias = torch.zeros(key_padding_mask.shape, dtype=dtype, device=key_padding_mask.device)
    return bias.masked_fill_(~key_padding_mask, FLOOR)[:, None, None, :]


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
