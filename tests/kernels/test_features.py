"""Every feature of the contract, alone and in combinations, in the interpreter against float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprefix.kernels import tilings

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
    ),
    # Philox multiplies modulo 2^32, on purpose
    pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning"),
]
NOT_BROADCAST = (False, False, False, False)
FEATURES: dict[str, dict[str, Any]] = {
    "packed prefixes": {"lengths": (33, 0, 1, 6), "index": (2, -1, 0), "B": 3},
    "prefixes shared by rows": {"lengths": (12, 28), "index": (1, 0, 1), "B": 3},
    "unused prefix": {"lengths": (12, 28), "index": (1, 1, -1), "B": 3},
    "cu_seqlens": {"boundaries": (0, 9, 9, 37), "B": 1},
    "cu_seqlens and packed prefixes": {
        "boundaries": (0, 9, 11, 37), "lengths": (7, 33), "index": (1, -1, 1), "B": 1,
    },
    "bool mask": {"mask": ("bool", NOT_BROADCAST), "B": 2},
    "additive mask": {"mask": ("additive", NOT_BROADCAST), "B": 2},
    "broadcast mask": {"mask": ("additive", (True, True, False, False)), "padding": "left", "B": 2},
    "sinks": {"sinks": True},
    "sinks of rows that see nothing": {"sinks": True, "padding": "row", "P": 0, "B": 2},
    "bias by head": {"bias": "heads"},
    "bias by column": {"bias": "columns"},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1, "P": 0},
    "window of several tiles": {"sliding_window": 40, "Lq": 70, "Lk": 110},
    "prefix in window": {"sliding_window": 50, "prefix_in_window": True},
    "padded prefix in window": {
        "sliding_window": 50, "prefix_in_window": True, "padding": "left", "B": 2,
    },
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3},
    "smaller value": {"D": 40, "Dv": 24},
    "larger value": {"D": 16, "Dv": 72},
}  # fmt: skip


@pytest.mark.parametrize(
    ("is_causal", "dtype"),
    [(True, torch.float32), (False, torch.bfloat16)],
    ids=["causal fp32", "bidirectional bf16"],
)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(problem, agree, feature, is_causal, dtype):
    torch.manual_seed(0)
    shape = {"P": 40, "D": 16, "B": 1, "Hq": 2, "Hkv": 1, **FEATURES[feature]}
    agree(problem(**shape, is_causal=is_causal, dtype=dtype))


@pytest.mark.parametrize(
    "feature",
    ["cu_seqlens and packed prefixes", "broadcast mask", "padded prefix in window", "dropout"],
)
@pytest.mark.parametrize(("is_causal", "clamped"), [(True, True), (True, False), (False, True)])
def test_where_whole_tiles_have_no_loop_of_their_own(
    problem, agree, monkeypatch, feature, is_causal, clamped
):
    """As with fp32 on most targets, and on RDNA, where rows past the end repeat the last one."""
    monkeypatch.setattr(tilings, "unmasked_loop", lambda pass_name, work: False)
    monkeypatch.setattr(tilings, "repeat_last_row", lambda work: clamped)
    torch.manual_seed(0)
    shape = {"P": 40, "D": 16, "B": 1, "Hq": 2, "Hkv": 1, **FEATURES[feature]}
    agree(problem(**shape, is_causal=is_causal))


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a problem with any features that go together."""
    sometimes = st.sampled_from([True, False, False])
    length = st.sampled_from([1, 2, 5, 31, 32, 33, 40, 65])
    Hkv, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    call: dict[str, Any] = {
        "Hq": Hkv * group,
        "Hkv": Hkv,
        "D": draw(st.sampled_from([3, 16, 24, 40])),
        "Dv": draw(st.sampled_from([None, None, 5, 16, 33])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.3, 0.1, -0.2])),
        "layout": draw(st.sampled_from(["dense", "transposed", "islands", "strided"])),
        "sinks": draw(sometimes),
        "bias": draw(st.sampled_from(["none", "none", "heads", "columns"])),
        "softcap": draw(st.sampled_from([None, None, 1.0, 5.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
    }
    if draw(sometimes):
        call["boundaries"] = (0, *sorted(draw(st.lists(st.integers(0, 40), max_size=3))), 40)
        call["B"], call["Lq"], call["Lk"] = 1, 40, 40
        sequences = len(call["boundaries"]) - 1
    else:
        sequences = call["B"] = draw(st.integers(1, 2))
        call["Lq"] = draw(length)
        call["Lk"] = max(0, call["Lq"] + draw(st.sampled_from([0, 0, 7, 33, -5])))
        call["padding"] = draw(st.sampled_from(["none", "none", "left", "right", "holes", "row"]))
        if draw(sometimes):
            broadcast = draw(st.tuples(*[st.booleans()] * 4))
            call["mask"] = (draw(st.sampled_from(["bool", "additive"])), broadcast)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.sampled_from([0, 1, 5, 32, 63]), min_size=1, max_size=4))
        index = st.integers(-1, len(lengths) - 1)
        call["lengths"], call["P"] = tuple(lengths), sum(lengths)
        call["index"] = draw(st.tuples(*[index] * sequences))
    else:
        call["P"] = draw(st.sampled_from([0, 1, 32, 63]))
    if draw(sometimes):
        call["sliding_window"] = draw(st.sampled_from([1, 4, 20, 50]))
        call["prefix_in_window"] = draw(st.booleans())
    return call


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=combinations(), seed=st.integers(0, 1000))
def test_combinations(problem, agree, call, seed):
    torch.manual_seed(seed)
    agree(problem(**call))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=combinations(), seed=st.integers(0, 1000))
def test_outputs_are_written_whole_and_nothing_else_is(problem, run, poisoned, call, seed):
    torch.manual_seed(seed)
    case = problem(**call | {"layout": "islands"})
    inputs, grad_out, options = case.operands()
    buffers = [x._base for x in (*inputs, grad_out)]
    before = [x.clone() for x in buffers]
    for result in run(case, inputs, grad_out, options):
        assert result is None or not result.isnan().any()
    poisoned()
    for buffer, copy in zip(buffers, before, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))
