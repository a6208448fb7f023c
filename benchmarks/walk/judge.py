"""Judges what came back, or did not."""

from __future__ import annotations

import linecache
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import fastprefix
from fastprefix.hf import UnsupportedModelError
from walk.build import first_line
from walk.oracle import BlindError, NotApplicableError, distance

TOLERANCE = 1e-4  # of the standard deviation of what is right
PACKAGE = str(Path(fastprefix.__file__).parent)

# wrong: a result came back and was not right. crash: an error that fastprefix did not mean to raise
# where the plain model works. blind: no check here could fail.
Status = Literal["right", "expanded", "refused", "wrong", "crash", "n/a", "blind"]


class WrongError(Exception):
    """Something is not right that is no number of an output."""


@dataclass(frozen=True)
class Check:
    """A result, and what would be right: any of several, where transformers itself has several.

    Attributes:
        got: the result.
        want: what is right.
        what: of several checks in a cell.
        hint: says more of a result that is not right.
        also: whether a result is right though it is none of these: tokens that tie.
    """

    got: Tensor
    want: list[Tensor]
    what: str = ""
    hint: Callable[[Tensor], str] | None = None
    also: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True)
class Cell:
    """What came out of one class in one way.

    Attributes:
        name: of the class.
        task: it belongs to.
        way: it was used in.
        status: see `Status`.
        message: the reason of anything but right.
        error: the largest, in standard deviations; the share of tokens for tokens.
        seconds: that it took.
    """

    name: str
    task: str
    way: str
    status: Status
    message: str = ""
    error: float | None = None
    seconds: float = field(default=0.0, compare=False)


def judge(checks: Callable[[], Iterable[Check]]) -> tuple[Status, str, float | None]:
    """Runs the checks of a cell: its status, its message, its error."""
    worst = 0.0
    try:
        for check in checks():
            error, problem = compare(check)
            if problem:
                return "wrong", problem, error
            worst = max(worst, error)
    except WrongError as problem:
        return "wrong", str(problem), None
    except BlindError as problem:
        return "blind", str(problem), None
    except NotApplicableError as problem:
        return "n/a", str(problem), None
    except Exception as problem:
        if deliberate(problem):
            return "refused", first_line(problem), None
        return "crash", f"{first_line(problem)} [{place(problem)}]", None
    return "right", "", worst


def compare(check: Check) -> tuple[float, str]:
    """The error against the nearest of what is right, and what is wrong, "" for nothing."""
    got, what = check.got, f"{check.what}: " if check.what else ""
    best, problem = float("inf"), ""
    for want in check.want:
        if got.shape != want.shape:
            problem = problem or f"{what}shape {list(got.shape)} for {list(want.shape)}"
            continue
        if want.is_floating_point():
            error = distance(got, want)
            told = f"{what}off by {error:.2g} standard deviations"
        else:
            error = float((got != want).float().mean())
            told = f"{what}{error:.0%} of the tokens differ"
        if error < best:
            best, problem = (
                error,
                told if error > (TOLERANCE if want.is_floating_point() else 0.0) else "",
            )
        if not problem:
            return best, ""
    if problem and check.also is not None and check.also(got):
        return 0.0, ""
    if check.hint is not None and problem:
        problem += check.hint(got)
    return best, problem


def deliberate(problem: BaseException) -> bool:
    """Whether fastprefix raised it itself, with a reason."""
    if isinstance(problem, TypeError) and "unexpected keyword argument" in str(problem):
        # an argument that this version of fastprefix does not have
        return "prefill" in str(problem) or "use_prefix" in str(problem)
    if isinstance(problem, UnsupportedModelError):
        return True
    frames = traceback.extract_tb(problem.__traceback__)
    if not frames or not frames[-1].filename.startswith(PACKAGE):
        return False
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    kinds = (ValueError, NotImplementedError, TypeError, RuntimeError)
    return isinstance(problem, kinds) and line.startswith("raise ")


def place(problem: BaseException) -> str:
    """Where an exception came from: the deepest frame, and the deepest one of fastprefix."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [f for f in frames if f.filename.startswith(PACKAGE)]
    shown = [frames[-1]] + ([ours[-1]] if ours and ours[-1] is not frames[-1] else [])
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in shown)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds that it took."""
    begin = time.perf_counter()
    with torch.enable_grad():
        found = function()
    return found, round(time.perf_counter() - begin, 2)
