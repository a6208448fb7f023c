"""Runs the walk: each class in a worker process, which a hang or a crash of it may take down."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from walk.classes import Entry, all_classes
from walk.judge import Cell

LIMIT = 60.0  # seconds of CPU time for a class
ROUNDING = 0.1  # standard deviations


def walk_class(entry: Entry, ways: Iterable[str] | None = None, library: Any = None) -> list[Cell]:
    """All cells of a class.

    Args:
        entry: the class.
        ways: by name; all of its task if None.
        library: instead of fastprefix.
    """
    from walk.build import CannotBuildError, build, check_runs, in_double
    from walk.inputs import arguments, ids_for
    from walk.judge import judge, timed
    from walk.library import Library
    from walk.ways import CAUSAL, ENCODER, Case, ways_for

    def of(listed: dict[str, Any]) -> dict[str, Any]:
        return {n: way for n, way in listed.items() if ways is None or n in ways}

    chosen = of(CAUSAL if entry.task in ("causal", "image-text") else ENCODER)
    try:
        plain = build(entry)
        chosen = of(ways_for(entry.task, plain))
        check_runs(plain, arguments(plain, entry.task, ids_for(plain, entry.task, 2, 7, 1)))
    except CannotBuildError as problem:
        return [Cell(entry.name, entry.task, n, "n/a", f"not built: {problem}") for n in chosen]
    cells = []
    for name, way in chosen.items():
        case = Case(entry.task, plain, library or Library())
        (status, message, error), seconds = timed(partial(judge, partial(way, case)))
        if status == "wrong" and (error or 1.0) < ROUNDING:
            # a loud model makes much of rounding: with twice the digits nothing may be left of it
            precise = Case(entry.task, in_double(plain), library or Library())
            found, more = timed(partial(judge, partial(way, precise)))
            seconds += more
            if found[0] == "right":
                status, message, error = found
        if status == "refused" and library is None and Library.has_fallback():
            case = Case(entry.task, plain, Library("expand"))
            found, more = timed(partial(judge, partial(way, case)))
            seconds += more
            if found[0] == "right":
                status, error = "expanded", found[2]
            elif found[0] != "refused":
                status, message, error = found[0], f"expanded: {found[1]}", found[2]
            else:
                message = found[1]
        cells.append(Cell(entry.name, entry.task, name, status, message, error, seconds))
    return cells


def _work(connection: Connection) -> None:
    """A worker: a class's name comes in, its cells go out."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    known = all_classes()
    while (job := connection.recv()) is not None:
        name, ways = job
        try:
            connection.send(walk_class(known[name], ways))
        except BaseException as problem:  # of the walk itself
            import traceback

            connection.send("".join(traceback.format_exception(problem)))


def _worked(pid: int | None) -> float:
    """Seconds of CPU time of a process: others on the machine do not make it slower by these."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # not Linux: by the clock, then
        return time.monotonic()


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.name, self.since, self.before = "", 0.0, 0.0

    def give(self, name: str, ways: list[str] | None) -> None:
        self.name, self.since = name, time.monotonic()
        self.before = _worked(self.process.pid)
        self.connection.send((name, ways))

    def overdue(self, limit: float) -> bool:
        """Whether it has worked longer on a class, or hung without working for ten times that."""
        waited = time.monotonic() - self.since
        return waited > limit and (
            waited > 10 * limit or _worked(self.process.pid) > limit + self.before
        )

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def walk(
    names: list[str],
    ways: list[str] | None = None,
    jobs: int = 1,
    limit: float = LIMIT,
    tell: Callable[[str, list[Cell]], None] = lambda name, cells: None,
) -> list[Cell]:
    """All cells of all these classes, in their order.

    Args:
        names: of classes.
        ways: by name; all if None.
        jobs: how many classes at a time.
        limit: seconds for a class.
        tell: is called with each class that is done.
    """
    known, found = all_classes(), dict[str, list[Cell]]()
    todo, workers = list(reversed(names)), list[_Worker]()

    def failed(name: str, why: str) -> list[Cell]:
        # the plain model may be at fault, the walk, or fastprefix: a person has to look
        return [Cell(name, known[name].task, "all", "crash", why)]

    while todo or any(worker.name for worker in workers):
        while todo and len(workers) < jobs:
            workers.append(_Worker())
        for worker in workers:
            if not worker.name and todo:
                worker.give(todo.pop(), ways)
        busy = [worker for worker in workers if worker.name]
        wait([w.connection for w in busy], timeout=1.0)
        for worker in busy:
            name, cells = worker.name, None
            try:
                if worker.connection.poll():
                    answer = worker.connection.recv()
                    ok = isinstance(answer, list)
                    cells = answer if ok else failed(name, f"the walk: {answer[-1500:]}")
                    worker.name = ""
            except (EOFError, OSError):
                cells = failed(name, "the process died")
            if cells is None and worker.overdue(limit):
                cells = failed(name, f"took longer than {limit:g} s")
            if cells is not None:
                found[name] = cells
                tell(name, cells)
                if worker.name:
                    worker.end()
                    workers.remove(worker)
    for worker in workers:
        worker.end()
    return [cell for name in names for cell in found[name]]
