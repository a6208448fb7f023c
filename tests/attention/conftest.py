"""Random problems for the operator, and an oracle that shares no code with the library.

The oracle does what the contract promises in the most literal way: it copies the prefix to every
row, concatenates, repeats the key/value heads, writes the mask out and calls torch.softmax. Tests
cannot import each other in pytest's importlib mode, so all of this reaches them as fixtures.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix import prefix_attention

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")

# Added to twice the error of plain PyTorch, in units of the dtype's epsilon at the largest exact
# value (at least 1): where plain PyTorch is right by luck (one key, a power of two), rounding of
# inputs, products and result still costs the others a few units. float64 has no better yardstick
# than itself, so it gets the room that another order of summation needs.
FLOOR = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}

# Error allowed in a float32 log-sum-exp of 16-bit inputs: PyTorch's own CPU flash kernel
# approximates exp for those, to about 6e-5.
LSE_OF_HALF = 1e-4


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the concatenation, in the query's dtype; output and natural log-sum-exp."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1:3]
    P = 0
    if prefix_key is not None and prefix_value is not None:
        P = prefix_key.shape[1]
        key = torch.cat([prefix_key.expand(B, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.expand(B, -1, -1, -1), value], dim=2)
    key = key.repeat_interleave(Hq // Hkv, dim=1)
    value = value.repeat_interleave(Hq // Hkv, dim=1)

    sees = torch.ones(B, Hq, Lq, P + Lk, dtype=torch.bool)
    if is_causal:
        newest = torch.arange(Lq)[:, None] + (Lk - Lq)
        sees[..., P:] &= torch.arange(Lk)[None, :] <= newest
    if key_padding_mask is not None:
        sees[..., P:] &= key_padding_mask[:, None, None, :]
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(D) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        sees[..., P:] &= attn_mask
    elif attn_mask is not None:
        bias = torch.zeros(B, Hq, Lq, P + Lk, dtype=scores.dtype)
        bias[..., P:] = attn_mask
        sees &= bias > float("-inf")
        scores = scores + bias.masked_fill(~sees, 0.0)
    lse = scores.detach().masked_fill(~sees, float("-inf")).logsumexp(-1)
    # A softmax over nothing is NaN: let such rows see everything, then take their weights away.
    some = sees.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~sees & some, float("-inf")), dim=-1)
    return (weights * some) @ value, lse


@dataclass(frozen=True)
class Problem:
    """One call of the operator: its five tensors, its options and a gradient for its output."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    grad_out: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; strides are not kept."""
        tensors = {n: None if t is None else t.to(dtype) for n, t in self.tensors.items()}
        return replace(self, tensors=tensors, grad_out=self.grad_out.to(dtype))

    def solve(
        self, function: Callable[..., Any], wanted: tuple[str, ...] = NAMES
    ) -> dict[str, Tensor]:
        """`out`, `lse` and, by the inputs' names, the wanted gradients."""
        inputs = {n: None if t is None else t.detach() for n, t in self.tensors.items()}
        leaves = {n: t.requires_grad_() for n, t in inputs.items() if t is not None and n in wanted}
        out, lse = function(*inputs.values(), **self.options)
        found = {"out": out.detach(), "lse": lse}
        if leaves:
            grads = torch.autograd.grad(out, list(leaves.values()), self.grad_out)
            found.update(zip(leaves, grads, strict=True))
        return found

    def by(self, backend: str, wanted: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
        """What a backend of the library makes of the problem."""

        def function(*args: Any, **options: Any) -> Any:
            return prefix_attention(*args, **options, return_lse=True, backend=backend)

        return self.solve(function, wanted)


def padding(pattern: str, B: int, Lk: int) -> Tensor | None:
    """A key padding mask, True = real token, of row-dependent lengths."""
    if pattern == "none":
        return None
    if pattern in ("left", "right"):
        pads = torch.arange(B) * (Lk // 2) // max(1, B - 1)  # row 0: none; the last row: half
        real = torch.arange(Lk)[None, :] >= pads[:, None]
        return real if pattern == "left" else real.flip(1)
    real = torch.rand(B, Lk) < 0.6
    if pattern == "one row":
        real[0] = False
    return real


def make_problem(
    *,
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 2,
    Lq: int = 7,
    Lk: int | None = None,
    P: int | None = 5,
    D: int = 16,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    pad: str = "none",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Problem:
    """Contiguous random tensors; P None for no prefix at all."""
    Lk = Lq if Lk is None else Lk
    Dv = D if Dv is None else Dv
    shapes = {
        "query": (B, Hq, Lq, D),
        "key": (B, Hkv, Lk, D),
        "value": (B, Hkv, Lk, Dv),
        "prefix_key": None if P is None else (Hkv, P, D),
        "prefix_value": None if P is None else (Hkv, P, Dv),
    }
    tensors = {n: None if s is None else torch.randn(s, dtype=dtype) for n, s in shapes.items()}
    options = {
        "key_padding_mask": padding(pad, B, Lk),
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": scale,
    }
    return Problem(tensors, options, torch.randn(B, Hq, Lq, Dv, dtype=dtype))


def assert_accurate(problem: Problem, got: dict[str, Tensor]) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus a floor.

    Every backend keeps its scores in float32, so its log-sum-exp of 16-bit inputs is held to
    float32's error and not to theirs.
    """
    dtype = problem.grad_out.dtype
    wide = torch.promote_types(dtype, torch.float32)
    exact = problem.to(torch.float64).solve(plain_attention)
    plain = problem.solve(plain_attention)
    assert got.keys() <= exact.keys()
    for name, result in got.items():
        assert result.shape == exact[name].shape, name
        assert result.dtype == (wide if name == "lse" else dtype), name
        if name == "lse" and dtype != wide:
            torch.testing.assert_close(result.double(), exact[name], rtol=0, atol=LSE_OF_HALF)
        else:
            assert_within(name, result, exact[name], plain[name])


def assert_within(
    name: str, result: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype | None = None
) -> None:
    """The rule of :func:`assert_accurate` for one tensor, in `plain`'s dtype if none is given."""
    dtype = plain.dtype if dtype is None else dtype
    nothing = exact == float("-inf")  # only in the lse, where a row sees nothing
    assert torch.equal(result == float("-inf"), nothing), f"{name}: -inf in other places"
    if not exact.numel():
        return
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    result, exact, plain = (t.double().masked_fill(nothing, 0.0) for t in (result, exact, plain))
    error = (result - exact).abs().max().item()
    limit = 2 * (plain - exact).abs().max().item() + floor * max(1.0, exact.abs().max().item())
    assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g}"  # NaN fails too


def assert_as_reference(call: Any, backend: str) -> None:
    """A backend's results of a call of ``calls.py`` under the rule of :func:`assert_accurate`.

    The exact ones are those of reference in float64, and plain PyTorch is reference in the same
    dtype.
    """
    dtype = call.grad_out.dtype
    wide = torch.promote_types(dtype, torch.float32)
    exact, plain = call.to(torch.float64).by("reference"), call.by("reference")
    for name, result in call.by(backend).items():
        assert result.shape == exact[name].shape, name
        assert result.dtype == plain[name].dtype, name
        assert torch.isfinite(result).all() or name == "lse", name
        if name == "lse" and dtype != wide:
            torch.testing.assert_close(result.double(), exact[name], rtol=0, atol=LSE_OF_HALF)
        else:
            assert_within(name, result, exact[name], plain[name], wide if name == "lse" else dtype)


@pytest.fixture(params=["reference", "composed", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend by name."""
    return usable(request.param)


@pytest.fixture(params=["reference", "composed"])
def masking_backend(request: pytest.FixtureRequest) -> str:
    """The backends that take attn_mask, D != Dv and float64."""
    return request.param


@pytest.fixture(params=["composed", "triton"])
def fused_backend(request: pytest.FixtureRequest) -> str:
    """The backends that run as a registered op."""
    return usable(request.param)


@pytest.fixture
def triton() -> str:
    """The triton backend alone, for tests that give it cases of its own."""
    return usable("triton")


def usable(backend: str) -> str:
    """Skips where Triton, or its interpreter, is not at hand."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        if os.environ["TRITON_INTERPRET"] != "1":
            pytest.skip("the CPU runs Triton in its interpreter only")
    return backend


# Session scope, so that hypothesis lets its tests use them too.
@pytest.fixture(scope="session", name="make_problem")
def _make_problem() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture(scope="session", name="plain_attention")
def _plain_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    return plain_attention


@pytest.fixture(scope="session", name="assert_as_reference")
def _assert_as_reference() -> Callable[..., None]:
    return assert_as_reference


@pytest.fixture(scope="session", name="assert_accurate")
def _assert_accurate() -> Callable[..., None]:
    return assert_accurate
