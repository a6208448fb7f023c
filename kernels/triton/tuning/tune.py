"""Tiles chosen by timing, on the GPU at hand.

The tables of :mod:`~fastprefix.kernels.tilings` were chosen by static figures, without a GPU. Here
each pass is timed with the tile of its row. Then the tiles beside the best so far are timed (half
or twice the rows, the keys, the warps, one stage less or more) until none of them is faster. The
winner is kept on disk (:mod:`.store`) and used from the next process on.

A tile is never taken if its results differ from those of the table's tile by more than rounding,
or if a call with padding, a window, a cap, sinks and a bias does not run with it. Calls whose tiles
are halved (additive masks, dropout) keep the table's.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fastprefix.options import Options

from .. import tilings
from ..backward import delta_launch
from ..backward_dkv import dkv_launch
from ..backward_dprefix import dprefix_launches
from ..backward_dq import dq_launch
from ..forward import forward_launch
from ..launch import Launch
from ..problem import make_problem
from ..tilings import Tile

STEPS = ("forward", "dq", "dkv", "dprefix")
# A neighbour must be faster by more than timings of the same code differ.
GAIN = 0.02


@dataclass(frozen=True)
class Shape:
    """The problem that is timed: causal, one prefix for all.

    Attributes:
        head_size: D, and Dv.
        dtype: of all tensors.
        batch, kv_heads, group, length, prefix: B, Hkv, Hq / Hkv, Lq = Lk, P.
    """

    head_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    batch: int = 4
    kv_heads: int = 8
    group: int = 4
    length: int = 2048
    prefix: int = 1024


@dataclass(frozen=True)
class Choice:
    """What was found for a row of the tables.

    Attributes:
        name: :func:`~fastprefix.kernels.tilings.row_name`.
        table: the table's tile.
        table_ms: its time, in milliseconds.
        best: the fastest tile.
        best_ms: its time.
        tried: how many tiles ran.
    """

    name: str
    table: Tile
    table_ms: float
    best: Tile
    best_ms: float
    tried: int


class _Passes:
    """A problem's forward and backward, each pass with the tile that one names.

    `featured` adds what calls may ask for without smaller tiles: padding, a window, a soft cap, a
    sink and a bias for each head.
    """

    def __init__(self, shape: Shape, device: torch.device, featured: bool = False) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, dtype=shape.dtype, device=device, generator=generator)

        B, Hkv, L, P, D = shape.batch, shape.kv_heads, shape.length, shape.prefix, shape.head_size
        query = random(B, Hkv * shape.group, L, D)
        heads = torch.zeros(query.shape[1], device=device)
        options: dict[str, Any] = {}
        if featured:
            padding = torch.ones(B, L, dtype=torch.bool, device=device)
            options = {"key_padding_mask": padding, "sliding_window": L // 2 + 1, "softcap": 30.0}
            options |= {"sinks": heads, "prefix_bias": heads}
        self.problem = make_problem(
            query, random(B, Hkv, L, D), random(B, Hkv, L, D), random(Hkv, P, D),
            random(Hkv, P, D), Options(is_causal=True, scale=D**-0.5, **options),
        )  # fmt: skip
        self._grad_out = random(*query.shape)
        self._out = torch.empty_like(query)
        self._lse, self._lse2, self._delta = (
            torch.empty(query.shape[:3], dtype=torch.float32, device=device) for _ in range(3)
        )
        forward_launch(self.problem, self._out, self._lse).run()
        delta_launch(self._out, self._grad_out, self._lse, self._delta, self._lse2).run()

    def with_tile(self, step: str, name: str, tile: Tile) -> tuple[list[Launch], list[Tensor]]:
        """A pass's launches with a tile, and the tensors that they fill."""
        target = dataclasses.replace(self.problem.target, tuned={name: tile})
        p = dataclasses.replace(self.problem, target=target)
        saved = (self._grad_out, self._lse2, self._delta)
        if step == "forward":
            out, lse = torch.empty_like(self._out), torch.empty_like(self._lse)
            return [forward_launch(p, out, lse)], [out]
        if step == "dq":
            dq = torch.empty_like(p.query)
            return [dq_launch(p, *saved, dq)], [dq]
        sequence = step == "dkv"
        inputs = (p.key, p.value) if sequence else (p.prefix_key, p.prefix_value)
        grads = [torch.empty_like(x) for x in inputs]
        launches: list[Launch] = []
        for pair in tilings.gradients_in_one_pass(p, *grads):
            if sequence:
                launches.append(dkv_launch(p, *saved, *pair))
            else:
                launches += dprefix_launches(p, *saved, *pair)
        return launches, grads


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles one step away: 16 to 256 rows and keys, 1 to 16 warps, 1 to 4 stages."""
    limits = {"rows": (16, 256), "keys": (16, 256), "warps": (1, 16)}
    for name, (least, most) in limits.items():
        now = getattr(tile, name)
        for value in (now // 2, now * 2):
            if least <= value <= most:
                yield tile._replace(**{name: value})
    for stages in (tile.stages - 1, tile.stages + 1):
        if 1 <= stages <= 4:
            yield tile._replace(stages=stages)


def milliseconds(launches: Sequence[Launch], device: torch.device) -> float:
    """Median time of launches, one after the other."""

    def run() -> None:
        for one in launches:
            one.run()

    if device.type == "cuda":
        return float(triton.testing.do_bench(run, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def tune(
    shape: Shape,
    step: str,
    device: torch.device,
    *,
    timer: Callable[[Sequence[Launch], torch.device], float] = milliseconds,
) -> Choice:
    """The fastest tile for a pass.

    Args:
        shape: what is timed.
        step: one of STEPS.
        device: where.
        timer: of the launches, in milliseconds.

    Raises:
        ValueError: a step that does not exist, or a shape that the kernels do not take.
    """
    if step not in STEPS:
        raise ValueError(f"step: got {step!r}, takes one of {', '.join(STEPS)}")
    passes = _Passes(shape, device)
    family = passes.problem.target.family
    name, first = tilings.row(step, family, shape.head_size, shape.dtype)
    launches, wanted = passes.with_tile(step, name, first)

    def measure(tile: Tile) -> float:
        try:
            launches, found = passes.with_tile(step, name, tile)
            for one in launches:
                one.run()
            if not all(_agree(a, b) for a, b in zip(found, wanted, strict=True)):
                return math.inf
            return timer(launches, device)
        except (CompilationError, OutOfResources, PTXASError):
            return math.inf

    def fits_with_features(tile: Tile) -> bool:
        passes = _Passes(shape, device, featured=True)
        try:
            for one in passes.with_tile(step, name, tile)[0]:
                one.run()
        except (CompilationError, OutOfResources, PTXASError):
            return False
        return True

    for one in launches:
        one.run()
    times = {first: timer(launches, device)}
    best = first
    while True:
        for tile in neighbours(best):
            if tile not in times:
                times[tile] = measure(tile)
        faster = min(times, key=lambda tile: times[tile])
        if times[faster] >= times[best] * (1 - GAIN):
            return Choice(name, first, times[first], best, times[best], len(times))
        if fits_with_features(faster):
            best = faster
        else:
            times[faster] = math.inf


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether results are the same but for the order of sums."""
    allowed = {torch.float32: 1e-3, torch.float16: 1e-2}.get(a.dtype, 4e-2)
    return bool((a.float() - b.float()).abs().max() <= allowed * b.float().abs().max())
