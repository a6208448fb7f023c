"""The fused Triton kernels behind the operator. Triton is imported when a kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprefix.attention.call import Options
from fastprefix.attention.selection import BACKENDS


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`."""
    from fastprefix.kernels import prefix_attention_forward

    keywords = {"key_padding_mask": None, **options.keywords()}
    with torch.cuda.device_of(query):  # Triton launches on the current device
        return prefix_attention_forward(query, key, value, prefix_key, prefix_value, **keywords)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Same contract as :func:`fastprefix.attention.backends.composed.backward`."""
    from fastprefix.kernels import prefix_attention_backward

    keywords = {"key_padding_mask": None, **options.keywords()}
    inputs = (grad_out, query, key, value, prefix_key, prefix_value)
    # launchers that have none of the table's features return no gradients for them either
    plain = not BACKENDS["triton"].features
    needs = needs[:5] if plain else needs
    with torch.cuda.device_of(query):
        grads = prefix_attention_backward(*inputs, out=out, lse=lse, **keywords, needs=needs)
    return (*grads, None, None) if plain else grads
