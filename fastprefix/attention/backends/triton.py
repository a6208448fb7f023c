"""The fused Triton kernels behind the operator. Triton is imported when a kernel runs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastprefix.options import Options


@functools.cache
def _kernels() -> Any:
    """The package of the kernels; an import statement in every call costs as much as a check."""
    from fastprefix import kernels

    return kernels


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`."""
    inputs = (query, key, value, prefix_key, prefix_value)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        return _kernels().launch_forward(*inputs, options)


def tables(tensors: tuple[Tensor, ...], options: Options) -> Tensor:
    """The option `tables` of a call with several prefixes or packed sequences, and of its like.

    Args:
        tensors: query, key, value, prefix_key and prefix_value.
        options: of the call.
    """
    with torch.cuda.device_of(tensors[0]):
        made: Tensor = _kernels().launch_tables(*tensors, options)
        return made


def spans(key_padding_mask: Tensor) -> Tensor:
    """The option `spans` of calls with this padding mask [B, Lk] bool."""
    with torch.cuda.device_of(key_padding_mask):
        made: Tensor = _kernels().launch_spans(key_padding_mask)
        return made


# Device types whose calls get plans.
PLANNED_ON = {"cuda"}


def known(tensors: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Tensor] | None:
    """What :func:`forward` returns, for a call like one that ran before; None for others."""
    query = tensors[0]
    if query.device.type not in PLANNED_ON:
        return None
    with torch.cuda.device_of(query):
        found: tuple[Tensor, Tensor] | None = _kernels().known_forward(tensors, options)
        return found


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
    inputs = (grad_out, query, key, value, prefix_key, prefix_value, out, lse)
    with torch.cuda.device_of(query):
        return _kernels().launch_backward(*inputs, options, needs)
