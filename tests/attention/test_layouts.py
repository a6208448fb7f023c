"""Results depend on numbers, not on strides, nor on which gradients are asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastprefix_testing.calls import assert_as_concatenated
from fastprefix_testing.problems import Problem


def blhd(x: Tensor) -> Tensor:
    """[B, H, L, D] in the memory order of a model's projections."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def sliced(x: Tensor) -> Tensor:
    """Part of a larger buffer: an offset and gaps in the last two dimensions."""
    buffer = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), float("nan"))
    buffer = buffer.to(x.dtype)
    buffer[..., 2:-1, 4:-1] = x
    return buffer[..., 2:-1, 4:-1]


def last_strided(x: Tensor) -> Tensor:
    """Every second element of the last dimension, NaN in between."""
    buffer = torch.full((*x.shape, 2), float("nan")).to(x.dtype)
    buffer[..., 1] = x
    return buffer[..., 1]


def reversed_dims(x: Tensor) -> Tensor:
    """The last dimension has the largest stride, the first the smallest."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


LAYOUTS = {f.__name__: f for f in (blhd, sliced, last_strided, reversed_dims)}
OPTIONS = {"Lq": 5, "Lk": 9, "P": 6, "padding": "left", "is_causal": True}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_gradient(backend, layout, dtype):
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("the interpreter is slow, and other cases of it remain")
    plain = Problem(**OPTIONS, dtype=dtype).draw()
    tensors = {name: layout(x) for name, x in plain.tensors.items()}
    strided = replace(plain, tensors=tensors, grad_out=layout(plain.grad_out))
    assert_as_concatenated(strided, strided.by(backend))


@pytest.mark.parametrize("name", ["query", "key", "value", "prefix_key", "prefix_value"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_strided_input_among_contiguous_ones(backend, name, is_causal):
    if backend == "triton" and not is_causal:
        pytest.skip("the interpreter is slow, and other cases of it remain")
    plain = Problem(Lq=5, P=6, is_causal=is_causal).draw()
    tensors = {**plain.tensors, name: last_strided(plain.tensors[name])}
    strided = replace(plain, tensors=tensors)
    assert_as_concatenated(strided, strided.by(backend))


@pytest.mark.parametrize("is_causal", [False, True])
def test_expanded_inputs(backend, is_causal):
    """Stride 0 over the batch, and over the heads of the prefix."""
    plain = Problem(B=3, Lq=5, P=6, is_causal=is_causal).draw()
    tensors = {n: x[:1].expand_as(x) for n, x in plain.tensors.items()}
    expanded = replace(plain, tensors=tensors)
    assert_as_concatenated(expanded, expanded.by(backend))


@pytest.mark.parametrize("is_causal", [False, True])
def test_expanded_gradient(backend, is_causal):
    """What `out.sum().backward()` sends: one number with strides of zero."""
    plain = Problem(Lq=5, P=6, is_causal=is_causal).draw()
    summed = replace(plain, grad_out=torch.ones(()).expand_as(plain.grad_out))
    assert_as_concatenated(summed, summed.by(backend))


def test_one_tensor_in_two_places(backend):
    """Keys that are also the values, as in K = V architectures, get both gradients."""
    problem = Problem(Lq=5, P=6, is_causal=True).draw()
    problem.tensors["value"] = problem.tensors["key"]
    separate = problem.by(backend)

    def tied(query, key, prefix_key, prefix_value, **options):
        from fastprefix import prefix_attention

        return prefix_attention(
            query, key, key, prefix_key, prefix_value, **options, return_lse=True, backend=backend
        )

    del problem.tensors["value"]
    together = problem.solve(tied)
    torch.testing.assert_close(together["key"], separate["key"] + separate["value"])


def test_padding_mask_with_strides(backend):
    plain = Problem(**OPTIONS).draw()
    mask = plain.options["key_padding_mask"]
    strided = torch.zeros(mask.shape[1], 2 * mask.shape[0], dtype=torch.bool).t()[::2]
    strided.copy_(mask)
    problem = replace(plain, options={**plain.options, "key_padding_mask": strided})
    assert_as_concatenated(problem, problem.by(backend))


NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
SUBSETS = [c for n in range(5) for c in itertools.combinations(NAMES, n)]


def test_each_subset_of_gradients(backend):
    """Asking for fewer gradients changes neither the output nor the gradients that remain."""
    problem = Problem(B=2, Hq=2, Hkv=1, Lq=2, Lk=4, P=3, is_causal=True, padding="left").draw()
    full = problem.by(backend)
    # The interpreter is slow. Triton gets the empty set, each single one, and all but one.
    for wanted in SUBSETS if backend != "triton" else SUBSETS[:6] + SUBSETS[-5:]:
        got = problem.by(backend, wanted)
        assert set(got) == {"out", "lse", *wanted}
        for name, result in got.items():
            torch.testing.assert_close(result, full[name], msg=f"{name} with {wanted}")


@pytest.mark.parametrize("wanted", ["prefix_value", "key"])
@pytest.mark.parametrize("shape", [{"P": 0}, {"P": None}, {"Lk": 0, "Lq": 3}])
def test_single_gradient_without_the_other_part(backend, wanted, shape):
    problem = Problem(**{"Hkv": 1, "P": 4, **shape}).draw()
    if problem.tensors[wanted] is None:
        pytest.skip("without a prefix there is nothing to ask for")
    got = problem.by(backend, (wanted,))
    torch.testing.assert_close(got[wanted], problem.by(backend)[wanted])


def test_two_runs_are_equal_bit_for_bit(backend):
    problem = Problem(**OPTIONS).draw()
    first, second = problem.by(backend), problem.by(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_are_not_changed(backend):
    problem = Problem(**OPTIONS).draw()
    kept = {name: x.clone() for name, x in problem.tensors.items()}
    problem.by(backend)
    assert all(torch.equal(problem.tensors[name], kept[name]) for name in kept)


def test_output_lies_in_memory_as_a_projection_reads_it(fused_backend):
    """[B, Hq, Lq, D] whose transpose to [B, Lq, Hq, D] is contiguous: no copy before `o_proj`."""
    got = Problem().draw().by(fused_backend)
    assert all(got[n].transpose(1, 2).is_contiguous() for n in ("out", "query", "key", "value"))
