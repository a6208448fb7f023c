"""Each feature by itself and in combinations, in the interpreter against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprefix.kernels import tilings
from fastprefix_testing.launchers import FIVE, assert_kernels_accurate, interpreted, launched
from fastprefix_testing.problems import tiles

pytestmark = [
    interpreted,
    # Philox multiplies modulo 2^32, on purpose
    pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning"),
]
FEATURES: dict[str, dict[str, Any]] = {
    "packed prefixes": {"lengths": (33, 0, 1, 6), "index": (2, -1, 0), "B": 3},
    "prefixes shared by rows": {"lengths": (12, 28), "index": (1, 0, 1), "B": 3},
    "unused prefix": {"lengths": (12, 28), "index": (1, 1, -1), "B": 3},
    "cu_seqlens": {"cu_seqlens": (0, 9, 9, 37)},
    "cu_seqlens and packed prefixes": {
        "cu_seqlens": (0, 9, 11, 37), "lengths": (7, 33), "index": (1, -1, 1),
    },
    "bool mask": {"attn_mask": "bool", "B": 2},
    "additive mask": {"attn_mask": "additive", "B": 2},
    "broadcast mask": {
        "attn_mask": "lowest", "broadcast": (True, True, False, False), "padding": "left", "B": 2,
    },
    "sinks": {"sinks": True},
    "sinks of rows that see nothing": {"sinks": True, "padding": "row", "P": 0, "B": 2},
    "bias by head": {"prefix_bias": "heads"},
    "bias by column": {"prefix_bias": "columns"},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1, "P": 0},
    "window of several tiles": {"sliding_window": 40, "Lq": 70, "Lk": 110},
    "prefix in window": {"sliding_window": 50, "prefix_in_window": True},
    "padded prefix in window": {
        "sliding_window": 50, "prefix_in_window": True, "padding": "left", "B": 2,
    },
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3},
    "keys in use": {"in_use": (70, 37, 64), "Lk": 80, "B": 3},
    "fewer keys in use than queries": {"in_use": (0, 5, 36), "Lk": 64, "B": 3},
    "keys in use, padded, with a window": {
        "in_use": (40, 90), "Lk": 100, "B": 2, "padding": "left", "sliding_window": 20,
    },
    "keys in use, with a prefix in the window": {
        "in_use": (40, 90, 9), "Lk": 100, "B": 3, "sliding_window": 60, "prefix_in_window": True,
    },
    "keys in use, with a padded prefix in the window": {
        "in_use": (40, 90, 9), "Lk": 100, "B": 3, "sliding_window": 60, "prefix_in_window": True,
        "padding": "left",
    },
    "keys in use behind packed prefixes": {
        "in_use": (40, 0, 64), "Lk": 70, "lengths": (33, 0, 6), "index": (2, -1, 0), "B": 3,
    },
    "smaller value": {"D": 40, "Dv": 24},
    "larger value": {"D": 16, "Dv": 72},
}  # fmt: skip


@pytest.mark.parametrize(
    ("is_causal", "dtype"),
    [(True, torch.float32), (False, torch.bfloat16)],
    ids=["causal fp32", "bidirectional bf16"],
)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, is_causal, dtype):
    shape = {"P": 40, "D": 16, "B": 1, "Hq": 2, "Hkv": 1, **FEATURES[feature]}
    assert_kernels_accurate(tiles(**shape, is_causal=is_causal, dtype=dtype).draw())


@pytest.mark.parametrize(
    "feature",
    [
        "cu_seqlens and packed prefixes",
        "broadcast mask",
        "padded prefix in window",
        "dropout",
        "keys in use, padded, with a window",
    ],
)
@pytest.mark.parametrize(("is_causal", "clamped"), [(True, True), (True, False), (False, True)])
def test_where_whole_tiles_have_no_loop_of_their_own(monkeypatch, feature, is_causal, clamped):
    """As for fp32 on most targets and on RDNA. There rows past the end repeat the last one."""
    monkeypatch.setattr(tilings, "unmasked_loop", lambda pass_name, work: False)
    monkeypatch.setattr(tilings, "repeat_last_row", lambda work: clamped)
    shape = {"P": 40, "D": 16, "B": 1, "Hq": 2, "Hkv": 1, **FEATURES[feature]}
    assert_kernels_accurate(tiles(**shape, is_causal=is_causal).draw())


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
        "prefix_bias": draw(st.sampled_from(["none", "none", "heads", "columns"])),
        "softcap": draw(st.sampled_from([None, None, 1.0, 5.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
    }
    if draw(sometimes):
        call["cu_seqlens"] = (0, *sorted(draw(st.lists(st.integers(0, 40), max_size=3))), 40)
        sequences = len(call["cu_seqlens"]) - 1
    else:
        sequences = call["B"] = draw(st.integers(1, 2))
        call["Lq"] = draw(length)
        call["Lk"] = max(0, call["Lq"] + draw(st.sampled_from([0, 0, 7, 33, -5])))
        call["padding"] = draw(st.sampled_from(["none", "none", "left", "right", "holes", "row"]))
        if draw(sometimes):
            call["in_use"] = draw(st.tuples(*[st.integers(0, call["Lk"])] * sequences))
        if draw(sometimes):
            # both ways to say "do not attend" by a number, as models do
            call["attn_mask"] = draw(st.sampled_from(["bool", "additive", "lowest"]))
            call["broadcast"] = draw(st.tuples(*[st.booleans()] * 4))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.sampled_from([0, 1, 5, 32, 63]), min_size=1, max_size=4))
        index = st.integers(-1, len(lengths) - 1)
        call["lengths"] = tuple(lengths)
        call["index"] = draw(st.tuples(*[index] * sequences))
    else:
        call["P"] = draw(st.sampled_from([0, 1, 32, 63]))
    if draw(sometimes):
        call["sliding_window"] = draw(st.sampled_from([1, 4, 20, 50]))
        call["prefix_in_window"] = draw(st.booleans())
    return call


@settings(max_examples=20)
@given(call=combinations(), seed=st.integers(0, 1000))
def test_combinations(call, seed):
    assert_kernels_accurate(tiles(**call).draw(seed))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=combinations(), seed=st.integers(0, 1000))
def test_outputs_are_written_whole_and_nothing_else_is(poisoned, call, seed):
    drawn = tiles(**call | {"layout": "islands"}).draw(seed)
    buffers = [drawn.tensors[name]._base for name in FIVE] + [drawn.grad_out._base]
    before = [x.clone() for x in buffers]
    for name, result in launched(drawn).items():
        assert not result.isnan().any(), name
    poisoned()
    for buffer, copy in zip(buffers, before, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))
