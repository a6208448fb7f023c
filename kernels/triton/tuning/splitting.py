"""How decode cuts its keys, chosen by timing, on the GPU at hand.

Steps of several sizes are timed, each with every grid that one of the candidates makes for it, and
in one pass. A candidate's time is the geometric mean over the steps, each run in the way that it
chooses: its splits, and two phases or one pass. So the result is the best rule for these steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import tilings
from ..decode import decode_launches, decode_plan, shape_of_problem
from ..decode_grid import two_phase_pays
from ..forward import forward_launch
from ..launch import Launch, result
from ..problem import Problem
from ..target import Splitting
from .tune import GAIN, Choice, TimedProblem, decode_problem, milliseconds, scratch_of

WAVES = (1, 2, 4)
SHORTEST = (32, 64, 128, 256)
LAUNCH_BYTES = tuple(1024 * n for n in (4, 8, 16, 32, 64, 128, 256, 512))


def steps(timed: TimedProblem) -> Iterator[TimedProblem]:
    """Decoding steps of one, some and all sequences, with a short prefix and with the whole one."""
    batches = {1, max(1, timed.decode_batch // 8), timed.decode_batch}
    prefixes = {max(1, timed.prefix // 16), timed.prefix}
    length = max(1, timed.length // 8)
    for batch, prefix in itertools.product(sorted(batches), sorted(prefixes)):
        yield dataclasses.replace(timed, decode_batch=batch, prefix=prefix, length=length)


class _Step:
    """A decoding step, timed once for each list of launches."""

    def __init__(
        self,
        problem: Problem,
        row_name: str,
        timer: Callable[[Sequence[Launch], torch.device], float],
    ) -> None:
        self.problem, self.row_name, self.timer = problem, row_name, timer
        self.times: dict[Any, float] = {}

    def time(self, splitting: Splitting) -> float:
        """Milliseconds with a splitting."""
        target = dataclasses.replace(self.problem.target, splittings={self.row_name: splitting})
        p = dataclasses.replace(self.problem, target=target)
        shape, device = shape_of_problem(p), p.query.device
        plan = decode_plan(shape, target) if two_phase_pays(shape, target) else None
        grid = plan and plan.grid
        if grid not in self.times:
            out = result(p.query.shape, p.query)
            lse = torch.empty(p.query.shape[:3], dtype=torch.float32, device=device)
            if plan is None:
                launches = [forward_launch(p, out, lse)]
            else:
                launches = decode_launches(p, plan, *scratch_of(plan, device), out, lse)
            for each in launches:  # compiles
                each.run()
            self.times[grid] = self.timer(launches, device)
        return self.times[grid]


def tune_splitting(
    timed: TimedProblem,
    device: torch.device,
    *,
    timer: Callable[[Sequence[Launch], torch.device], float] = milliseconds,
) -> Choice[Splitting]:
    """The fastest splitting for heads of a size and dtype.

    Args:
        timed: the sizes of what is timed; the largest ones of :func:`steps`.
        device: the device to tune for.
        timer: returns the time of launches, in milliseconds.

    Raises:
        ValueError: sizes that the kernels do not accept.
    """
    problems = [decode_problem(each, device) for each in steps(timed)]
    family = problems[0].target.family
    name, _ = tilings.row("decode", family, timed.head_size, timed.dtype)
    every = [_Step(problem, name, timer) for problem in problems]
    first = Splitting()
    candidates = [Splitting(*each) for each in itertools.product(WAVES, SHORTEST, LAUNCH_BYTES)]
    times = {
        candidate: statistics.geometric_mean([step.time(candidate) for step in every])
        for candidate in candidates
    }
    best = min(times, key=lambda each: (times[each], _apart(each, first), each))
    if times[best] >= times[first] * (1 - GAIN):
        best = first
    return Choice(name, first, times[first], best, times[best], len(candidates))


def _apart(one: Splitting, other: Splitting) -> float:
    """How far candidates are from each other: it decides between those that choose alike."""
    return sum(abs(math.log2(a / b)) for a, b in zip(one, other, strict=True))
