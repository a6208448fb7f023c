"""Suite ``operator``: one call of attention over a shared prefix; prefill, decode, backward.

Keys that a cache holds are expanded before the clock starts; keys that a training step makes are
expanded inside it. Every result, gradients included, is compared with the reference in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprefix.bench.case import OURS, Case, Work, timed
from fastprefix.bench.peers import SIDES, Side, by_backend, reference, triton
from fastprefix.bench.problem import TOLERANCE, Problem, Shape

BACKENDS = {
    OURS: Side(by_backend("auto"), False, "prefix_attention, its own choice of a backend"),
    "fastprefix triton": Side(triton, False, "prefix_attention, backend triton"),
    "fastprefix composed": Side(by_backend("composed"), False, "prefix_attention, composed"),
    "fastprefix reference": Side(reference, False, "prefix_attention, reference"),
}
PROVIDERS = {
    **BACKENDS,
    **{name: side for name, side in SIDES.items() if name not in ("ours", "composed")},
}
WORKS = {"decode": "decode", "prefill": "prefill", "train": "backward"}


@dataclass(frozen=True)
class OperatorCase(Case):
    """A shape.

    Attributes:
        shape: what is computed; its work train is a forward and a backward.
    """

    suite: ClassVar[str] = "operator"
    figures: ClassVar[dict[str, str]] = {"ms": "ms a call"}

    shape: Shape

    @property
    def label(self) -> str:
        """As tables write it."""
        s = self.shape
        heads = f"H{s.Hq}" if s.Hq == s.Hkv else f"Hq{s.Hq} Hkv{s.Hkv}"
        return f"{WORKS[s.work]} B{s.B} {heads} D{s.D} P{s.P} text {s.L} {s.dtype}"

    @property
    def tolerance(self) -> float:
        """That of the dtype."""
        return TOLERANCE[self.shape.dtype]

    def providers(self) -> tuple[str, ...]:
        """Our backends, and the peers."""
        return tuple(PROVIDERS)

    def inputs(self, device: torch.device) -> Problem:
        """Random tensors."""
        return Problem(self.shape, device)

    def exact(self, inputs: Problem) -> list[Tensor]:
        """By the reference in float64."""
        return inputs.exact()

    def make(self, provider: str, inputs: Problem) -> Work:
        """The call of a side, which is also what is compared."""
        s = self.shape
        if provider == "fastprefix composed" and inputs.query.device.type == "cpu":
            raise NotImplementedError("is what fastprefix chooses on a CPU")
        if provider == "fastprefix triton" and inputs.query.device.type == "cuda":
            raise NotImplementedError("is what fastprefix chooses on a GPU")
        grouped = s.work == "decode" and s.Hq != s.Hkv
        if provider == "sdpa" and grouped and inputs.query.device.type == "cpu":
            raise NotImplementedError("sdpa rows computes the same on a CPU, many times as fast")
        call = PROVIDERS[provider].make(inputs)
        return Work(call, timed(call, inputs.query.device))

    def held_bytes(self, provider: str) -> int:
        """Expanded keys and values; training makes their gradients, too."""
        s = self.shape
        rows = s.B if PROVIDERS[provider].expanded else 1
        keys = 2 * s.Hkv * s.D * s.itemsize * (rows * s.P + s.B * s.L)
        return keys * (3 if s.work == "train" else 2)

    def expected_s(self, pace: float = 1.0) -> float:
        """The rounds' budget, and what the reference in float64 takes."""
        s = self.shape
        gflop = 4 * s.B * s.Hq * s.Lq * (s.P + s.L) * s.D / 1e9
        exact = gflop * (3.5 if s.work == "train" else 1) / 10
        return self.budget_s + 1.0 + 3 * exact + (40 if s.flex else 0)

    def fields(self) -> dict[str, Any]:
        """Those of the shape."""
        return {**super().fields()["shape"], "work": WORKS[self.shape.work]}


def _gqa(work: str, B: int, P: int, **other: Any) -> Shape:
    """Hq 32, Hkv 8, bfloat16: the grid that pictures are drawn from."""
    return Shape(work, B, 32, 8, P, 64, D=64, **other)


def _mha(work: str, B: int, P: int, L: int = 64) -> Shape:
    """12 heads, float32."""
    return Shape(work, B, 12, 12, P, L, D=64, dtype="float32")


def _small(work: str, B: int, P: int, L: int = 64) -> Shape:
    """SmolLM2's heads, bfloat16."""
    return Shape(work, B, 9, 3, P, L, D=64)


_SHAPES = (
    *(
        _gqa("decode", B, P, flex=(B, P) == (32, 1024))
        for B in (1, 4, 16, 32, 64)
        for P in (20, 128, 512, 1024, 4096)
    ),
    *(_gqa("decode", B, 0) for B in (1, 32)),
    *(_mha("decode", B, P) for B, P in ((1, 20), (8, 20), (32, 512), (16, 4096), (64, 128))),
    *(_small("decode", B, P) for B, P in ((1, 512), (16, 512), (16, 2048), (64, 1024))),
    *(_gqa("prefill", B, P) for B in (1, 4, 16) for P in (20, 512, 4096)),
    *(_mha("prefill", B, P) for B, P in ((4, 0), (4, 128), (32, 1024))),
    _small("prefill", 64, 512),
    *(_gqa("train", B, P) for B in (1, 4, 16) for P in (20, 512)),
    *(_mha("train", B, P, 128) for B, P in ((4, 0), (8, 32), (4, 1024))),
    *(_small("train", B, P, 128) for B, P in ((8, 512), (32, 128), (4, 4096))),
)
PUBLISHED = tuple(map(OperatorCase, _SHAPES))
TINY = tuple(
    OperatorCase(Shape(work, 2, 4, 2, P, 16, D=16))
    for work in ("decode", "prefill", "train")
    for P in ((0, 32) if work == "decode" else (32,))
)
