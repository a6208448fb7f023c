"""What the layers of one forward launch together, on a simulated GPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import simulated_gpu
from fastprefix import prefix_attention
from fastprefix.attention.api import attention_with_options
from fastprefix.attention.step import Step
from fastprefix.kernels import launch_forward
from fastprefix_testing.launcher_calls import PACKED, SEVERAL, Call, causal_call
from fastprefix_testing.simulated import inside, outside, run_inside


@outside
def test_on_a_simulated_gpu():
    run_inside(__file__)


def layers(call: Call, count: int) -> None:
    """The operator as the layers of a model call it in one step; with gradients their backward."""
    step, outs = Step(), []
    for _ in range(count):
        out, _ = attention_with_options(*call.five, call.options, "triton", step)
        outs.append(out)
    if outs[0].requires_grad:
        torch.autograd.grad(outs, list(call.five), [torch.empty_like(out) for out in outs])


LONG = tuple({name: x.long() for name, x in given.items()} for given in (SEVERAL, PACKED))
# Launches of a layer, and PyTorch's kernels: autograd adds the gradients of the layers up.
STEPS: dict[str, tuple[dict[str, Any], bool, int, dict[str, int]]] = {
    "decode": ({"Lq": 1, "Lk": 256, "P": 4096, **SEVERAL}, False, 2, {}),
    "decode, int64": ({"Lq": 1, "Lk": 256, "P": 4096, **LONG[0]}, False, 2, {}),
    "prefill": ({"Lq": 64, "Lk": 64, "P": 4096, **SEVERAL}, False, 1, {}),
    "training": ({"Lq": 64, "Lk": 64, "P": 4096, **SEVERAL}, True, 1 + 6, {"add": 5}),
    "training, packed sequences": (
        {"B": 1, "Lq": 64, "Lk": 64, "P": 128, **PACKED},
        True,
        1 + 6,
        {"add": 5},
    ),
    "training, packed sequences, int64": (
        {"B": 1, "Lq": 64, "Lk": 64, "P": 128, **LONG[1]},
        True,
        1 + 6,
        {"add": 5},
    ),
}


@inside
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("shape", "learns", "launches", "kernels"), STEPS.values(), ids=STEPS)
def test_what_a_step_runs(driver, shape, learns, launches, kernels, inference):
    """Its first layer has the values checked and the tables made; the others run nothing more."""
    call = causal_call(**shape)
    if learns:
        if inference:
            pytest.skip("nothing learns in inference mode")
        for x in call.five:
            x.requires_grad_()
    layers(call, 1)
    found = []
    for count in (1, 4):
        with torch.inference_mode(inference), simulated_gpu.counting(driver) as counts:
            layers(call, count)
        names = [each.name for each in counts.launches]
        assert names.count("prefix_attn_tables_kernel") == 1
        assert len(names) == 1 + count * launches
        assert not counts.loaded
        assert not counts.outliving
        found.append(counts.kernels)
    assert found[1] - found[0] == {name: 3 * each for name, each in kernels.items()}


PADDED: dict[str, tuple[dict[str, Any], bool, int, dict[str, int]]] = {
    "decode": ({"Lq": 1, "Lk": 256, "P": 4096, "pad": True}, False, 2, {}),
    "decode, keys in use": (
        {"Lq": 1, "Lk": 256, "P": 4096, "pad": True, "in_use": 200}, False, 2, {},
    ),
    "training": ({"Lq": 64, "Lk": 64, "P": 4096, "pad": True}, True, 2 + 6, {"add": 5}),
}  # fmt: skip


@inside
@pytest.mark.parametrize(("shape", "learns", "launches", "kernels"), PADDED.values(), ids=PADDED)
def test_a_step_looks_for_padding_once(driver, shape, learns, launches, kernels):
    call = causal_call(**shape)
    for x in call.five if learns else ():
        x.requires_grad_()
    with torch.set_grad_enabled(learns):
        layers(call, 2)
        found = []
        for count in (1, 4):
            with simulated_gpu.counting(driver) as counts:
                layers(call, count)
            names = [each.name for each in counts.launches]
            assert names[0] == "prefix_attn_spans_kernel"
            assert len(names) == 1 + count * launches
            assert not counts.loaded
            assert not counts.outliving
            found.append(counts.kernels)
        assert found[1] - found[0] == {name: 3 * each for name, each in kernels.items()}


@inside
def test_a_captured_call_makes_its_tables_itself(driver):
    """So every replay of a graph makes them anew, and two graphs share nothing."""
    call = causal_call(Lq=1, Lk=256, P=4096, **SEVERAL)
    for _ in range(3):
        with simulated_gpu.counting(driver) as counts:
            launch_forward(*call.five, call.options)
        assert counts.launches[0].name == "prefix_attn_tables_kernel"
        assert not counts.outliving


def living() -> set[int]:
    """The tensors that are alive, by id."""
    gc.collect()
    return {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}


@inside
@pytest.mark.parametrize(
    "shape",
    [
        {"Lq": 1, "Lk": 256, "P": 4096, **SEVERAL},
        {"B": 1, "Lq": 64, "Lk": 64, "P": 128, **PACKED},
    ],
    ids=["decode, several prefixes", "packed sequences"],
)
def test_no_tensor_outlives_a_compiled_call(driver, shape):
    """A tensor that stayed in the memory pool of CUDA graphs would be an error of their trees."""
    call = causal_call(**shape)
    asked = ("prefix_index", "prefix_lengths", "cu_seqlens")
    given = {name: getattr(call.options, name) for name in asked}

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend() -> torch.Tensor:
        return prefix_attention(*call.five, **given, is_causal=True, backend="triton")

    with torch.no_grad():
        attend()
        before = living()
        out = attend()
        assert living() - before <= {id(out)}
