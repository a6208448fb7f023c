"""Forward and all five gradients of the kernels, in the interpreter, against float64.

Shapes, layouts and dtypes; features and random combinations of all of it in test_features.py.
"""

from __future__ import annotations

import pytest
import torch

from fastprefix_testing.launchers import HALF, HEADS, assert_kernels_accurate, interpreted, launched
from fastprefix_testing.problems import tiles

pytestmark = interpreted


def agree(**fields):
    assert_kernels_accurate(tiles(**fields).draw())


@pytest.mark.parametrize("i_dtype", range(3), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("i_heads", range(3), ids=list(HEADS))
def test_heads_and_dtypes(i_dtype, i_heads):
    Hq, Hkv = list(HEADS.values())[i_heads]
    dtype = [torch.float32, *HALF][i_dtype]
    # every head layout and every dtype both causal and bidirectional
    is_causal = (i_dtype + i_heads) % 2 == 0
    agree(Hq=Hq, Hkv=Hkv, Lq=35, Lk=50, D=32, dtype=dtype, is_causal=is_causal)


@pytest.mark.parametrize("P", [0, 1, 63, 130])
@pytest.mark.parametrize("Lq", [1, 7, 45])
def test_prefix_and_query_lengths(P, Lq):
    agree(B=1, Hq=2, Hkv=1, Lq=Lq, Lk=45, P=P, D=16)


@pytest.mark.parametrize("padding", ["left", "right", "holes", "row"])
@pytest.mark.parametrize(("is_causal", "P"), [(True, 5), (False, 0)], ids=["causal", "no prefix"])
def test_padding(padding, is_causal, P):
    agree(Lq=40, Lk=70, P=P, D=16, padding=padding, is_causal=is_causal, Hq=2, Hkv=1)


@pytest.mark.parametrize("D", [1, 16, 72, 80, 128])
def test_head_sizes(D):
    agree(B=1, Hq=2, Hkv=1, Lq=17, Lk=40, P=33, D=D, dtype=torch.float16)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("transposed", torch.bfloat16),
        ("strided", torch.float32),
        ("strided", torch.bfloat16),
        ("islands", torch.float32),
    ],
    ids=str,
)
def test_layouts(layout, dtype):
    agree(Lq=20, Lk=37, P=37, D=24, layout=layout, dtype=dtype, padding="right")


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0])
def test_scales(scale):
    agree(B=1, Hq=2, Hkv=1, Lq=20, Lk=37, P=9, D=16, scale=scale, padding="holes")


@pytest.mark.parametrize("empty", ["B", "Lq"])
def test_no_queries_give_zero_gradients(empty):
    call = tiles(**{"Hq": 2, "Hkv": 1, "Lq": 5, "Lk": 5, "P": 9, "D": 16, empty: 0}).draw()
    found = launched(call)
    query = call.tensors["query"]
    assert found["out"].shape == query.shape
    assert found["lse"].shape == query.shape[:3]
    for name, x in call.tensors.items():
        assert torch.equal(found[name], torch.zeros_like(x))


def test_no_sequence_keys():
    agree(Hq=2, Hkv=1, Lq=5, Lk=0, P=9, D=16)


def test_nothing_at_all():
    agree(B=1, Lk=0, Lq=5, P=0, D=16)


def test_more_queries_than_keys():
    agree(B=1, Hq=2, Hkv=1, Lq=50, Lk=20, P=0, D=16)


def test_large_scores_neither_overflow_nor_vanish():
    # In bf16: in fp32, scores of this size leave no digits for a rule about rounding.
    sizes = {"B": 1, "Hq": 2, "Hkv": 1, "Lq": 40, "Lk": 40, "P": 40, "D": 32}
    agree(**sizes, scale=30.0, padding="left", dtype=torch.bfloat16)
