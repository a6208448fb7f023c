"""The operator where PyTorch's transforms differentiate it (torch.func, forward mode).

They do not differentiate a registered op: they cannot follow its gradient, and take its
forward-mode derivative for zero. They do differentiate the functions here, which have the same
gradient. What has no formula, forward mode and second derivatives, is refused.

A module of its own, imported when it is needed: it keeps Dynamo out, and so imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.attention import op
from fastprefix.attention.transforms import FORWARD_MODE, refuse


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return op.prefix_attention_op(*args)

    setup_context = staticmethod(op.setup_context)
    backward = staticmethod(torch.compiler.disable(op.backward))  # see forward() below

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _row_by_row(_Forward, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse(ctx.backend, FORWARD_MODE)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return op.prefix_attention_backward_op(*args)

    setup_context = staticmethod(op.keep_backend)
    backward = staticmethod(op.refuse_second)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _row_by_row(_Backward, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse(ctx.backend, FORWARD_MODE)


# Where Dynamo leaves a function to Python it follows the calls in it, and fails inside transforms.
@torch.compiler.disable
def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """:data:`op.prefix_attention_op`."""
    out, lse = _Forward.apply(*args)
    return out, lse


def backward(*args: Any) -> tuple[Tensor, ...]:
    """:data:`op.prefix_attention_backward_op`."""
    grads: tuple[Tensor, ...] = _Backward.apply(*args)
    return grads


def _row_by_row(
    function: Any, rows: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What vmap does with a registered op as well."""
    results = []
    for row in range(rows):
        one = (
            x.select(dim, row) if isinstance(dim, int) else x
            for x, dim in zip(args, in_dims, strict=True)
        )
        results.append(function.apply(*one))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
