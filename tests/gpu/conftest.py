"""The device of the GPU suite, its problems, and the rule that judges a result.

`make gpu-here`, or `pytest -m gpu`. Without a device every test skips itself and says why.
FASTPREFIX_GPU_SUITE_ON names another place to run the tests:

- cpu: Triton's interpreter, which tries the suite's own code;
- sm_90 or another architecture of NVIDIA: a simulated device. It compiles every kernel that the
  tests launch and runs none, so nothing is judged there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from device.records import (
    LOST,
    NO_TIME,
    SUITE_ON,
    device_is_lost,
    earlier,
    seconds_left,
    write,
)
from fastprefix import prefix_attention
from fastprefix.attention.selection import interpreting
from fastprefix_testing.tolerance import assert_accurate

HERE = Path(__file__).parent
INPUTS = ("query", "key", "value", "prefix_key", "prefix_value")
LEARNED = (*INPUTS, "sinks", "prefix_bias")
PLACE = os.environ.get(SUITE_ON, "")
SIMULATED = PLACE not in ("", "cpu")


@pytest.fixture(scope="session", autouse=True)
def loaded() -> Iterator[Any]:
    """The kernels that were looked up or compiled; None where nothing is compiled."""
    if interpreting() or not (SIMULATED or torch.cuda.is_available()):
        yield None
        return
    from device.kernels import LOADED

    if SIMULATED:
        from device.simulation import simulate

        simulate(PLACE)
    LOADED.listen()
    yield LOADED


@pytest.fixture(scope="session")
def device(loaded: Any) -> torch.device:
    """A CUDA or ROCm device with compiled kernels, or a skipped test."""
    if PLACE:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device; this machine has none")
    if interpreting():
        pytest.skip("Triton's interpreter is on; `make gpu-here` or `pytest -m gpu` turn it off")
    return torch.device("cuda")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """A real device, or a skipped test."""
    if device.type != "cuda":
        pytest.skip("needs a real device")
    return device


@pytest.fixture
def real(device: torch.device) -> Callable[[], None]:
    """Called where a test has launched what it launches: the rest needs results that are right."""

    def skip_if_simulated() -> None:
        if SIMULATED:
            pytest.skip("simulated: kernels compiled, nothing judged")

    return skip_if_simulated


@dataclass(frozen=True)
class Problem:
    """Shapes of one call; the options of its feature come beside it."""

    B: int = 3
    Hq: int = 8
    Hkv: int = 2
    Lq: int = 150
    Lk: int = 150
    P: int = 130
    D: int = 64
    Dv: int = 64
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def random(self, *shape: int) -> Tensor:
        """Random numbers in the problem's dtype."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The five inputs, and a gradient for the output."""
        return {
            "query": self.random(self.B, self.Hq, self.Lq, self.D),
            "key": self.random(self.B, self.Hkv, self.Lk, self.D),
            "value": self.random(self.B, self.Hkv, self.Lk, self.Dv),
            "prefix_key": self.random(self.Hkv, self.P, self.D),
            "prefix_value": self.random(self.Hkv, self.P, self.Dv),
            "grad_out": self.random(self.B, self.Hq, self.Lq, self.Dv),
        }


def solve(
    backend: str, tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype,
    gradients: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """out, lse and every gradient; floating-point operands are cast to `dtype` first."""
    given = tensors | {n: x for n, x in options.items() if isinstance(x, Tensor)}
    cast = {
        n: x.detach().to(dtype) if x.is_floating_point() else x
        for n, x in given.items()
        if n != "grad_out"
    }
    # per-column biases and masks take no gradient
    leaves = {
        n: x.requires_grad_()
        for n, x in cast.items()
        if gradients and n in LEARNED and not (n == "prefix_bias" and x.dim() > 1)
    }
    torch.manual_seed(7)  # the same dropout mask every time
    out, lse = prefix_attention(**(options | cast), return_lse=True, backend=backend)
    found = {"out": out.detach(), "lse": lse}
    if gradients:
        grads = torch.autograd.grad(out, list(leaves.values()), tensors["grad_out"].to(dtype))
        found |= dict(zip(leaves, grads, strict=True))
    return found


@pytest.fixture
def problem(device: torch.device) -> Callable[..., Problem]:
    """Makes problems on the device; in the interpreter small ones."""
    small = {"Hq": 4, "Lq": 40, "Lk": 40, "P": 35, "D": 16, "Dv": 16}

    def make(**changes: Any) -> Problem:
        return Problem(device=device, **((small if PLACE == "cpu" else {}) | changes))

    return make


@pytest.fixture
def agree(real: Callable[[], None]) -> Callable[..., None]:
    """Compare the kernels with the reference in float64."""

    def check(problem: Problem, options: dict[str, Any], gradients: bool = True) -> None:
        tensors = problem.tensors()
        options = {"is_causal": problem.is_causal} | options
        found = solve("triton", tensors, options, problem.dtype, gradients)
        real()
        exact = {n: x for n, x in options.items() if n != "batch_invariant"}
        truth = solve("reference", tensors, exact, torch.float64, gradients)
        plain = solve("reference", tensors, exact, problem.dtype, gradients)
        assert found.keys() == truth.keys()
        assert_accurate(found, truth, plain, problem.dtype, gradient_floor=4.0)

    return check


# What `benchmarks/gpu.py` reads: a line for every test, written when the test ends.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what an earlier process of the same stage finished, or died in."""
    before = earlier()
    over = {*before.done, *before.died}
    items[:] = [x for x in items if HERE not in x.path.parents or _name(x) not in over]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Lists the tests, so that those which never ran can be named."""
    if getattr(session.config, "workerinput", {}).get("workerid", "gw0") == "gw0":
        names = [_name(item) for item in session.items if HERE in item.path.parents]
        write({"planned": names})


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what the time does not allow."""
    if HERE not in item.path.parents:
        return
    write({"started": _name(item)})
    if seconds_left() < 0:
        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Records a test that ended, with the kernels that it compiled."""
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        line = {"name": _name(item), "outcome": report.outcome, "seconds": round(call.duration, 3)}
        if report.outcome != "passed":
            why = report.longrepr
            line["why"] = why[2] if isinstance(why, tuple) else str(call.excinfo.value)[:1000]
        loaded = getattr(item, "funcargs", {}).get("loaded")
        if loaded is not None:
            line |= loaded.take()
        write(line)
        if report.outcome == "failed" and not PLACE and device_is_lost():
            write({"lost": _name(item)})
            os._exit(LOST)  # nothing works in this process any more; another one goes on
    return report


def _name(item: pytest.Item) -> str:
    return f"{item.path.stem}::{item.name}"
