"""The operator as PyTorch sees it: registered ops with fake kernels and a gradient.

Output and gradients of [B, H, L, D] tensors are laid out in memory as [B, L, H, D], the order in
which a model's projections produce and consume them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.attention.backends import composed, triton


@torch.library.custom_op("fastprefix::prefix_attention", mutates_args=())
def prefix_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the named fused backend; arguments are already checked."""
    inputs = (query, key, value, prefix_key, prefix_value, key_padding_mask)
    if backend == "triton":
        out, lse = triton.forward(*inputs, is_causal=is_causal, scale=scale)
    else:
        out, lse = composed.forward(*inputs, attn_mask, is_causal=is_causal, scale=scale)
    return _as_blhd(out), lse.contiguous()


@prefix_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, Hq, Lq, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = _new_blhd(query, (B, Hq, Lq, value.shape[-1]))
    return out, query.new_empty(B, Hq, Lq, dtype=lse_dtype)


@torch.library.custom_op("fastprefix::prefix_attention_backward", mutates_args=())
def prefix_attention_backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients; an empty tensor for each that ``needs`` leaves out."""
    inputs = (grad_out, query, key, value, prefix_key, prefix_value, key_padding_mask)
    wanted = (needs[0], needs[1], needs[2], needs[3], needs[4])
    if backend == "triton":
        grads = triton.backward(*inputs, out, lse, is_causal=is_causal, scale=scale, needs=wanted)
    else:
        grads = composed.backward(
            *inputs, attn_mask, out, lse, is_causal=is_causal, scale=scale, needs=wanted
        )
    dq, dk, dv, dpk, dpv = (query.new_empty(0) if grad is None else grad for grad in grads)
    return (
        _as_blhd(dq) if needs[0] else dq,
        _as_blhd(dk) if needs[1] else dk,
        _as_blhd(dv) if needs[2] else dv,
        dpk.contiguous(),
        dpv.contiguous(),
    )


@prefix_attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        _new_blhd(query, query.shape) if needs[0] else query.new_empty(0),
        _new_blhd(key, key.shape) if needs[1] else query.new_empty(0),
        _new_blhd(value, value.shape) if needs[2] else query.new_empty(0),
        prefix_key.new_empty(prefix_key.shape) if needs[3] else query.new_empty(0),
        prefix_value.new_empty(prefix_value.shape) if needs[4] else query.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, is_causal, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.is_causal, ctx.scale, ctx.backend = is_causal, scale, backend


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    # grad_lse is zeros: `prefix_attention` hands out a detached lse
    *inputs, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = prefix_attention_backward_op(
        grad_out, *inputs, out, lse, ctx.is_causal, ctx.scale, ctx.backend, needs
    )
    kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*kept, None, None, None, None, None)


prefix_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _as_blhd(x: Tensor) -> Tensor:
    """[B, H, L, D] laid out in memory as [B, L, H, D]; copies only if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _new_blhd(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    B, H, L, D = shape
    return like.new_empty(B, L, H, D).transpose(1, 2)
