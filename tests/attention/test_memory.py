"""The prefix is never expanded: no buffer of a prefix per row exists, forward or backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprefix.attention.backends import composed
from fastprefix.attention.backends.composed import chunks
from fastprefix.options import Options
from fastprefix_testing.problems import Problem

B, Hq, Hkv, P, D = 8, 4, 2, 256, 32
EXPANDED = B * Hkv * P * D  # elements of a prefix copied once per row


class LargestBuffer(TorchDispatchMode):
    """Elements of the largest storage that any op of PyTorch returns; views own none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                elements = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, elements)
        return result


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def problem(request):
    return Problem(B=B, Hq=Hq, Hkv=Hkv, Lq=1, Lk=3, P=P, D=D, dtype=request.param).draw()


CAUSAL = Options(is_causal=True, scale=0.2)
ALL_FIVE = (True,) * 5 + (False,) * 2


def test_the_concatenation_shows_in_the_count(problem):
    """The measurement itself: the oracle expands the prefix and must be caught at it."""
    with LargestBuffer() as largest:
        problem.by_concatenation(wanted=())
    assert largest.elements >= EXPANDED


@pytest.mark.parametrize("pad", [False, True])
def test_forward_allocates_no_copies_of_the_prefix(problem, pad):
    mask = torch.ones(B, 3, dtype=torch.bool) if pad else None
    with LargestBuffer() as largest:
        composed.forward(*problem.tensors.values(), CAUSAL._replace(key_padding_mask=mask))
    # One copy of the prefix's size at most, where a row of every sequence would be eight.
    assert largest.elements <= Hkv * P * D


def test_backward_allocates_no_gradient_per_row(problem):
    inputs = problem.tensors.values()
    out, lse = composed.forward(*inputs, CAUSAL)
    with LargestBuffer() as largest:
        composed.backward(problem.grad_out, *inputs, out, lse, CAUSAL, ALL_FIVE)
    assert largest.elements <= Hkv * P * D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("by_scores", [{"softcap": 2.0}, {"dropout_p": 0.1}])
def test_scores_exist_for_one_chunk_at_a_time(by_scores, rows, dtype):
    """Where a softcap or dropout needs them: never for a row, and not more for more rows."""
    L, seed = 512, torch.tensor([1]) if "dropout_p" in by_scores else None
    problem = Problem(B=rows, Hq=Hq, Hkv=Hkv, Lq=L, Lk=L, P=P, D=D, dtype=dtype).draw()
    mask = torch.ones(rows, L, dtype=torch.bool)
    options = CAUSAL._replace(**by_scores, dropout_seed=seed, key_padding_mask=mask)
    inputs = problem.tensors.values()
    with LargestBuffer() as largest:
        out, lse = composed.forward(*inputs, options)
        composed.backward(problem.grad_out, *inputs, out, lse, options, ALL_FIVE)
    a_row = Hq * L * (P + L)
    # a chunk's scores, or the output of all rows
    assert largest.elements <= max(chunks._SCORES, rows * Hq * L * D) < a_row


def test_keys_are_not_repeated_for_the_query_heads():
    """Hq / Hkv = 4 over a long cache: nothing as large as two copies of the keys."""
    problem = Problem(
        B=2, Hq=8, Hkv=2, Lq=1, Lk=512, P=4, D=D, padding="left", is_causal=True
    ).draw()
    options = CAUSAL._replace(key_padding_mask=problem.options["key_padding_mask"])
    inputs, keys = problem.tensors.values(), problem.tensors["key"].numel()
    with LargestBuffer() as largest:
        out, lse = composed.forward(*inputs, options)
        composed.backward(problem.grad_out, *inputs, out, lse, options, ALL_FIVE)
    assert largest.elements < 2 * keys


@pytest.mark.parametrize("by_scores", [{}, {"softcap": 2.0, "dropout_p": 0.1}])
def test_what_is_kept_for_the_backward_has_one_prefix(problem, by_scores):
    """Autograd saves the inputs themselves, the output, the log-sum-exp, a seed: nothing else."""
    from fastprefix import prefix_attention

    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    leaves = [x.requires_grad_() for x in problem.tensors.values()]
    inputs = sum(x.numel() for x in leaves)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = prefix_attention(*leaves, is_causal=True, **by_scores, backend="composed")
    assert sum(saved.values()) <= inputs + out.numel() + B * Hq + len(by_scores) // 2


def test_a_frozen_first_layer_keeps_no_keys_and_values(problem):
    """Where only the prefix learns, the sequence's keys and values are of no use afterwards."""
    from fastprefix import prefix_attention

    saved = set()

    def pack(x):
        saved.add(x.untyped_storage().data_ptr())
        return x

    tensors = problem.tensors
    for name in ("prefix_key", "prefix_value"):
        tensors[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = prefix_attention(*tensors.values(), backend="composed")
    kept = {name for name, x in tensors.items() if x.untyped_storage().data_ptr() in saved}
    assert kept == {"query", "prefix_key", "prefix_value"}
    out.backward(problem.grad_out)
    alone = problem.by("composed", ("prefix_key", "prefix_value"))
    for name in ("prefix_key", "prefix_value"):
        torch.testing.assert_close(tensors[name].grad, alone[name])
