"""Problems for the kernels, the rule that judges a result, and buffers that catch stray accesses.

Tests cannot import each other in pytest's importlib mode, so all of this reaches them as fixtures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix.attention.backends import reference
from fastprefix.options import Options

if os.environ.get("TRITON_INTERPRET") == "1":
    from fastprefix.kernels import launch_backward, launch_forward

NAMES = (
    "out", "lse", "dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value", "dsinks",
    "dprefix_bias",
)  # fmt: skip
GUARD = 12345.0


@dataclass(frozen=True)
class Problem:
    """Shapes and options of one call.

    padding: none, left, right, holes or row (one all-masked). lengths, index: several prefixes, P
    is then the sum of their lengths. boundaries: of packed sequences, B is then 1. mask: the kind,
    and which of its four dimensions are broadcast. bias: none, heads or columns.
    """

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
    Dv: int | None = None
    lengths: tuple[int, ...] | None = None
    index: tuple[int, ...] | None = None
    boundaries: tuple[int, ...] | None = None
    mask: tuple[str, tuple[bool, bool, bool, bool]] | None = None
    sinks: bool = False
    bias: str = "none"
    sliding_window: int | None = None
    prefix_in_window: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0

    def options(self) -> dict[str, Any]:
        """The launchers' keywords, those left out that the problem does not use."""

        def integers(values: tuple[int, ...] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.int32)

        shapes = {"heads": (self.Hq,), "columns": (self.Hq, self.Lq, self.P)}
        bias = shapes.get(self.bias)
        found = {
            "key_padding_mask": self.key_padding_mask(),
            "attn_mask": self.attn_mask(),
            "prefix_lengths": integers(self.lengths),
            "prefix_index": integers(self.index),
            "cu_seqlens": integers(self.boundaries),
            "sinks": arrange((self.Hq,), self.dtype, "dense") if self.sinks else None,
            "prefix_bias": None if bias is None else arrange(bias, self.dtype, "dense"),
            "sliding_window": self.sliding_window,
            "prefix_in_window": self.prefix_in_window or None,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p or None,
            "dropout_seed": torch.randint(2**63 - 1, (1,)) if self.dropout_p else None,
        }
        found = {name: value for name, value in found.items() if value is not None}
        return {"is_causal": self.is_causal, "scale": self.scale, **found}

    def attn_mask(self) -> Tensor | None:
        """A bool or additive mask, some of whose entries hide their key."""
        if self.mask is None:
            return None
        kind, broadcast = self.mask
        sizes = zip((self.B, self.Hq, self.Lq, self.Lk), broadcast, strict=True)
        shape = tuple(1 if once else size for size, once in sizes)
        hidden = torch.rand(shape) < 0.2
        if kind == "bool":
            return ~hidden
        # both ways to say "do not attend", as models do
        lowest = float("-inf") if torch.rand(()) < 0.5 else torch.finfo(self.dtype).min
        return arrange(shape, self.dtype, "dense").masked_fill(hidden, lowest)

    def key_padding_mask(self) -> Tensor | None:
        """[B, Lk], True = real."""
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

    def operands(self) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
        """The five inputs, the gradient of the output, and the options."""
        Dv = self.Dv or self.D
        shapes = [
            (self.B, self.Hq, self.Lq, self.D),
            (self.B, self.Hkv, self.Lk, self.D),
            (self.B, self.Hkv, self.Lk, Dv),
            (self.Hkv, self.P, self.D),
            (self.Hkv, self.P, Dv),
            (self.B, self.Hq, self.Lq, Dv),
        ]
        *inputs, grad_out = (arrange(shape, self.dtype, self.layout) for shape in shapes)
        return inputs, grad_out, self.options()


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
    inputs: list[Tensor], grad_out: Tensor, options: dict[str, Any], dtype: torch.dtype
) -> list[Tensor | None]:
    """out, lse and the seven gradients of the reference's maths in a dtype, rounded all the way."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    chosen = dict(options)
    learned = learnable(options)
    for name in ("sinks", "prefix_bias", "attn_mask"):
        if name in options and options[name].is_floating_point():
            chosen[name] = options[name].to(dtype)
    for name in learned:
        leaves.append(chosen[name].requires_grad_())
    # not `forward`, which computes in float32: kernels are held to these roundings too
    out, lse = reference._attend(*leaves[:5], Options(**chosen))
    lse = lse.to(torch.promote_types(dtype, torch.float32))
    grads: list[Tensor | None] = [torch.zeros_like(x) for x in leaves]
    if out.requires_grad:
        grads = list(torch.autograd.grad(out, leaves, grad_out.to(dtype), materialize_grads=True))
    found = dict(zip(learned, grads[5:], strict=True))
    return [
        out.detach(), lse.detach(), *grads[:5], found.get("sinks"), found.get("prefix_bias")
    ]  # fmt: skip


def learnable(options: dict[str, Any]) -> list[str]:
    """The options that get a gradient."""
    names = ("sinks", "prefix_bias")
    return [name for name in names if name in options and options[name].dim() == 1]


def ours(
    problem: Problem, inputs: list[Tensor], grad_out: Tensor, options: dict[str, Any]
) -> list[Tensor | None]:
    """out, lse and the seven gradients of the kernels."""
    learned = learnable(options)
    needs = (*[True] * 5, "sinks" in learned, "prefix_bias" in learned)
    out, lse = launch_forward(*inputs, Options(**options))
    grads = launch_backward(grad_out, *inputs, out, lse, Options(**options), needs)
    return [out, lse, *grads]


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
        inputs, grad_out, options = problem.operands()
        found = ours(problem, inputs, grad_out, options)
        truth = exact(inputs, grad_out, options, torch.float64)
        plain = exact(inputs, grad_out, options, problem.dtype)
        for name, x, t, p in zip(NAMES, found, truth, plain, strict=True):
            if x is None or t is None or p is None:
                assert x is t is p is None, name
                continue
            assert x.shape == t.shape, name
            assert x.dtype == (torch.float32 if name == "lse" else problem.dtype), name
            nothing = t.isinf()
            assert torch.equal(x.isinf(), nothing), name
            if not t.numel() or nothing.all():
                continue
            x, t, p = (y.double().masked_fill(nothing, 0.0) for y in (x, t, p))
            half = name != "lse" and problem.dtype != torch.float32
            unit = 2 * torch.finfo(problem.dtype).eps if half else 8 * torch.finfo(torch.float).eps
            # what cancels in dS, where little is left of it, was a few units large
            allowed = 2 * (p - t).abs().max() + unit * t.abs().max().clamp(min=4.0)
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
