"""A shape of the operator, its tensors, and the result in float64 that every side is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprefix.attention import prefix_attention

TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4}


@dataclass(frozen=True)
class Shape:
    """One row: what is computed, and on what.

    Attributes:
        work: decode, prefill, or train (forward and backward).
        L: length of the text: in the cache for decode, new tokens otherwise.
        flex: whether FlexAttention is timed too, whose compilation takes long.
    """

    work: str
    B: int
    Hq: int
    Hkv: int
    P: int
    L: int
    D: int = 128
    dtype: str = "bfloat16"
    flex: bool = False

    @property
    def label(self) -> str:
        """As tables write it."""
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"Hq{self.Hq} Hkv{self.Hkv}"
        return f"{self.work} B{self.B} {heads} D{self.D} P{self.P} text {self.L}"

    @property
    def Lq(self) -> int:  # noqa: N802
        """Number of queries of a sequence."""
        return 1 if self.work == "decode" else self.L

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2


class Problem:
    """One set of tensors: a layer's of a model.

    Attributes:
        inputs: query, key, value, prefix_key, prefix_value; leaves of autograd when training.
        grad_out: gradient of the output.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0) -> None:
        """Random numbers; the same seed gives the same."""
        s, self.shape = shape, shape
        self.train = s.work == "train"
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, s.dtype)

        def random(*size: int) -> Tensor:
            found = torch.randn(size, device=device, generator=generator).to(dtype)
            return found.requires_grad_(self.train)

        self.query = random(s.B, s.Hq, s.Lq, s.D)
        self.key, self.value = random(s.B, s.Hkv, s.L, s.D), random(s.B, s.Hkv, s.L, s.D)
        self.prefix_key, self.prefix_value = random(s.Hkv, s.P, s.D), random(s.Hkv, s.P, s.D)
        self.inputs = [self.query, self.key, self.value, self.prefix_key, self.prefix_value]
        self.grad_out = torch.randn(
            self.query.shape, device=device, generator=generator, dtype=torch.float32
        ).to(dtype)
        self._expanded: tuple[Tensor, Tensor] | None = None

    def expand(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, P + L, D] with a copy of the prefix in each row.

        Made once where a cache holds them; made anew when training, where they are part of a step.
        """
        if self._expanded is not None:
            return self._expanded
        B = self.shape.B
        found = (
            torch.cat([self.prefix_key.expand(B, -1, -1, -1), self.key], dim=2),
            torch.cat([self.prefix_value.expand(B, -1, -1, -1), self.value], dim=2),
        )
        if not self.train:
            self._expanded = found
        return found

    def one_copy(self) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hkv, P + B L, D]: the prefix once, then the rows end to end."""
        found = []
        for prefix, own in ((self.prefix_key, self.key), (self.prefix_value, self.value)):
            rows = own.transpose(0, 1).reshape(own.shape[1], -1, own.shape[3])
            found.append(torch.cat([prefix, rows], dim=1)[None])
        return found[0], found[1]

    def finish(self, out: Tensor) -> list[Tensor]:
        """The output [B, Hq, Lq, D], and when training the gradients of the inputs."""
        if not self.train:
            return [out]
        return [out, *torch.autograd.grad(out, self.inputs, self.grad_out)]

    def exact(self) -> list[Tensor]:
        """What :meth:`finish` returns, by the reference in float64, row by row."""
        prefix = [x.detach().double().requires_grad_(self.train) for x in self.inputs[3:]]
        total: list[list[Tensor]] = []
        for b in range(self.shape.B):
            row = [
                x.detach()[b : b + 1].double().requires_grad_(self.train) for x in self.inputs[:3]
            ]
            out = prefix_attention(*row, *prefix, is_causal=True, backend="reference")
            found = [out.detach()]
            if self.train:
                grad_out = self.grad_out[b : b + 1].double()
                found += torch.autograd.grad(out, [*row, *prefix], grad_out)
            total.append(found)
        # the output and the gradients of the rows' own tensors side by side, the prefix's summed
        return [
            torch.cat(parts) if place < 4 else torch.stack(parts).sum(0)
            for place, parts in enumerate(zip(*total, strict=True))
        ]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error, norm by norm, of the results of a side."""
    if len(found) != len(exact):
        raise RuntimeError(f"{len(found)} results, expected {len(exact)}")
    errors = []
    for got, want in zip(found, exact, strict=True):
        if got.shape != want.shape:
            raise RuntimeError(f"got shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        norm = (got.detach().double() - want).norm() / want.norm()
        errors.append(float(norm) if bool(torch.isfinite(norm)) else float("inf"))
    return max(errors)
