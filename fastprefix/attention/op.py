"""The operator as PyTorch sees it: registered ops with fake kernels and a gradient.

Output and gradients of [B, H, L, D] tensors are laid out in memory as [B, L, H, D], the order in
which a model's projections produce and consume them.

A registered op has a flat signature: five tensors, the fields of
:class:`~fastprefix.options.Options` in order, and the backend. Only this module packs and unpacks
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.attention.backends import composed, reference, triton
from fastprefix.attention.transforms import SECOND, is_differentiated, refuse
from fastprefix.options import GRADIENTS, SCHEMA, Options

# What may need a gradient: the five tensors and some of the options.
DIFFERENTIABLE = ("query", "key", "value", "prefix_key", "prefix_value", *GRADIENTS)

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value"
# Where DIFFERENTIABLE stand among the arguments of the op.
_PLACES = (*range(5), *(5 + Options._fields.index(name) for name in GRADIENTS))
_BIAS = 5 + Options._fields.index("prefix_bias")


def run_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a checked call by the named backend, differentiable.

    The compiler and autograd need the registered op. Without them the backend is called directly,
    because the op costs many times as much as the checks.
    """
    if backend == "reference":
        return reference.forward(query, key, value, prefix_key, prefix_value, options)
    tensors = (query, key, value, prefix_key, prefix_value)
    if is_differentiated(backend):
        from fastprefix.attention.differentiated import forward  # which imports the compiler

        return forward(*tensors, *options, backend)
    if _observed(tensors, options):
        return prefix_attention_op(*tensors, *options, backend)
    return _run_forward(tensors, options, backend)


def _observed(tensors: tuple[Tensor, ...], options: Options) -> bool:
    """Whether a compiler, a transform, a mode or autograd must see the call as one op."""
    query, key, value, prefix_key, prefix_value = tensors
    if torch.compiler.is_compiling() or type(query) is not Tensor:
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return True
    return torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or prefix_key.requires_grad
        or prefix_value.requires_grad
        or any(x is not None and x.requires_grad for x in _learnable(options))
    )


def _learnable(options: Options) -> list[Tensor | None]:
    """The options that may need a gradient, in the order of :data:`GRADIENTS`."""
    return [getattr(options, name) for name in GRADIENTS]


def _run_forward(
    tensors: tuple[Tensor, ...], options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    module = triton if backend == "triton" else composed
    out, lse = module.forward(*tensors, options)
    return _as_blhd(out), lse.contiguous()


@torch.library.custom_op(
    "fastprefix::prefix_attention",
    mutates_args=(),
    schema=f"({_TENSORS}, {SCHEMA}, str backend) -> (Tensor, Tensor)",
)
def prefix_attention_op(*args: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a checked call by the named fused backend."""
    return _run_forward(args[:5], Options(*args[5:-1]), args[-1])


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
    module = triton if backend == "triton" else composed
    grads = module.backward(*args[:8], options, tuple(needs))
    dq, dk, dv, *others = (args[0].new_empty(0) if grad is None else grad for grad in grads)
    return (
        _as_blhd(dq) if needs[0] else dq,
        _as_blhd(dk) if needs[1] else dk,
        _as_blhd(dv) if needs[2] else dv,
        *(grad.contiguous() for grad in others),
    )


@prefix_attention_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    options, needs = Options(*args[8:-2]), args[-1]
    inputs = (*args[1:6], *_learnable(options))
    grads = []
    for x, need in zip(inputs, needs, strict=True):
        if not need or x is None:
            grads.append(args[0].new_empty(0))
        elif x.dim() == 4:
            grads.append(_new_blhd(x, x.shape))
        else:
            grads.append(x.new_empty(x.shape))
    return tuple(grads)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the op keeps for its backward."""
    tensors, fields, ctx.backend = inputs[:5], inputs[5:-1], inputs[-1]
    needed = ctx.needs_input_grad
    sequence = needed[0] or needed[1] or needed[2]
    prefix = needed[0] or needed[3] or needed[4] or needed[_BIAS]
    # The first layer of a frozen model needs no gradient for its keys and values. Its backward
    # then reads neither of them.
    read = (sequence or prefix, sequence, sequence, prefix, prefix)
    kept = [x if reads else None for x, reads in zip(tensors, read, strict=True)]
    ctx.shapes = [x.shape for x in tensors]
    ctx.fields = [None if isinstance(field, Tensor) else field for field in fields]
    ctx.save_for_backward(
        *kept, *output, *(field if isinstance(field, Tensor) else None for field in fields)
    )


def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """The op's gradients, for each of its arguments."""
    # grad_lse is zeros: `prefix_attention` hands out a detached lse
    saved = ctx.saved_tensors
    # Of tensors that were not saved the backward needs only the shape: views without memory.
    tensors = [
        grad_out.new_zeros(shape[-1]).expand(shape) if x is None else x
        for x, shape in zip(saved[:5], ctx.shapes, strict=True)
    ]
    fields = [
        field if tensor is None else tensor
        for field, tensor in zip(ctx.fields, saved[7:], strict=True)
    ]
    needs = [ctx.needs_input_grad[place] for place in _PLACES]
    run: Any = prefix_attention_backward_op
    if is_differentiated(ctx.backend):
        from fastprefix.attention.differentiated import backward as run
    grads = run(grad_out, *tensors, *saved[5:7], *fields, ctx.backend, needs)
    result: list[Tensor | None] = [None] * (5 + len(fields) + 1)
    for place, grad, need in zip(_PLACES, grads, needs, strict=True):
        result[place] = grad if need else None
    return tuple(result)


prefix_attention_op.register_autograd(backward, setup_context=setup_context)


def keep_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What the backward op keeps: the backend's name, for the message of its refusal."""
    ctx.backend = inputs[-2]


def refuse_second(ctx: Any, *grads: Tensor) -> None:
    """In place of the backward op's gradients."""
    refuse(ctx.backend, SECOND)


prefix_attention_backward_op.register_autograd(refuse_second, setup_context=keep_backend)


def _as_blhd(x: Tensor) -> Tensor:
    """[B, H, L, D] laid out in memory as [B, L, H, D]; copies only if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _new_blhd(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    B, H, L, D = shape
    return like.new_empty(B, L, H, D).transpose(1, 2)
