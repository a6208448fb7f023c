"""The operator as a compiler sees it: registered ops with fake kernels.

:mod:`fastprefix.attention.run` gives them their gradient, and decides which calls they serve.

Output and gradients of [B, H, L, D] tensors are laid out in memory as [B, L, H, D], the order in
which a model's projections produce and consume them, whatever the layout of the query. Backends
return them so.

A registered op has a flat signature: five tensors, the fields of
:class:`~fastprefix.options.Options` in order, and the backend. Only this module packs and unpacks
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.attention.backends import composed, triton
from fastprefix.attention.transforms import SECOND, refuse
from fastprefix.options import GRADIENTS, SCHEMA, Options

# What may need a gradient: the five tensors and some of the options.
DIFFERENTIABLE = ("query", "key", "value", "prefix_key", "prefix_value", *GRADIENTS)

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value"
# Where DIFFERENTIABLE stand among the arguments of the op.
_PLACES = (*range(5), *(5 + Options._fields.index(name) for name in GRADIENTS))
_BIAS = DIFFERENTIABLE.index("prefix_bias")
_ARGUMENTS = 5 + len(Options._fields) + 1


def run_forward(
    tensors: tuple[Tensor, ...], options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a checked call by the named fused backend, without a gradient."""
    module = triton if backend == "triton" else composed
    return module.forward(*tensors, options)


def known_forward(tensors: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Tensor] | None:
    """What :func:`run_forward` returns, for a call like one that ran before; None for others."""
    return triton.known(tensors, options)


def run_backward(
    grad_out: Tensor,
    tensors: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
    options: Options,
    backend: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :data:`DIFFERENTIABLE`, None for each that is not needed."""
    module = triton if backend == "triton" else composed
    return module.backward(grad_out, *tensors, out, lse, options, needs)


@torch.library.custom_op(
    "fastprefix::prefix_attention",
    mutates_args=(),
    schema=f"({_TENSORS}, {SCHEMA}, str backend) -> (Tensor, Tensor)",
)
def prefix_attention_op(*args: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a checked call by the named fused backend."""
    return run_forward(args[:5], Options(*args[5:-1]), args[-1])


@prefix_attention_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    query, value = args[0], args[2]
    B, Hq, Lq, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = _new_blhd(query, (B, Hq, Lq, value.shape[-1]))
    return out, query.new_empty(B, Hq, Lq, dtype=lse_dtype)


@torch.library.custom_op(
    "fastprefix::prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_TENSORS}, Tensor out, Tensor lse, {SCHEMA}, str backend, "
    f"bool[] needs) -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
)
def prefix_attention_backward_op(*args: Any) -> tuple[Tensor, ...]:
    """The gradients of :data:`DIFFERENTIABLE`; an empty tensor for each that is not needed."""
    options, (backend, needs) = Options(*args[8:-2]), args[-2:]
    out, lse = args[6:8]
    grads = run_backward(args[0], args[1:6], out, lse, options, backend, tuple(needs))
    return tuple(
        grad if grad is not None and need else args[0].new_empty(0)
        for grad, need in zip(grads, needs, strict=True)
    )


@prefix_attention_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    options, needs = Options(*args[8:-2]), args[-1]
    inputs = (*args[1:6], *(getattr(options, name) for name in GRADIENTS))
    grads = []
    for x, need in zip(inputs, needs, strict=True):
        if not need or x is None:
            grads.append(args[0].new_empty(0))
        elif x.dim() == 4:
            grads.append(_new_blhd(x, x.shape))
        else:
            grads.append(x.new_empty(x.shape))
    return tuple(grads)


def keep(
    ctx: Any,
    tensors: tuple[Tensor, ...],
    options: Options,
    backend: str,
    output: tuple[Tensor, Tensor],
    needs: tuple[bool, ...],
) -> None:
    """Saves what the backward of a call reads.

    `needs` says which of :data:`DIFFERENTIABLE` need a gradient.
    """
    sequence = needs[0] or needs[1] or needs[2]
    prefix = needs[0] or needs[3] or needs[4] or needs[_BIAS]
    # The first layer of a frozen model needs no gradient for its keys and values. Its backward
    # then reads neither of them.
    read = (sequence or prefix, sequence, sequence, prefix, prefix)
    inside = [i for i, x in enumerate(options) if x is not None and isinstance(x, Tensor)]
    saved = [options[i] for i in inside]
    if inside:
        options = Options._make(None if i in inside else x for i, x in enumerate(options))
    ctx.options, ctx.inside, ctx.backend, ctx.needs = options, inside, backend, needs
    if all(read):
        ctx.shapes = None
        ctx.save_for_backward(*output, *tensors, *saved)
    else:
        ctx.shapes = [x.shape for x in tensors]
        some = [x if reads else None for x, reads in zip(tensors, read, strict=True)]
        ctx.save_for_backward(*output, *some, *saved)


def kept(ctx: Any, grad_out: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Options]:
    """What :func:`keep` saved: query to prefix_value, out, lse, options."""
    out, lse, *saved = ctx.saved_tensors
    tensors, options = saved[:5], ctx.options
    if ctx.inside:
        fields = list(options)
        for place, x in zip(ctx.inside, saved[5:], strict=True):
            fields[place] = x
        options = Options(*fields)
    if ctx.shapes is not None:
        # Of tensors that were not saved the backward needs only the shape: views without memory.
        tensors = [
            grad_out.new_zeros(shape[-1]).expand(shape) if x is None else x
            for x, shape in zip(tensors, ctx.shapes, strict=True)
        ]
    return tuple(tensors), out, lse, options


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the registered op saves for its backward."""
    needs = tuple(ctx.needs_input_grad[place] for place in _PLACES)
    keep(ctx, inputs[:5], Options(*inputs[5:-1]), inputs[-1], output, needs)


def gradients(ctx: Any, grad_out: Tensor, run: Any = None) -> tuple[Tensor | None, ...]:
    """The gradient of a call by the backward op, for :data:`DIFFERENTIABLE`.

    `run` takes the place of :data:`prefix_attention_backward_op`.
    """
    tensors, out, lse, options = kept(ctx, grad_out)
    run = run or prefix_attention_backward_op
    grads = run(grad_out, *tensors, out, lse, *options, ctx.backend, list(ctx.needs))
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))


def by_argument(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of :data:`DIFFERENTIABLE` in the places of the op's arguments, None elsewhere."""
    result: list[Tensor | None] = [None] * _ARGUMENTS
    for place, grad in zip(_PLACES, grads, strict=True):
        result[place] = grad
    return tuple(result)


def keep_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The backward op keeps the name of its backend, for the message of the refusal."""
    ctx.backend = inputs[-2]


def refuse_second(ctx: Any, *grads: Tensor) -> None:
    """In place of the backward op's gradients."""
    refuse(ctx.backend, SECOND)


prefix_attention_backward_op.register_autograd(refuse_second, setup_context=keep_backend)


def _new_blhd(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    B, H, L, D = shape
    return like.new_empty(B, L, H, D).transpose(1, 2)
