"""What the kernels touch, allocate and skip; in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix.options import Options

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)

SHAPES = [
    {"Lq": 33, "Lk": 47, "P": 31, "D": 24, "padding": "holes"},
    {"Lq": 1, "Lk": 65, "P": 33, "D": 16, "is_causal": False, "padding": "holes"},
    {"Lq": 32, "Lk": 32, "P": 32, "D": 32, "Hq": 2},
]


class Allocations(TorchDispatchMode):
    """The shapes of all the tensors that operators create."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" in str(function) or "zeros" in str(function) or "clone" in str(function):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_element_is_written_and_nothing_else(problem, run, poisoned, shape):
    case = problem(**shape, layout="islands")
    inputs, grad_out, options = case.operands()
    buffers = [x._base for x in (*inputs, grad_out)]
    before = [x.clone() for x in buffers]
    results = [x for x in run(case, inputs, grad_out, options) if x is not None]
    for result in results:
        assert not result.isnan().any()
    assert len(poisoned()) >= len(results)
    for buffer, copy in zip(buffers, before, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_mask_neighbours_are_not_read(problem, run):
    case = problem(Hq=2, Hkv=1, Lq=20, Lk=45, P=3, D=16, padding="holes")
    inputs, grad_out, options = case.operands()
    mask = options.pop("key_padding_mask")
    results = []
    for sea in (False, True):
        around = torch.full((case.B + 2, case.Lk + 70), sea)
        view = around[1:-1, 3 : 3 + case.Lk]
        masked = options | {"key_padding_mask": view.copy_(mask)}
        results.append(run(case, inputs, grad_out, masked))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_gradients_that_are_not_needed_are_not_computed(problem, run):
    from fastprefix.kernels import launch_backward

    case = problem(B=1, Hq=2, Hkv=1, Lq=20, Lk=33, P=33, D=16)
    inputs, grad_out, options = case.operands()
    out, lse, *grads = run(case, inputs, grad_out, options)
    for wanted in range(5):
        needs = tuple(i == wanted for i in range(7))
        some = launch_backward(grad_out, *inputs, out, lse, Options(**options), needs)
        for i, (x, y) in enumerate(zip(some, grads, strict=True)):
            assert torch.equal(x, y) if i == wanted else x is None


def test_prefix_gradient_is_deterministic(problem, run):
    case = problem(B=3, Hq=2, Hkv=1, Lq=40, Lk=20, P=33, D=16, is_causal=False)
    operands = case.operands()
    first, second = (run(case, *operands) for _ in range(2))
    for x, y in zip(first[:7], second[:7], strict=True):
        assert torch.equal(x, y)


def test_no_buffer_grows_with_batch_times_prefix(problem, run):
    from fastprefix.kernels import launch

    seen = []
    for B in (2, 8):
        case = problem(B=B, Hq=2, Hkv=1, Lq=40, Lk=20, P=130, D=16)
        operands = case.operands()
        # the launchers allocate, the kernels need not run
        with launch.collected(launch.target_of(operands[1].device)) as steps, Allocations() as made:
            run(case, *operands)
        assert steps
        own = {(B, 2, 40, 16), (B, 2, 40), (B, 1, 20, 16), (0,)}
        seen.append({shape for shape in made.shapes if shape not in own})
    assert seen[0] == seen[1]
    # 4 stand-in multiprocessors and 5 tiles of the prefix: ceil(2 * 4 / 5) = 2 partial sums.
    assert seen[0] == {(1, 130, 16), (2, 1, 130, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 2, 9, 8)}, "value has shape"),
        ({"query": torch.zeros(2, 3, 5, 8)}, "not a multiple"),
        ({"value": torch.zeros(2, 2, 7, 8).half()}, "value is torch.float16"),
        ({"prefix_value": torch.zeros(2, 4, 8)}, "prefix_value has shape"),
        ({"options": Options(True, 1.0, torch.ones(2, 7))}, "must be bool"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_operands_that_do_not_fit_are_refused(change, message):
    from fastprefix.kernels import launch_forward

    operands = {
        "query": torch.zeros(2, 4, 5, 8),
        "key": torch.zeros(2, 2, 7, 8),
        "value": torch.zeros(2, 2, 7, 8),
        "prefix_key": torch.zeros(2, 3, 8),
        "prefix_value": torch.zeros(2, 3, 8),
        "options": Options(is_causal=True, scale=1.0),
    }
    with pytest.raises(ValueError, match=message):
        launch_forward(**(operands | change))
