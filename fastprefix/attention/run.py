"""How a checked call runs: as a registered op, as an autograd function, or without either.

The compiler, transforms and modes of PyTorch must see the call as one registered op. Its dispatch
costs several times what a small call does, so other calls leave it out: with gradients they run in
an autograd function, which has the same backward, and without gradients the backend is called
directly.
"""

from __future__ import annotations

import operator
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from fastprefix.attention import op
from fastprefix.attention.backends import reference
from fastprefix.attention.selection import AUTO
from fastprefix.attention.step import Step
from fastprefix.attention.transforms import is_differentiated
from fastprefix.options import GRADIENTS, Options

# Other types may be wrong, but equal to a right one: 1 is True, and 2.0 is 2.
_NUMBERS = operator.attrgetter("is_causal", "scale", "prefix_in_window", "batch_invariant")
_NUMBER_TYPES = (bool, float, bool, bool)


def run_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
    backend: str,
    step: Step | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a checked call by the named backend, differentiable.

    Args:
        query: [B, Hq, Lq, D]; see :func:`fastprefix.prefix_attention` for the other tensors.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D].
        prefix_value: [Hkv, P, Dv].
        options: as the backends read them.
        backend: its name.
        step: what other calls with the same integers left for this one. A compiler, which must see
            all that a call reads, gets the call without it.
    """
    if backend == "reference":
        return reference.forward(query, key, value, prefix_key, prefix_value, options)
    tensors = (query, key, value, prefix_key, prefix_value)
    if is_differentiated(backend):
        from fastprefix.attention.differentiated import forward  # which imports the compiler

        return forward(*tensors, *options, backend)
    if is_watched(query):
        return op.prefix_attention_op(*tensors, *options, backend)
    if step is not None and backend == "triton":
        options = step.with_spans(step.with_tables(tensors, options))
    if torch.is_grad_enabled() and _needs_gradient(tensors, options):
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace records ops
            return op.prefix_attention_op(*tensors, *options, backend)
        out, lse = _Attention.apply(*tensors, *_learnable(options), options, backend)
        return out, lse
    return op.run_forward(tensors, options, backend)


def run_known(
    tensors: tuple[Tensor, ...], options: Options, backend: str, step: Step | None = None
) -> tuple[Tensor, Tensor] | None:
    """What :func:`run_op` returns, for a call without gradients that is like one that ran before.

    None for others. The tensors need no checks: the kind of a call, by which it is recognised, says
    everything that the checks look at. Nobody reads the values of key_lengths on a device.

    Args:
        tensors: query, key, value, prefix_key, prefix_value.
        options: that are :func:`~fastprefix.options.told_by_kind`.
        backend: as the user gave it.
        step: see :func:`run_op`.
    """
    query = tensors[0]
    if torch.is_grad_enabled() or type(query) is not Tensor:
        return None
    first = AUTO.get(query.device.type, ("",))[0] if backend == "auto" else backend
    if (
        first != "triton"
        or is_watched(query)
        or is_differentiated(backend)
        or any(map(operator.is_not, map(type, _NUMBERS(options)), _NUMBER_TYPES))
        or type(options.sliding_window) not in (int, NoneType)
        or type(options.softcap) not in (float, NoneType)
    ):
        return None
    known = options if step is None else step.with_known_spans(options)
    return None if known is None else op.known_forward(tensors, known)


def is_watched(tensor: Tensor) -> bool:
    """Whether a compiler, a transform, a mode or a kind of tensor must see the call as one op."""
    return bool(
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
    )


def _needs_gradient(tensors: tuple[Tensor, ...], options: Options) -> bool:
    """Whether anything that has a gradient asks for it."""
    query, key, value, prefix_key, prefix_value = tensors
    return (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or prefix_key.requires_grad
        or prefix_value.requires_grad
        or any(x is not None and x.requires_grad for x in _learnable(options))
    )


_LEARNABLE = operator.attrgetter(*GRADIENTS)


def _learnable(options: Options) -> tuple[Tensor | None, ...]:
    """The options that may need a gradient."""
    found: tuple[Tensor | None, ...] = _LEARNABLE(options)
    return found


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient by the registered backward op."""
    if is_differentiated(ctx.backend):
        from fastprefix.attention import differentiated  # which imports the compiler

        return op.gradients(ctx, grad_out, differentiated.backward)
    return op.gradients(ctx, grad_out)


def _op_gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the registered op, for each of its arguments."""
    return op.by_argument(_gradients(ctx, grad_out))


op.prefix_attention_op.register_autograd(_op_gradients, setup_context=op.setup_context)


class _Attention(torch.autograd.Function):
    """The registered op without its dispatch.

    The arguments are the tensors of :data:`op.DIFFERENTIABLE`, the options and the backend.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        tensors, options, backend = args[:5], args[-2], args[-1]
        # Without the guard autograd would take the output for a view, which may not be changed in
        # place when a function returns it.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            output = op.run_forward(tensors, options, backend)
        op.keep(ctx, tensors, options, backend, output, ctx.needs_input_grad[:-2])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # nothing reads a gradient of lse
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        if (
            torch.is_grad_enabled()  # a graph of the gradient holds the op that refuses another
            or is_watched(grad_out)
            or torch._C._functorch.is_legacy_batchedtensor(grad_out)  # of is_grads_batched
            or is_differentiated(ctx.backend)
        ):
            return (*_gradients(ctx, grad_out), None, None)
        tensors, out, lse, options = op.kept(ctx, grad_out)
        grads = op.run_backward(grad_out, tensors, out, lse, options, ctx.backend, ctx.needs)
        return (*grads, None, None)
