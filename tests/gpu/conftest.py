"""The device of the GPU suite, its problems, and the rule that judges a result.

`make gpu`, or `pytest -m gpu`. Without a device every test skips itself and says why.
FASTPREFIX_GPU_SUITE_ON=cpu tries the suite's own code in Triton's interpreter, without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix import prefix_attention
from fastprefix.attention.selection import interpreting

INPUTS = ("query", "key", "value", "prefix_key", "prefix_value")
LEARNED = (*INPUTS, "sinks", "prefix_bias")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A CUDA or ROCm device with compiled kernels, or a skipped test."""
    if os.environ.get("FASTPREFIX_GPU_SUITE_ON") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device; this machine has none")
    if interpreting():
        pytest.skip("Triton's interpreter is on; `make gpu` or `pytest -m gpu` turn it off")
    return torch.device("cuda")


@dataclass(frozen=True)
class Problem:
    """Shapes of one call; `arguments` are the keyword arguments of its feature."""

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
    backend: str, tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
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
        if n in LEARNED and not (n == "prefix_bias" and x.dim() > 1)
    }
    torch.manual_seed(7)  # the same dropout mask every time
    out, lse = prefix_attention(**(options | cast), return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), tensors["grad_out"].to(dtype))
    return {"out": out.detach(), "lse": lse} | dict(zip(leaves, grads, strict=True))


@pytest.fixture
def problem(device: torch.device) -> Callable[..., Problem]:
    """Makes problems on the device; in the interpreter small ones."""
    small = {"Hq": 4, "Lq": 40, "Lk": 40, "P": 35, "D": 16, "Dv": 16}

    def make(**changes: Any) -> Problem:
        return Problem(device=device, **((small if device.type == "cpu" else {}) | changes))

    return make


@pytest.fixture
def agree() -> Callable[[Problem, dict[str, Any]], None]:
    """Compare the kernels with the reference in float64.

    The error may be twice that of the reference in the same dtype, plus a few roundings of the
    largest element.
    """

    def check(problem: Problem, options: dict[str, Any]) -> None:
        tensors = problem.tensors()
        options = {"is_causal": problem.is_causal} | options
        found = solve("triton", tensors, options, problem.dtype)
        truth = solve("reference", tensors, options, torch.float64)
        plain = solve("reference", tensors, options, problem.dtype)
        assert found.keys() == truth.keys()
        for name, exact in truth.items():
            result, expected = found[name], plain[name]
            assert result.shape == exact.shape, name
            nothing = exact.isinf()
            assert torch.equal(result.isinf(), nothing), f"{name}: -inf in other places"
            result, exact, expected = (
                x.double().masked_fill(nothing, 0.0) for x in (result, exact, expected)
            )
            half = name != "lse" and problem.dtype != torch.float32
            unit = 2 * torch.finfo(problem.dtype).eps if half else 8 * torch.finfo(torch.float).eps
            allowed = 2 * (expected - exact).abs().max() + unit * exact.abs().max().clamp(min=1.0)
            error = (result - exact).abs().max()
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"

    return check
