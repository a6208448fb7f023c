"""Each feature by itself and in any combination, forward and all gradients.

Reference is held to the contract row by row, and the other backends to reference.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprefix.attention.backends.composed import plain
from fastprefix.attention.selection import BACKENDS, FEATURES
from fastprefix_testing import calls as feature_calls
from fastprefix_testing.calls import assert_as_reference

HALF = [torch.bfloat16, torch.float16]
# What reference can be asked for. How many bits two results share has tests of its own.
COMPARED = [name for name in FEATURES if name in BACKENDS["reference"].features]
# What composed computes in a way of its own, and therefore without the others.
BY_SCORES = frozenset({"softcap", "dropout_p"})
# Held to reference in every feature that the table says they have, by that many combinations.
HELD = [
    ("composed", BY_SCORES, 120),  # tests/attention/test_scores.py has these two
    ("triton", frozenset(), 6),
]

SIZES = {
    "prefill": {"Lq": 7, "past": 0, "pad": "left", "lengths": (5, 0, 3)},
    "cache": {"Lq": 5, "past": 9, "pad": "none", "lengths": (17,)},
    "decode": {"Lq": 1, "past": 11, "pad": "none", "lengths": (1, 63)},
    "padded decode": {"Lq": 1, "past": 11, "pad": "holes", "lengths": (9,), "is_causal": False},
    "bidirectional": {"Lq": 6, "past": 0, "pad": "row", "lengths": (0,), "is_causal": False},
}


@pytest.mark.parametrize("feature", COMPARED)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_reference_is_the_contract(feature, sizes):
    call = feature_calls.build(features={feature}, D=8, **sizes)
    torch.testing.assert_close(call.by("reference"), call.by_rows(), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_reference_is_the_contract_in_any_combination(data):
    drawn = data.draw(feature_calls.drawn("reference", longest=7))
    call = feature_calls.build(**drawn)
    torch.testing.assert_close(call.by("reference"), call.by_rows(), rtol=1e-9, atol=1e-9)


# The kernels have tests of their own for every feature, and a slow interpreter.
CASES = [
    *itertools.product(["composed"], [torch.float64, torch.float32, *HALF], SIZES),
    *itertools.product(["triton"], [torch.float32], ["prefill"]),
]


@pytest.mark.parametrize("feature", COMPARED)
@pytest.mark.parametrize(("backend", "dtype", "sizes"), CASES)
def test_backends_are_reference(backend, dtype, sizes, feature):
    if feature not in BACKENDS[backend].features:
        pytest.skip(f"{backend} cannot")
    call = feature_calls.build(features={feature}, dtype=dtype, **SIZES[sizes])
    assert_as_reference(call, backend)


@pytest.mark.parametrize("few_bytes", [0, 1 << 40], ids=["two calls", "one call"])
@pytest.mark.parametrize("pad", ["none", "left", "holes", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_composed_decodes_in_one_call_and_in_two(dtype, pad, few_bytes, monkeypatch):
    monkeypatch.setattr(plain, "_ONE_CALL_BYTES", few_bytes)
    for B, Hkv, group in [(1, 2, 2), (3, 2, 3), (2, 3, 1)]:
        sizes = {"B": B, "Hkv": Hkv, "group": group, "Lq": 1, "past": 11, "lengths": (9,)}
        assert_as_reference(feature_calls.build(dtype=dtype, pad=pad, **sizes), "composed")


@pytest.mark.parametrize(("backend", "without", "examples"), HELD)
def test_backends_are_reference_in_any_combination(backend, without, examples):
    dtypes = [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]
    dtypes = [dtype for dtype in dtypes if dtype in BACKENDS[backend].dtypes]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(drawn=feature_calls.drawn(backend, without=without), dtype=st.sampled_from(dtypes))
    def check(drawn, dtype):
        assert_as_reference(feature_calls.build(**drawn, dtype=dtype), backend)

    check()
