"""Problems for the kernels, the rule that judges a result, and buffers that catch stray accesses.

Tests cannot import each other in pytest's importlib mode, so all of this reaches them as fixtures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastprefix.attention.backends import reference
from fastprefix.attention.call import Options

if os.environ.get("TRITON_INTERPRET") == "1":
    from fastprefix.kernels import prefix_attention_backward, prefix_attention_forward

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value")
EVERYTHING = (True, True, True, True, True, False, False)
GUARD = 12345.0


@dataclass(frozen=True)
class Problem:
    """Shapes and options of one call. padding: none, left, right, holes or row (one all-masked)."""

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    Lq: int = 37
    Lk: int = 37
    P: int = 63
    D: int = 64
    dtype: torch.dtype = torch.float32
    is_causal: bool = True
    padding: str = "none"
    scale: float = 0.3
    layout: str = "dense"

    def mask(self) -> Tensor | None:
        """The key padding mask [B, Lk], True = real."""
        if self.padding == "none":
            return None
        position = torch.arange(self.Lk)[None, :]
        length = torch.randint(0, self.Lk + 1, (self.B, 1))
        if self.padding == "left":
            return position >= length
        if self.padding == "right":
            return position < length
        mask = torch.rand(self.B, self.Lk) > 0.4
        if self.padding == "row":
            mask[0] = False
        return mask

    def operands(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The five inputs, the gradient of the output, and the mask."""
        shapes = [
            (self.B, self.Hq, self.Lq, self.D),
            (self.B, self.Hkv, self.Lk, self.D),
            (self.B, self.Hkv, self.Lk, self.D),
            (self.Hkv, self.P, self.D),
            (self.Hkv, self.P, self.D),
            (self.B, self.Hq, self.Lq, self.D),
        ]
        *inputs, grad_out = (arrange(shape, self.dtype, self.layout) for shape in shapes)
        return inputs, grad_out, self.mask()


def arrange(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Random numbers: dense; with positions before heads; or inside a larger buffer of NaN."""
    if layout == "transposed":
        swapped = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        return torch.randn(swapped, dtype=torch.float64).to(dtype).transpose(-3, -2)
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "strided":
        # The last dimension strided too, and an offset.
        return torch.stack([values, values], dim=-1).flatten(-2)[..., 1::2]
    if layout == "islands":
        return island(values, float("nan"))
    return values


def island(values: Tensor, sea: float | bool) -> Tensor:
    """The values as a view of a larger buffer filled with `sea`, so on every side of every row."""
    buffer = torch.full([n + 3 for n in values.shape], sea, dtype=values.dtype)
    view = buffer[tuple(slice(2, 2 + n) for n in values.shape)]
    return view.copy_(values)


def exact(
    problem: Problem,
    inputs: list[Tensor],
    grad_out: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """out, lse and the five gradients of the reference in a dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    options = Options(problem.is_causal, problem.scale, key_padding_mask=mask)
    out, lse = reference.forward(*leaves, options)
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype))
    return [out.detach(), lse.detach(), *grads]


def ours(
    problem: Problem, inputs: list[Tensor], grad_out: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """out, lse and the five gradients of the kernels."""
    rule = {"is_causal": problem.is_causal, "scale": problem.scale, "key_padding_mask": mask}
    out, lse = prefix_attention_forward(*inputs, **rule)
    grads = prefix_attention_backward(grad_out, *inputs, out, lse, **rule, needs=EVERYTHING)
    return [out, lse, *grads[:5]]


@pytest.fixture
def problem() -> type[Problem]:
    """The class of problems."""
    return Problem


@pytest.fixture
def run() -> Callable[..., list[Tensor]]:
    """Forward and backward of the kernels on given operands."""
    return ours


@pytest.fixture
def agree() -> Callable[[Problem], None]:
    """Compare the kernels with float64.

    Our error may be twice that of the same maths in plain PyTorch and the same dtype, plus a few
    roundings of the largest element: with one or two keys plain PyTorch cancels exactly, or is
    lucky, where every fused backward takes delta from an `out` already rounded to the dtype.
    """

    def check(problem: Problem) -> None:
        inputs, grad_out, mask = problem.operands()
        found = ours(problem, inputs, grad_out, mask)
        truth = exact(problem, inputs, grad_out, mask, torch.float64)
        plain = exact(problem, inputs, grad_out, mask, problem.dtype)
        for name, x, t, p in zip(NAMES, found, truth, plain, strict=True):
            assert x.shape == t.shape, name
            assert x.dtype == (torch.float32 if name == "lse" else problem.dtype), name
            nothing = t.isinf()
            assert torch.equal(x.isinf(), nothing), name
            if not t.numel() or nothing.all():
                continue
            x, t, p = (y.double().masked_fill(nothing, 0.0) for y in (x, t, p))
            half = name != "lse" and problem.dtype != torch.float32
            unit = 2 * torch.finfo(problem.dtype).eps if half else 8 * torch.finfo(torch.float).eps
            allowed = 2 * (p - t).abs().max() + unit * t.abs().max().clamp(min=1.0)
            error = (x - t).abs().max()
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"

    return check


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """torch.empty hands out NaN between two guards; the fixture's value checks all the guards."""
    handed: list[tuple[Tensor, Tensor]] = []

    def empty(*size: int | tuple[int, ...], **options: torch.dtype) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        numel = int(torch.Size(shape).numel())  # type: ignore[arg-type]
        whole = torch.full((numel + 512,), GUARD, **options)  # type: ignore[call-overload]
        inside = whole[256 : 256 + numel].view(shape)
        if inside.is_floating_point():
            inside.fill_(float("nan"))
        handed.append((whole, inside))
        return inside

    monkeypatch.setattr(torch, "empty", empty)

    def check() -> list[tuple[Tensor, Tensor]]:
        for whole, inside in handed:
            expected = torch.full((), GUARD, dtype=whole.dtype)
            assert (whole[:256] == expected).all(), f"wrote before {tuple(inside.shape)}"
            assert (whole[-256:] == expected).all(), f"wrote past {tuple(inside.shape)}"
        return handed

    return check
