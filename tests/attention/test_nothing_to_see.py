"""Rows, batches and sequences that are empty: zeros and -inf, never NaN, never a crash."""

from __future__ import annotations

import pytest
import torch

from fastprefix_testing.calls import assert_as_concatenated
from fastprefix_testing.problems import Problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("P", [None, 0])
def test_rows_that_see_nothing(backend, dtype, is_causal, P):
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("the interpreter is slow, and other cases of it remain")
    problem = Problem(B=3, P=P, is_causal=is_causal, dtype=dtype).draw()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1] = False
    problem.options["key_padding_mask"] = mask
    got = problem.by(backend)
    for name in ("out", "query", "key", "value"):
        assert not got[name][1].any(), f"{name}: not zero"
        assert got[name].isfinite().all(), f"{name}: not finite"
        assert got[name][0].any(), f"{name}: zero in a row that sees keys"
    assert (got["lse"][1] == float("-inf")).all()
    assert got["lse"][[0, 2]].isfinite().all()


def test_left_padding_and_causality_blind_the_first_queries(backend):
    """Queries at padded positions see nothing either: no key lies before them."""
    problem = Problem(B=1, P=None, is_causal=True).draw()
    problem.options["key_padding_mask"] = torch.arange(7)[None, :] >= 3
    got = problem.by(backend)
    for name in ("out", "query"):
        assert not got[name][:, :, :3].any(), name
        assert got[name].isfinite().all(), name
    assert torch.equal(got["lse"].isfinite(), torch.arange(7).ge(3).expand(1, 4, 7))


def test_rows_that_see_nothing_but_the_prefix(backend):
    problem = Problem(B=3, padding="row", P=5).draw()
    got = problem.by(backend)
    assert_as_concatenated(problem, got)
    assert got["out"][0].any()
    assert not got["key"][0].any()


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("pad", ["none", "left"])
def test_rows_blinded_by_attn_mask(masking_backend, kind, pad):
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[2] = False
    if kind == "-inf":
        mask = torch.zeros(7, 7).masked_fill(~mask, float("-inf"))
    problem = Problem(P=0, padding=pad).draw().changed(attn_mask=mask)
    got = problem.by(masking_backend)
    assert_as_concatenated(problem, got)
    assert not got["out"][:, :, 2].any()
    assert (got["lse"][:, :, 2] == float("-inf")).all()


EMPTY = {
    "no rows": {"B": 0},
    "no rows, no prefix": {"B": 0, "P": None},
    "no queries": {"Lq": 0, "Lk": 4},
    "no queries, no keys": {"Lq": 0, "Lk": 0},
    "no keys": {"Lq": 3, "Lk": 0},
    "no keys, one query": {"Lq": 1, "Lk": 0, "P": 1},
    "no keys, empty prefix": {"Lq": 3, "Lk": 0, "P": 0},
    "no keys, no prefix": {"Lq": 3, "Lk": 0, "P": None},
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_sizes(backend, shape, masked):
    problem = Problem(**shape).draw()
    B, _, Lk, _ = problem.tensors["key"].shape
    if masked:
        problem.options["key_padding_mask"] = torch.ones(B, Lk, dtype=torch.bool)
    assert_as_concatenated(problem, problem.by(backend))


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_empty_sizes_with_attn_mask(masking_backend, shape):
    problem = Problem(**shape).draw()
    Lq, Lk = problem.tensors["query"].shape[2], problem.tensors["key"].shape[2]
    problem.options["attn_mask"] = torch.ones(Lq, Lk, dtype=torch.bool)
    assert_as_concatenated(problem, problem.by(masking_backend))


def test_no_prefix_is_an_empty_prefix(backend):
    none = Problem(P=None, is_causal=True).draw()
    empty = Problem(P=0, is_causal=True).draw()
    empty.tensors.update({n: none.tensors[n] for n in ("query", "key", "value")})
    names = ("query", "key", "value")
    empty = empty.changed(grad_out=none.grad_out)
    torch.testing.assert_close(none.by(backend, names), empty.by(backend, names))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unseen_prefix_of_an_empty_batch_gets_zeros(backend, dtype):
    got = Problem(B=0, dtype=dtype).draw().by(backend)
    for name in ("prefix_key", "prefix_value"):
        assert got[name].shape == (2, 5, 16)
        assert not got[name].any()
