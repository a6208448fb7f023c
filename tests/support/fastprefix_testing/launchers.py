"""Calls on the launchers of the kernels, which the tests run in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix.attention.backends import reference
from fastprefix.kernels import launch_backward, launch_forward, launch_spans
from fastprefix.options import Options
from fastprefix_testing.calls import Call
from fastprefix_testing.tolerance import assert_accurate

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)
FIVE = ("query", "key", "value", "prefix_key", "prefix_value")
HALF = (torch.bfloat16, torch.float16)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}  # query heads, key/value heads
# Gradients of kernels are judged with this floor; `tolerance.assert_within` says why.
GRADIENT_FLOOR = 4.0


def operands(call: Call) -> tuple[tuple[Any, Any, Any, Any, Any], dict[str, Any]]:
    """The five inputs of a launcher, and the fields of its `Options`.

    Scale, and the seed of a dropout, are what the operator would add.
    """
    tensors = dict(call.tensors)
    query, key, value, prefix_key, prefix_value = (tensors.pop(name) for name in FIVE)
    inputs = query, key, value, prefix_key, prefix_value
    options = {"scale": query.shape[-1] ** -0.5, **call.options, **tensors}
    if options.get("dropout_p"):
        generator = torch.Generator().manual_seed(call.seed)
        options["dropout_seed"] = torch.randint(2**63 - 1, (1,), generator=generator)
    return inputs, options


def launched(call: Call, with_spans: bool = False) -> dict[str, Tensor]:
    """`out`, `lse` and all gradients of the kernels, by name."""
    inputs, given = operands(call)
    options = Options(**given)
    if with_spans and options.key_padding_mask is not None:
        options = options._replace(spans=launch_spans(options.key_padding_mask))
    wanted = tuple(name in call.tensors for name in (*FIVE, "sinks", "prefix_bias"))
    out, lse = launch_forward(*inputs, options)
    grads = launch_backward(call.grad_out, *inputs, out, lse, options, wanted)
    found = {"out": out, "lse": lse}
    for name, is_wanted, grad in zip((*FIVE, "sinks", "prefix_bias"), wanted, grads, strict=True):
        assert (grad is not None) == is_wanted, name
        if grad is not None:
            found[name] = grad
    return found


def rounded(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """What :func:`launched` finds, by the maths of reference, rounded to a dtype all the way."""

    def attend(**arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, options = operands(Call(arguments, {}, call.grad_out, call.seed))
        lengths = options.get("key_lengths")
        if lengths is not None:  # what is not in use may be NaN
            unused = torch.arange(inputs[1].shape[2]) >= lengths[:, None]
            text = (x.masked_fill(unused[:, None, :, None], 0.0) for x in inputs[1:3])
            inputs = (inputs[0], *text, *inputs[3:])
        # not `forward`, which computes in float32: kernels are held to these roundings too
        out, lse = reference._attend(*inputs, Options(**options))
        return out, lse.to(torch.promote_types(dtype, torch.float32))

    return call.to(dtype).solve(attend)


def assert_kernels_accurate(call: Call) -> None:
    """Asserts the rule of ``tolerance.py`` for forward and backward of the kernels.

    If something is padded, also where they are told in which span.
    """
    dtype = call.grad_out.dtype
    exact, plain = rounded(call, torch.float64), rounded(call, dtype)
    for with_spans in (False, True) if "key_padding_mask" in call.options else (False,):
        found = launched(call, with_spans)
        assert_accurate(found, exact, plain, dtype, gradient_floor=GRADIENT_FLOOR)


def judge(call: Call, found: tuple[Tensor, Tensor]) -> None:
    """Asserts the rule of ``tolerance.py`` for the output and the lse of a forward."""
    dtype = call.grad_out.dtype
    exact, plain = (call.to(d).by_concatenation(wanted=()) for d in (torch.float64, dtype))
    assert_accurate(dict(zip(("out", "lse"), found, strict=True)), exact, plain, dtype)
