"""Tiles chosen by timing, on the GPU at hand.

The tiles of :mod:`~fastprefix.kernels.tilings` were chosen by static figures, without a GPU. Here
each pass is first timed with the tile that it finds there. Then the neighbours of the best tile so
far are timed (half or twice the rows, the keys or the warps, one stage less or more) until none of
them is faster. The winner is kept on disk (:mod:`.store`) and used from the next process on.

A tile is refused if its results differ by more than rounding from those of the first tile. It is
also refused if a call with padding, a window, a soft cap, sinks and a bias does not run with it.
Calls with heavy scores (additive masks, dropout) use half of the rows in
:mod:`~fastprefix.kernels.tilings`, tuned or not.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

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
from ..decode import DecodePlan, decode_launches, decode_plan, shape_of_problem
from ..forward import forward_launch
from ..launch import Launch, result
from ..problem import Problem, make_problem
from ..target import Tile
from .store import Tuned

# A neighbour must be faster by more than timings of the same code differ.
GAIN = 0.02
# What the compiler and the driver raise for a tile that is too large.
TOO_LARGE = (CompilationError, OutOfResources, PTXASError)


@dataclass(frozen=True)
class TimedProblem:
    """The sizes of the problem that is timed. It is causal, and all sequences share one prefix.

    Attributes:
        head_size: D, and Dv.
        dtype: dtype of all tensors.
        batch, kv_heads, group, length, prefix: B, Hkv, Hq / Hkv, Lq = Lk, P.
        decode_batch: B of a decoding step, which has Lq = 1. Tiles of more than
            `decode_batch * group` rows cannot be told apart.
    """

    head_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    batch: int = 4
    kv_heads: int = 8
    group: int = 4
    length: int = 2048
    prefix: int = 1024
    decode_batch: int = 64


@dataclass(frozen=True)
class Choice(Generic[Tuned]):
    """What was found for a row of the tile table: a tile, or the splitting of its decoding steps.

    Attributes:
        name: :func:`~fastprefix.kernels.tilings.row_name`.
        table: the tile in the table, or the default.
        table_ms: its time, in milliseconds.
        best: the fastest one.
        best_ms: its time, in milliseconds.
        tried: how many were tried.
    """

    name: str
    table: Tuned
    table_ms: float
    best: Tuned
    best_ms: float
    tried: int


def _random(timed: TimedProblem, device: torch.device) -> Callable[..., Tensor]:
    """A function that makes random tensors of a size, from a generator with a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=timed.dtype, device=device, generator=generator)

    return random


def _problem(
    pass_name: str, timed: TimedProblem, random: Callable[..., Tensor], featured: bool
) -> Problem:
    """The problem that a pass is timed on.

    With `featured` it has options that do not make its scores heavy: padding, a window, a soft cap,
    sinks, and a bias for each head.
    """
    Hkv, L, P, D = timed.kv_heads, timed.length, timed.prefix, timed.head_size
    B, Lq = (timed.decode_batch, 1) if pass_name == "decode" else (timed.batch, L)
    query = random(B, Hkv * timed.group, Lq, D)
    device = query.device
    heads = torch.zeros(query.shape[1], device=device)
    options: dict[str, Any] = {}
    if featured:
        padding = torch.ones(B, L, dtype=torch.bool, device=device)
        options = {"key_padding_mask": padding, "sliding_window": L // 2 + 1, "softcap": 30.0}
        options |= {"sinks": heads, "prefix_bias": heads}
    return make_problem(
        query, random(B, Hkv, L, D), random(B, Hkv, L, D), random(Hkv, P, D), random(Hkv, P, D),
        Options(is_causal=True, scale=D**-0.5, **options),
    )  # fmt: skip


def decode_problem(timed: TimedProblem, device: torch.device) -> Problem:
    """A decoding step of these sizes."""
    return _problem("decode", timed, _random(timed, device), featured=False)


def scratch_of(plan: DecodePlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the partial results of a step, and for their log-sum-exp."""
    rows, size = plan.grid.partial_rows, plan.shape.Dv
    return (
        torch.empty((rows, size), dtype=torch.float32, device=device),
        torch.empty((rows,), dtype=torch.float32, device=device),
    )


class _Pass:
    """One pass of a problem, to be run with any tile."""

    def __init__(
        self, name: str, timed: TimedProblem, device: torch.device, featured: bool = False
    ) -> None:
        self.name = name
        random = _random(timed, device)
        self.problem = _problem(name, timed, random, featured)
        self.row_name, self.table = tilings.row(
            name, self.problem.target.family, timed.head_size, timed.dtype
        )
        query = self.problem.query
        self._saved: tuple[Tensor, Tensor, Tensor] | None = None
        if name not in ("forward", "decode"):
            grad_out = random(*query.shape)
            out = result(query.shape, query)
            lse, lse2, delta = (
                torch.empty(query.shape[:3], dtype=torch.float32, device=device) for _ in range(3)
            )
            forward_launch(self.problem, out, lse).run()
            delta_launch(out, grad_out, lse, delta, lse2).run()
            self._saved = (grad_out, lse2, delta)

    def with_tile(self, tile: Tile) -> tuple[list[Launch], list[Tensor]]:
        """The launches of the pass with a tile, and the tensors that they fill."""
        target = dataclasses.replace(self.problem.target, tuned={self.row_name: tile})
        p = dataclasses.replace(self.problem, target=target)
        if self._saved is None:
            return self._forward(p)
        if self.name == "dq":
            dq = result(p.query.shape, p.query)
            return [dq_launch(p, *self._saved, dq)], [dq]
        sequence = self.name == "dkv"
        inputs = (p.key, p.value) if sequence else (p.prefix_key, p.prefix_value)
        grads = [result(x.shape, x) if sequence else torch.empty_like(x) for x in inputs]
        launches: list[Launch] = []
        for pair in tilings.gradients_in_one_pass(p.work, *grads):
            if sequence:
                launches.append(dkv_launch(p, *self._saved, *pair))
            else:
                launches += dprefix_launches(p, *self._saved, *pair)
        return launches, grads

    def _forward(self, p: Problem) -> tuple[list[Launch], list[Tensor]]:
        """The launches of a forward or of a decoding step, and the output."""
        single, device = torch.float32, p.query.device
        out = result(p.query.shape, p.query)
        lse = torch.empty(p.query.shape[:3], dtype=single, device=device)
        if self.name == "forward":
            return [forward_launch(p, out, lse)], [out]
        plan = decode_plan(shape_of_problem(p), p.target)
        return decode_launches(p, plan, *scratch_of(plan, device), out, lse), [out]

    def runs_with(self, tile: Tile) -> bool:
        """Whether the pass runs with a tile."""
        try:
            for launched in self.with_tile(tile)[0]:
                launched.run()
        except TOO_LARGE:
            return False
        return True


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one number: 16 to 256 rows and keys, 1 to 16 warps, 1 to 4 stages."""
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
    """Median time of all launches together, which run one after the other."""

    def run() -> None:
        for each in launches:
            each.run()

    if device.type == "cuda":
        return float(triton.testing.do_bench(run, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def tune(
    timed: TimedProblem,
    pass_name: str,
    device: torch.device,
    *,
    timer: Callable[[Sequence[Launch], torch.device], float] = milliseconds,
) -> Choice[Tile]:
    """The fastest tile for a pass.

    Args:
        timed: the sizes of what is timed.
        pass_name: one of :data:`~fastprefix.kernels.tilings.PASSES`.
        device: the device to tune for.
        timer: returns the time of launches, in milliseconds.

    Raises:
        ValueError: an unknown pass, or sizes that the kernels do not accept.
    """
    if pass_name not in tilings.PASSES:
        known = ", ".join(tilings.PASSES)
        raise ValueError(f"pass_name: got {pass_name!r}, takes one of {known}")
    one = _Pass(pass_name, timed, device)
    launches, wanted = one.with_tile(one.table)
    launched = {launches[0].tile}

    def measure(tile: Tile) -> float:
        try:
            launches, found = one.with_tile(tile)
            # Tiles with more rows than the problem has are launched alike: noise would choose.
            if launches[0].tile in launched:
                return math.inf
            launched.add(launches[0].tile)
            for each in launches:
                each.run()
            if not all(_agree(a, b) for a, b in zip(found, wanted, strict=True)):
                return math.inf
            return timer(launches, device)
        except TOO_LARGE:
            return math.inf

    for each in launches:
        each.run()
    times = {one.table: timer(launches, device)}
    best = one.table
    while True:
        for tile in neighbours(best):
            if tile not in times:
                times[tile] = measure(tile)
        faster = min(times, key=lambda tile: times[tile])
        if times[faster] >= times[best] * (1 - GAIN):
            return Choice(one.row_name, one.table, times[one.table], best, times[best], len(times))
        if _Pass(pass_name, timed, device, featured=True).runs_with(faster):
            best = faster
        else:
            times[faster] = math.inf


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether results are equal up to the order of their sums."""
    allowed = {torch.float32: 1e-3, torch.float16: 1e-2}.get(a.dtype, 4e-2)
    return bool((a.float() - b.float()).abs().max() <= allowed * b.float().abs().max())
