"""Running cells: one capability of one architecture with one library, judged."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.utils import logging

from compat.architectures import ARCHITECTURES
from compat.capabilities import CAPABILITIES, Case, Check, Entry
from compat.libraries import BARE, LIBRARIES, Library
from compat.oracle import Semantics

Status = Literal["passes", "wrong", "refused", "does not apply"]


@dataclass(frozen=True)
class Cell:
    """What came out.

    Attributes:
        architecture: by name.
        capability: by key.
        library: by name.
        status: "wrong" means that a result came back and was not right.
        error: the largest relative error, or share of wrong tokens; None if nothing came back.
        message: what was wrong, the first line of the refusal, or why it does not apply.
        note: what a user has to do to get this far.
        seconds: of CPU time that it took.
    """

    architecture: str
    capability: str
    library: str
    status: Status
    error: float | None = None
    message: str = ""
    note: str = ""
    seconds: float = 0.0


class _TimeLimitError(Exception):
    """A cell took too long."""


def run_architecture(
    name: str, capabilities: Iterable[str], libraries: Iterable[str], limit: float = 60.0
) -> Iterator[Cell]:
    """All cells of an architecture; exceptions become refusals.

    Args:
        name: of the architecture.
        capabilities: keys of `CAPABILITIES`.
        libraries: names of `LIBRARIES`.
        limit: seconds of CPU time for a cell.
    """
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    case = Case.make(ARCHITECTURES[name], BARE)
    blind = _blind(case)
    if blind:
        raise RuntimeError(f"{name}: {blind}, so that no check of it could fail")
    for key in capabilities:
        for library in libraries:
            yield run_cell(case, CAPABILITIES[key], LIBRARIES[library], limit)


def run_cell(case: Case, entry: Entry, library: Library, limit: float = 60.0) -> Cell:
    """One cell."""
    names = case.architecture.name, entry.key, library.name
    if case.architecture.family not in entry.families:
        return Cell(*names, "does not apply", message=entry.why_not)
    begin = time.process_time()
    case = case.with_library(library)
    status, error, message = _judge(case, entry, limit)
    if status != "passes" and (blame := _bare_fails(case, entry, limit)):
        status, error, message = "does not apply", None, blame
    return Cell(*names, status, error, message, case.note, round(time.process_time() - begin, 3))


def _judge(case: Case, entry: Entry, limit: float) -> tuple[Status, float | None, str]:
    try:
        with _time_limit(limit):
            checks = entry.run(case)
    except Exception as problem:
        return "refused", None, _first_line(problem)
    if not case.oracle.defined and case.library is not BARE:
        return "wrong", None, "a result, though nothing defines what a prefix means in this model"
    worst = 0.0
    for check in checks:
        try:
            error, problem_found = _compare(check)
        except Exception as defect:  # of this benchmark, for which no library is blamed
            place = f"{case.architecture.name}, {entry.key}, {case.library.name}"
            raise RuntimeError(f"{place}: the oracle failed") from defect
        if problem_found:
            return "wrong", error, problem_found
        worst = max(worst, error or 0.0)
    return "passes", worst, ""


def _compare(check: Check) -> tuple[float | None, str]:
    """The error, and what is wrong, "" for nothing."""
    got, want = check.got, check.want()
    what = f"{check.what}: " if check.what else ""
    if got is None or want is None:
        same = got is None and want is None
        return None, "" if same else f"{what}{'missing' if got is None else 'not expected'}"
    if got.shape != want.shape:
        return None, f"{what}shape {list(got.shape)} for {list(want.shape)}"
    if not want.is_floating_point():
        error = float((got != want).float().mean())
        return error, f"{what}{error:.0%} of the tokens differ" if error else ""
    got, want = got.detach().double(), want.detach().double()
    if not torch.isfinite(got).all():
        return None, f"{what}not finite"
    if not got.any() and want.any():
        return 1.0, f"{what}zero"
    tolerance = check.tolerance() if callable(check.tolerance) else check.tolerance
    error = check.error(got, want)
    if error <= tolerance:
        return error, ""
    for way, without in check.without.items():
        if check.error(got, without().detach().double()) <= tolerance:
            return error, f"{what}{way}"
    return error, f"{what}relative error {error:.1e}"


def _bare_fails(case: Case, entry: Entry, limit: float) -> str:
    """Why the bare model, without any prefix, does not do it either; "" if it does."""
    status, _, message = _judge(case.with_library(BARE), entry, limit)
    return "" if status == "passes" else f"the bare model: {message}"


def _blind(case: Case) -> str:
    """What no check on this model would see; "" if all is well."""
    oracle = case.oracle
    if not oracle.defined:
        return ""
    prefix, rows = oracle.prefix(), case.rows(9, 6, 3)
    with torch.no_grad():
        right = oracle.outputs(rows, prefix, Semantics(0))
        none = oracle.outputs(rows, None, Semantics(0))
        shorter: Any = [(key[:, 1:], value[:, 1:]) for key, value in prefix]
        less = oracle.outputs(rows, shorter, Semantics(0))
    for name, other in (("the prefix", none), ("a token of the prefix", less)):
        if float((right - other).norm() / right.norm()) < 0.01:
            return f"its output hardly depends on {name}"
    return ""


def _first_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(problem).__name__}: {text}"[:300]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TimeLimitError(f"took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
