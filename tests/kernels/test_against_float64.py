"""Forward and all five gradients of the kernels, in the interpreter, against float64."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)
HALF = [torch.bfloat16, torch.float16]
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_heads_and_dtypes(problem, agree, dtype, heads, is_causal):
    Hq, Hkv = HEADS[heads]
    agree(problem(Hq=Hq, Hkv=Hkv, Lq=35, Lk=50, dtype=dtype, is_causal=is_causal))


@pytest.mark.parametrize("P", [0, 1, 63, 130])
@pytest.mark.parametrize("Lq", [1, 7, 45])
def test_prefix_and_query_lengths(problem, agree, P, Lq):
    agree(problem(B=1, Lq=Lq, Lk=45, P=P, D=16))


@pytest.mark.parametrize("padding", ["left", "right", "holes", "row"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("P", [0, 5])
def test_padding(problem, agree, padding, is_causal, P):
    agree(problem(Lq=40, Lk=70, P=P, D=16, padding=padding, is_causal=is_causal, Hq=2, Hkv=1))


@pytest.mark.parametrize("D", [1, 16, 72, 80, 128])
def test_head_sizes(problem, agree, D):
    agree(problem(B=1, Hq=2, Hkv=1, Lq=17, Lk=40, P=33, D=D, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "islands"])
def test_layouts(problem, agree, layout, dtype):
    agree(problem(Lq=20, Lk=37, P=37, D=24, layout=layout, dtype=dtype, padding="right"))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0])
def test_scales(problem, agree, scale):
    agree(problem(B=1, Hq=2, Hkv=1, Lq=20, Lk=37, P=9, D=16, scale=scale, padding="holes"))


@pytest.mark.parametrize("empty", ["B", "Lq"])
def test_no_queries_give_zero_gradients(problem, run, empty):
    case = problem(**{"Hq": 2, "Hkv": 1, "Lq": 5, "Lk": 5, "P": 9, "D": 16, empty: 0})
    inputs, grad_out, options = case.operands()
    out, lse, *grads = run(case, inputs, grad_out, options)
    assert out.shape == inputs[0].shape
    assert lse.shape == inputs[0].shape[:3]
    for x, grad in zip(inputs, grads[:5], strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_no_sequence_keys(problem, agree):
    agree(problem(Hq=2, Hkv=1, Lq=5, Lk=0, P=9, D=16))


def test_nothing_at_all(problem, agree):
    agree(problem(Lk=0, Lq=5, P=0, D=16))


def test_more_queries_than_keys(problem, agree):
    agree(problem(Lq=50, Lk=20, P=0, D=16))


def test_large_scores_neither_overflow_nor_vanish(problem, agree):
    # In bf16: in fp32, scores of this size leave no digits for a rule about rounding.
    case = problem(B=1, Hq=2, Hkv=1, Lq=40, Lk=40, P=40, D=32, scale=30.0, padding="left")
    agree(dataclasses.replace(case, dtype=torch.bfloat16))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(problem, agree, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    Hkv, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    agree(
        problem(
            B=data.draw(st.integers(1, 3)),
            Hq=Hkv * group,
            Hkv=Hkv,
            Lq=data.draw(st.integers(1, 40)),
            Lk=data.draw(st.integers(0, 70)),
            P=data.draw(st.integers(0, 70)),
            D=data.draw(st.sampled_from([3, 16, 24, 40])),
            dtype=data.draw(st.sampled_from([torch.float32, *HALF])),
            is_causal=data.draw(st.booleans()),
            padding=data.draw(st.sampled_from(["none", "left", "right", "holes", "row"])),
            layout=data.draw(st.sampled_from(["dense", "transposed", "islands"])),
        )
    )
