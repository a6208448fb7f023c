"""What the kernels touch, allocate and skip; in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix.kernels import launch, launch_backward, launch_forward
from fastprefix.options import Options
from fastprefix_testing.launchers import interpreted, launched, operands
from fastprefix_testing.problems import tiles

pytestmark = interpreted

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
def test_every_output_element_is_written_and_nothing_else(poisoned, shape):
    call = tiles(**shape, layout="islands").draw()
    buffers = [x._base for x in (*call.tensors.values(), call.grad_out)]
    before = [x.clone() for x in buffers]
    found = launched(call)
    for name, result in found.items():
        assert not result.isnan().any(), name
    assert len(poisoned()) >= len(found)
    for buffer, copy in zip(buffers, before, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_mask_neighbours_are_not_read():
    call = tiles(Hq=2, Hkv=1, Lq=20, Lk=45, P=3, D=16, padding="holes").draw()
    mask = call.options["key_padding_mask"]
    B, Lk = mask.shape
    results = []
    for sea in (False, True):
        around = torch.full((B + 2, Lk + 70), sea)
        view = around[1:-1, 3 : 3 + Lk]
        results.append(launched(call.changed(key_padding_mask=view.copy_(mask))))
    for name, result in results[0].items():
        assert torch.equal(result, results[1][name]), name


def test_gradients_that_are_not_needed_are_not_computed():
    call = tiles(B=1, Hq=2, Hkv=1, Lq=20, Lk=33, P=33, D=16).draw()
    inputs, options = operands(call)
    found = launched(call)
    out, lse = found.pop("out"), found.pop("lse")
    for wanted in range(5):
        needs = tuple(i == wanted for i in range(7))
        some = launch_backward(call.grad_out, *inputs, out, lse, Options(**options), needs)
        assert torch.equal(some[wanted], list(found.values())[wanted])
        assert [x is not None for x in some] == list(needs)


def test_prefix_gradient_is_deterministic():
    call = tiles(B=3, Hq=2, Hkv=1, Lq=40, Lk=20, P=33, D=16, is_causal=False).draw()
    first, second = launched(call), launched(call)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_no_buffer_grows_with_batch_times_prefix():
    seen = []
    for B in (2, 8):
        call = tiles(B=B, Hq=2, Hkv=1, Lq=40, Lk=20, P=130, D=16).draw()
        # the launchers allocate, the kernels need not run
        target = launch.target_of(call.grad_out.device)
        with launch.collected(target) as steps, Allocations() as made:
            launched(call)
        assert steps
        own = {(B, 40, 2, 16), (B, 2, 40), (B, 20, 1, 16), (B, 2, 40, 16), (0,)}
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


@pytest.mark.parametrize("Lq", [1, 5, 40])
def test_results_lie_in_memory_with_positions_before_heads(Lq):
    """[B, L, H, D], whatever the layout of the query is."""
    call = tiles(B=3, Hq=4, Hkv=2, Lq=Lq, Lk=40, P=130, D=16, Dv=24).draw()
    target = launch.target_of(call.grad_out.device)
    with launch.collected(target):  # no kernel need run
        found = launched(call)
    for name in ("out", "query", "key", "value"):
        _, H, L, D = found[name].shape
        assert found[name].stride() == (L * H * D, D, H * D, 1), name
