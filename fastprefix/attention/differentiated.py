"""The operator for calls that PyTorch's transforms differentiate (torch.func, forward mode).

The transforms cannot differentiate a registered op: they do not see its gradient, and take its
forward-mode derivative to be zero. They can differentiate the functions here, which have the same
gradient. Forward mode and second derivatives have no formula and are refused.

This is a module of its own, imported only when it is needed, because it imports the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.attention import op
from fastprefix.attention.transforms import FORWARD_MODE, is_differentiated, refuse


@torch.compiler.disable  # see forward() below
def _gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    run = backward if is_differentiated(ctx.backend) else None
    return op.by_argument(op.gradients(ctx, grad_out, run))


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return op.prefix_attention_op(*args)

    setup_context = staticmethod(op.setup_context)
    backward = staticmethod(_gradients)

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


# Dynamo traces the calls inside a function that it runs in Python, and fails inside transforms.
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
    """One call for each row, which is also what vmap does with a registered op."""
    results = []
    for row in range(rows):
        one = (
            x.select(dim, row) if isinstance(dim, int) else x
            for x, dim in zip(args, in_dims, strict=True)
        )
        results.append(function.apply(*one))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
