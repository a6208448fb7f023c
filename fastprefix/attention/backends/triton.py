"""The fused Triton kernels behind the operator. Triton is imported when a kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`."""
    from fastprefix.kernels import prefix_attention_forward

    inputs = (query, key, value, prefix_key, prefix_value)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        return prefix_attention_forward(
            *inputs, is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask
        )


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Same contract as :func:`fastprefix.attention.backends.composed.backward`."""
    from fastprefix.kernels import prefix_attention_backward

    inputs = (grad_out, query, key, value, prefix_key, prefix_value, out, lse)
    with torch.cuda.device_of(query):
        grads = prefix_attention_backward(
            *inputs, is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask,
            needs=(*needs, False, False),
        )  # fmt: skip
    return grads[:5]
