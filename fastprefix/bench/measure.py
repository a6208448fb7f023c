"""Measuring a case: first whether all providers agree, then their times and their memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil
import torch

from fastprefix.bench.case import OURS, Case, Figures, Work
from fastprefix.bench.memory import MemoryMeter
from fastprefix.bench.problem import error

MOST_ROUNDS = 200
# Of the free memory, what one provider may take: others hold theirs at the same time.
SHARE = 0.5
GB = 1e9


class WrongResultError(RuntimeError):
    """A provider does not compute what the others do, so nothing of the case is timed."""


def measure(
    case: Case,
    device: torch.device,
    meter: MemoryMeter | None = None,
    providers: Iterable[str] | None = None,
    rounds: int | None = None,
) -> dict[str, Any]:
    """One case, measured.

    Args:
        case: what to measure.
        device: where.
        meter: of memory; None leaves memory out.
        providers: only these of the case's.
        rounds: how often each provider is timed; None for what fits into the case's budget.

    Returns:
        ``providers``: for each one ``figures`` (see :func:`summary`), ``samples`` (all times) and,
        with a meter, ``peak_bytes``. ``left_out``: why others have none.

    Raises:
        WrongResultError: a provider's result is wrong. Nothing was timed.
    """
    asked = [name for name in case.providers() if providers is None or name in set(providers)]
    works, left_out = ready(case, device, asked)
    samples = interleaved({name: work.run for name, work in works.items()}, case, rounds)
    names = list(works)
    works.clear()  # what they hold is no part of the memory that is measured next
    found: dict[str, Any] = {
        name: {"figures": summary(samples[name]), "samples": samples[name]} for name in names
    }
    if meter is not None:
        peaks = meter.peaks(case, names)
        for name in names:
            found[name]["peak_bytes"] = peaks[name]
    return {"providers": found, "left_out": left_out}


def ready(
    case: Case, device: torch.device, providers: Iterable[str]
) -> tuple[dict[str, Work], dict[str, str]]:
    """All providers that can do a case and are right, and why the others are left out.

    Raises:
        WrongResultError: one of them is wrong.
        Exception: whatever stops fastprefix itself. What stops another one is its reason.
    """
    inputs = case.inputs(device)
    exact = case.exact(inputs)
    works: dict[str, Work] = {}
    left_out: dict[str, str] = {}
    for name in providers:
        try:
            _refuse_too_large(case.held_bytes(name), device)
            work = case.make(name, inputs)
            got = None if name == case.bound else work.result()
        except Exception as failure:
            if name == OURS:
                raise
            known = isinstance(failure, NotImplementedError | ImportError)
            kind = "" if known else f"{type(failure).__name__}: "
            left_out[name] = kind + (str(failure).splitlines() or [type(failure).__name__])[0][:300]
            continue
        wrong = 0.0 if got is None else error(got, exact)
        if not wrong <= case.tolerance:
            raise WrongResultError(
                f"{case.suite}, {case.label}: {name} is wrong (relative error {wrong:.1e}, allowed "
                f"{case.tolerance:.0e}); nothing was timed"
            )
        works[name] = work
    return works, left_out


def interleaved(
    runs: Mapping[str, Callable[[], Figures]], case: Case, rounds: int | None = None
) -> dict[str, Figures]:
    """Times of all runs, which take turns: every second round goes backwards.

    So that what changes while the machine runs, such as its clock, meets all of them. There are at
    least the case's rounds, and more as long as its budget lasts.
    """
    if case.warm_up:
        for run in runs.values():
            run()
    samples: dict[str, Figures] = {name: {} for name in runs}
    begin = time.perf_counter()
    for i in range(rounds or MOST_ROUNDS):
        if rounds is None and i >= case.rounds and time.perf_counter() - begin > case.budget_s:
            break
        for name in list(runs) if i % 2 == 0 else reversed(list(runs)):
            for figure, times in runs[name]().items():
                samples[name].setdefault(figure, []).extend(times)
    return samples


def summary(samples: Figures) -> dict[str, dict[str, float]]:
    """For each figure ``median``, ``p20``, ``p80`` in milliseconds, and the number of samples."""
    return {
        name: {
            "median": statistics.median(times),
            "p20": percentile(times, 20),
            "p80": percentile(times, 80),
            "samples": len(times),
        }
        for name, times in samples.items()
    }


def percentile(values: Iterable[float], percent: float) -> float:
    """Of sorted values, interpolated linearly between neighbours, as NumPy does it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _refuse_too_large(needed: int, device: torch.device) -> None:
    """Refuses what would not fit beside the others."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    if needed > SHARE * free:
        raise NotImplementedError(
            f"does not fit: takes about {needed / GB:.1f} GB, and {SHARE * free / GB:.1f} GB are "
            "allowed here, half of what is free"
        )
