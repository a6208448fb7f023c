"""Decode in two launches, against the concatenation in float64."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprefix.kernels import decode, decode_kernels, launch, launch_spans
from fastprefix.kernels.decode import decode_forward
from fastprefix.kernels.problem import make_problem
from fastprefix.kernels.target import Target
from fastprefix.options import Options
from fastprefix_testing.launchers import HALF, HEADS, interpreted, judge, operands
from fastprefix_testing.problems import Problem, decoding

pytestmark = interpreted


def agree(problem: Problem, seed: int = 0, **options: bool) -> None:
    call = problem.draw(seed)
    inputs, rule = operands(call)
    found = decode_forward(*inputs, Options(**rule, **options))
    judge(call, found)
    if "key_padding_mask" in rule:  # what leaves padding out is another code
        spans = launch_spans(rule["key_padding_mask"])
        told = decode_forward(*inputs, Options(**rule, **options, spans=spans))
        assert all(map(torch.equal, told, found))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_dtypes(heads, dtype):
    Hq, Hkv = HEADS[heads]
    agree(decoding(Hq=Hq, Hkv=Hkv, dtype=dtype, D=32, Dv=32))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("Lq", [1, 3, 16, 64])
@pytest.mark.parametrize("lengths", [None, (33, 0, 1, 40)], ids=["shared", "packed"])
def test_query_lengths(Lq, lengths, is_causal):
    agree(decoding(Lq=Lq, lengths=lengths, is_causal=is_causal))


def test_more_rows_than_a_sequence_tile():
    agree(decoding(B=2, Hq=5, Hkv=1, Lq=16, Lk=70, lengths=(40, 20), index=(1, 0)))


@pytest.mark.parametrize(
    "index",
    [(3, 0, 3, 2, 1), (-1, 3, -1, 0, 0), (2,) * 5, (-1,) * 5, (1,) * 5],
    ids=str,
)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_packed_prefixes(index, batch_invariant):
    case = decoding(B=5, Lk=9, lengths=(33, 0, 1, 150, 40), index=index)
    agree(case, batch_invariant=batch_invariant)


@pytest.mark.parametrize("P", [0, 1, 64, 300])
@pytest.mark.parametrize("Lk", [0, 1, 64, 200])
def test_prefix_and_sequence_lengths(P, Lk):
    agree(decoding(B=1, P=P, Lk=Lk))


@pytest.mark.parametrize("padding", ["left", "right", "holes", "row"])
@pytest.mark.parametrize(("batch_invariant", "P"), [(False, 5), (True, 0)])
def test_padding(padding, P, batch_invariant, monkeypatch):
    monkeypatch.setattr(decode_kernels, "SCAN", tl.constexpr(32))  # several steps of a scan
    case = decoding(B=3, Lq=3, Lk=140, P=P, padding=padding)
    agree(case, batch_invariant=batch_invariant)


@pytest.mark.parametrize(
    ("is_causal", "padding", "batch_invariant"),
    # any two of the three in every combination
    [(True, "none", False), (True, "left", True), (False, "left", False), (False, "none", True)],
)
@pytest.mark.parametrize("window", [1, 20, 75, 2**31 - 1])
def test_sliding_window(window, is_causal, padding, batch_invariant):
    case = decoding(Lq=3, Lk=150, P=0, padding=padding, sliding_window=window, is_causal=is_causal)
    agree(case, batch_invariant=batch_invariant)


@pytest.mark.parametrize("window", [None, 1, 75])
@pytest.mark.parametrize(
    ("Lq", "padding", "batch_invariant"),
    [(1, "none", False), (3, "left", False), (3, "left", True)],
)
def test_keys_in_use(Lq, padding, batch_invariant, window):
    """None, fewer than a tile, several splits, and all; with more splits than tiles."""
    case = decoding(
        B=5, Lq=Lq, Lk=300, P=20, padding=padding, sliding_window=window,
        in_use=(0, 3, 17, 130, 300),
    )  # fmt: skip
    agree(case, batch_invariant=batch_invariant)


def test_keys_in_use_are_shared_out_among_all_splits(monkeypatch):
    """Whatever the length of the buffer, no split has more than its share of what is in use."""
    inputs, rule = operands(decoding(B=1, Hq=1, P=0, Lk=2048, in_use=(256,)).draw())
    target = Target("interpreter", 64)
    monkeypatch.setattr(launch, "target_of", lambda device: target)
    problem = make_problem(*inputs, Options(**rule))
    plan = decode.decode_plan(decode.shape_of_problem(problem), target)
    splits = plan.grid.sequence_splits
    assert splits > 8
    part_out, part_lse = torch.zeros(plan.grid.partial_rows, 16), torch.zeros(splits)
    out, lse = torch.empty(1, 1, 1, 16), torch.empty(1, 1, 1)
    decode.decode_launches(problem, plan, part_out, part_lse, out, lse)[0].run()
    used = int((part_lse > -math.inf).sum())
    assert used == min(splits, 256 // plan.grid.tile.keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", ["softcap", "sinks", "prefix_bias", "all"])
def test_features(feature, dtype):
    given = {"softcap": 2.0, "sinks": True, "prefix_bias": "heads"}
    chosen = given if feature == "all" else {feature: given[feature]}
    agree(decoding(Lq=2, lengths=(40, 0, 9), index=(0, -1), dtype=dtype, padding="row", **chosen))


def test_bias_that_hides_the_prefix():
    call = decoding(prefix_bias="heads", padding="row", sinks=True).draw()
    inputs, rule = operands(call)
    rule["prefix_bias"][1::2] = -1e30
    out, lse = decode_forward(*inputs, Options(**rule))
    judge(call, (out, lse))
    # Row 0 has only padding: where the prefix is hidden, the sink is all there is.
    assert not out[0, 1::2].any()
    torch.testing.assert_close(lse[0, 1::2, 0], rule["sinks"][1::2])


@pytest.mark.parametrize("sizes", [(1, 3), (72, 40), (80, 128), (192, 128)], ids=str)
def test_head_sizes(sizes):
    agree(decoding(B=2, Lk=40, P=33, D=sizes[0], Dv=sizes[1], dtype=torch.float16))


@pytest.mark.parametrize("layout", ["transposed", "strided", "islands"])
def test_layouts(layout):
    agree(decoding(D=24, Dv=40, layout=layout, padding="right", lengths=(37, 21)))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 30.0])
def test_scales(scale):
    agree(decoding(scale=scale, padding="holes", dtype=torch.bfloat16))


@pytest.mark.parametrize("empty", ["B", "Lq"])
def test_no_queries(empty):
    call = decoding(**{empty: 0}).draw()
    inputs, rule = operands(call)
    out, lse = decode_forward(*inputs, Options(**rule))
    assert out.shape == inputs[0].shape
    assert lse.shape == inputs[0].shape[:3]


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_prefixes_without_a_token(lengths):
    agree(decoding(lengths=lengths, index=(-1, -1)))


@settings(max_examples=20)
@given(data=st.data())
def test_random_problems(data):
    draw = data.draw
    seed = draw(st.integers(0, 1000))
    B, (Hkv, group) = draw(st.integers(1, 3)), draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    lengths = draw(st.none() | st.lists(st.integers(0, 50), max_size=4).map(tuple))
    Lk = draw(st.integers(0, 80))
    case = decoding(
        B=B,
        Hq=Hkv * group,
        Hkv=Hkv,
        Lq=draw(st.integers(1, 16)),
        Lk=Lk,
        in_use=draw(st.none() | st.tuples(*[st.integers(0, Lk)] * B)),
        P=draw(st.integers(0, 80)),
        lengths=lengths,
        D=draw(st.sampled_from([3, 16, 24])),
        Dv=draw(st.sampled_from([5, 16, 40])),
        dtype=draw(st.sampled_from([torch.float32, *HALF])),
        is_causal=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "left", "right", "holes", "row"])),
        sliding_window=draw(st.none() | st.integers(1, 100)),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=draw(st.booleans()),
        prefix_bias=draw(st.sampled_from(["none", "heads"])),
        layout=draw(st.sampled_from(["dense", "transposed", "islands"])),
    )
    agree(case, seed, batch_invariant=draw(st.booleans()))
