"""16-bit inputs: scores, softmax and log-sum-exp in float32, only the results rounded."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastprefix import prefix_attention

# Hq, Hkv, Lq, Lk, P, D: those of FlashInfer's and Hydragen's tests, for rows of a batch
SHAPES = {
    "decode": (8, 2, 1, 37, 512, 128),
    "append": (8, 8, 17, 17, 127, 64),
    "long": (4, 1, 5, 509, 1023, 128),
}
OPTIONS = {
    "bidirectional": {},
    "causal": {"is_causal": True},
    "capped": {"is_causal": True, "softcap": 3.0},
}
HALF = [torch.bfloat16, torch.float16]


def inputs(shape, dtype):
    Hq, Hkv, Lq, Lk, P, D = shape
    shapes = (3, Hq, Lq, D), (3, Hkv, Lk, D), (3, Hkv, Lk, D), (Hkv, P, D), (Hkv, P, D)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def exact(tensors, options):
    wide = [x.double() for x in tensors]
    return prefix_attention(*wide, **options, return_lse=True, backend="reference")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", HALF)
def test_reference_rounds_nothing_but_its_results(dtype, shape, options):
    tensors = inputs(shape, dtype)
    out, lse = prefix_attention(*tensors, **options, return_lse=True, backend="reference")
    exact_out, exact_lse = exact(tensors, options)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    # half a unit in the last place, and what float32 itself is off
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact_out, rtol=eps / 2 * 1.01, atol=2e-7)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", HALF)
def test_what_flashinfer_and_hydragen_ask_for(masking_backend, dtype, shape):
    """1e-3 in float16; bfloat16 has eight times its unit."""
    tensors, options = inputs(shape, dtype), OPTIONS["causal"]
    out, lse = prefix_attention(*tensors, **options, return_lse=True, backend=masking_backend)
    exact_out, exact_lse = exact(tensors, options)
    near = 1e-3 if dtype is torch.float16 else 8e-3
    torch.testing.assert_close(out.double(), exact_out, rtol=near, atol=near)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "softcap"), itertools.product(HALF, [None, 3.0]))
def test_gradients_of_reference_are_rounded_once(dtype, softcap):
    tensors = [x.requires_grad_() for x in inputs(SHAPES["append"], dtype)]
    options = {"is_causal": True, "softcap": softcap, "backend": "reference"}
    out = prefix_attention(*tensors, **options)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, grad)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(prefix_attention(*wide, **options), wide, grad.double())
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        room = torch.finfo(dtype).eps / 2 * 1.01
        torch.testing.assert_close(one.double(), other, rtol=room, atol=2e-6)


def test_autocast_rounds_no_scores_of_reference():
    tensors = inputs(SHAPES["append"], torch.bfloat16)
    options = {"is_causal": True, "return_lse": True, "backend": "reference"}
    expected = prefix_attention(*tensors, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = prefix_attention(*tensors, **options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
