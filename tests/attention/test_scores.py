"""Calls with a softcap or with dropout on the composed backend: by the scores of chunks.

Reference computes the same with the weights that composed drops.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastprefix import prefix_attention
from fastprefix.attention.backends import composed
from fastprefix.attention.backends.composed import chunks
from fastprefix.options import Options
from fastprefix_testing import calls as feature_calls
from fastprefix_testing.calls import assert_as_reference, kept_by_composed
from fastprefix_testing.problems import Problem

SCORES = ("softcap", "dropout_p")


def cut(size, queries):
    """Chunks of another size, so that calls of a test are cut as the long ones of users are."""
    return mock.patch.multiple(chunks, _SCORES=size, _QUERIES=queries)


def dropping(share=0.3, seed=1, **fields):
    """A call that drops weights."""
    return Problem(**fields, dropout_p=share).draw(seed)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    drawn=feature_calls.drawn("composed"),
    by_scores=st.sampled_from([{"softcap"}, {"dropout_p"}, set(SCORES)]),
    size=st.sampled_from([1, 60, 500, 1 << 18]),
    queries=st.sampled_from([1, 3, 32]),
    dtype=st.sampled_from(
        [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]
    ),
)
def test_is_reference_in_any_combination_and_in_any_cut(drawn, by_scores, size, queries, dtype):
    features = (drawn["features"] - set(SCORES)) | by_scores
    call = feature_calls.build(**{**drawn, "features": features}, dtype=dtype)
    with cut(size, queries):
        assert_as_reference(call, "composed", gradient_floor=4.0)  # like that of the kernels


@pytest.mark.parametrize("size", [1, 1 << 18])
@pytest.mark.parametrize("features", [{"softcap"}, {"dropout_p"}, set(SCORES) | {"sinks"}])
def test_any_gradient_by_itself(features, size):
    """The weights that are dropped do not depend on which gradients are needed."""
    call = feature_calls.build(features=features | {"prefix_bias [Hq]"}, dtype=torch.float32)
    with cut(size, 2):
        whole = call.by("composed")
        for name in call.tensors:
            alone = call.by("composed", wanted=(name,))
            torch.testing.assert_close(alone[name], whole[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_no_scores(dtype):
    call = dropping(softcap=2.0, dtype=dtype)
    expected = call.by("composed")
    with torch.autocast("cpu", torch.bfloat16):
        got = call.by("composed")
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


SEVERAL = {"B": 5, "Hq": 6, "Hkv": 3, "Lq": 70, "Lk": 70, "P": 50}  # more than one chunk


class TestDropout:
    """Which weights are dropped."""

    def kept(self, share=0.3, seed=1, **fields):
        return kept_by_composed(dropping(share, seed, **{**SEVERAL, **fields}))

    @pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
    def test_the_share_of_what_is_dropped(self, share):
        kept = self.kept(share)
        assert kept.shape == (5, 6, 70, 120)
        error = abs(kept.double().mean().item() - (1 - share))
        assert error < 4 * (share * (1 - share) / kept.numel()) ** 0.5

    @pytest.mark.parametrize("size", [2000, 1 << 18])
    def test_rows_heads_queries_and_columns_are_independent(self, size):
        """Neighbours in each direction drop together as often as chance has it."""
        with cut(size, 8):
            kept = self.kept().double() - 0.7
        for dim in range(4):
            for step in (1, 2):
                one = kept.narrow(dim, 0, kept.shape[dim] - step)
                other = kept.narrow(dim, step, kept.shape[dim] - step)
                correlation = (one * other).mean().item() / 0.21
                assert abs(correlation) < 4 / one.numel() ** 0.5, (dim, step)

    def test_another_seed_drops_others(self):
        one, other = self.kept(seed=1).double() - 0.7, self.kept(seed=2).double() - 0.7
        assert abs((one * other).mean().item() / 0.21) < 4 / one.numel() ** 0.5
        assert torch.equal(self.kept(seed=1).double() - 0.7, one)

    def test_does_not_depend_on_the_number_of_threads(self):
        call = dropping(**SEVERAL)
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append((kept_by_composed(call), call.by("composed")))
        finally:
            torch.set_num_threads(before)
        for kept, results in found[1:]:
            assert torch.equal(kept, found[0][0])
            torch.testing.assert_close(results, found[0][1], rtol=1e-4, atol=1e-4)

    def test_leaves_the_default_generator_alone(self):
        """The call draws its seed, and nothing else."""
        tensors = [x.requires_grad_() for x in dropping().tensors.values()]
        torch.manual_seed(3)
        torch.randint(2**63 - 1, (1,))
        expected = torch.random.get_rng_state()
        torch.manual_seed(3)
        prefix_attention(*tensors, dropout_p=0.3).sum().backward()
        assert torch.equal(torch.random.get_rng_state(), expected)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_drops_the_same(self, use_reentrant):
        """In chunks, and with another call in between that draws, too."""
        call, found = dropping(**SEVERAL), []

        def twice(query, *others):
            once = prefix_attention(query, *others, dropout_p=0.3)
            return prefix_attention(once, *others, dropout_p=0.5, softcap=3.0)

        for again in (False, True):
            leaves = [x.detach().requires_grad_() for x in call.tensors.values()]
            torch.manual_seed(4)
            out = (
                checkpoint(twice, *leaves, use_reentrant=use_reentrant) if again else twice(*leaves)
            )
            torch.manual_seed(9)
            out.backward(call.grad_out)
            found.append([out.detach(), *(x.grad for x in leaves)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def test_a_mean_over_many_masks_is_the_attention_without_dropout():
    call = Problem(B=1, Hq=2, Hkv=1, Lq=3, Lk=3, P=4, D=8).draw()
    expected = call.by("composed", ())["out"]
    repeated = {
        name: call.tensors[name].expand(4000, -1, -1, -1) for name in ("query", "key", "value")
    }
    torch.manual_seed(0)
    got = prefix_attention(**{**call.tensors, **repeated}, dropout_p=0.4)
    error, spread = (got.mean(0) - expected[0]).abs(), got.std(0) / 4000**0.5
    assert (error < 5 * spread).all()


@pytest.mark.parametrize("fields", [{"is_causal": True, "Lk": 9}, {"padding": "left"}, {"P": None}])
def test_a_vanishing_share_and_a_vast_cap_change_nothing(fields):
    """The two ways of composed agree where they compute the same."""
    call = Problem(**fields).draw()
    flash = call.by("composed")
    for options in ({"dropout_p": 1e-12}, {"softcap": 1e6}):
        found = call.changed(**options).by("composed")
        torch.testing.assert_close(found, flash, rtol=1e-4, atol=1e-5)


def test_keys_beyond_the_causal_future_and_the_window_are_not_computed():
    query, prefix = torch.zeros(2, 4, 100, 8), torch.zeros(2, 7, 8)
    options = Options(is_causal=True, scale=1.0, sliding_window=20, softcap=1.0)
    with cut(1, 10):
        found = list(chunks.chunks(query, query[:, :2], prefix, options))
    assert len(found) == 20
    for chunk in found:
        first, stop = chunk.queries.start, chunk.queries.stop
        assert (chunk.keys.start, chunk.keys.stop) == (max(0, first - 19), stop)


def test_every_query_is_in_one_chunk():
    query = torch.zeros(6, 4, 50, 8)
    options = Options(
        is_causal=False, scale=1.0, softcap=1.0, prefix_lengths=torch.tensor([3, 0, 5]),
        prefix_index=torch.tensor([2, 0, -1, 2, 1, 0]),
        key_lengths=torch.tensor([9, 9, 9, 0, 9, 4]),
    )  # fmt: skip
    counted = torch.zeros(6, 50)
    with cut(200, 4):
        for chunk in chunks.chunks(query, query, torch.zeros(4, 8, 8), options):
            counted[chunk.rows, chunk.queries] += 1
    assert (counted == 1).all()


def test_a_batch_without_anything():
    for fields in ({"B": 0}, {"Lq": 0, "Lk": 4}, {"P": 0, "Lk": 0}, {"P": None, "Lk": 0}):
        found = Problem(**fields, softcap=1.0, dropout_p=0.5).draw().by("composed")
        assert not found["out"].any()
        assert not found["query"].any()


def test_what_composed_returns_lies_in_memory_as_models_want_it():
    call = dropping(softcap=2.0)
    options = Options(
        is_causal=False, scale=0.3, softcap=2.0, dropout_p=0.3, dropout_seed=torch.tensor([7])
    )
    inputs = call.tensors.values()
    out, lse = composed.forward(*inputs, options)
    needs = (True,) * 5 + (False,) * 2
    grads = composed.backward(call.grad_out, *inputs, out, lse, options, needs)
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *grads[:3]))
    assert grads[5] is grads[6] is None
