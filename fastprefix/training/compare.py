"""A comparison from start to end: what is done already is not done again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from fastprefix.files import locked, read_json
from fastprefix.training.addresses import Addresses
from fastprefix.training.engines import Engine, Event, Job, LocalEngine, Train
from fastprefix.training.grid import Cell, CompareConfig, Run
from fastprefix.training.messages import reason
from fastprefix.training.run import RESULT, train_run

RUNS = "runs"
Result = Mapping[str, Any]
State = Literal["known", "started", "finished", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        run: which.
        folder: where it wrote.
        result: what :func:`train_run` returned; None if it failed.
        error: why it failed.
        known: whether it was finished before this comparison began.
    """

    run: Run
    folder: Path
    result: Result | None
    error: str | None = None
    known: bool = False


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison.

    Attributes:
        config: what was compared.
        cells: the places of the grid, in order.
        outcomes: of each run, those that chose learning rates included.
        rates: the learning rate of each cell by its label, None for the method's default. A cell
            all of whose first runs failed has no entry.
    """

    config: CompareConfig
    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]
    rates: Mapping[str, float | None] = field(hash=False)

    @property
    def failed(self) -> list[Outcome]:
        """Runs that failed."""
        return [outcome for outcome in self.outcomes if outcome.result is None]

    def of(self, cell: Cell) -> list[Outcome]:
        """All runs of a cell, at all learning rates."""
        return [outcome for outcome in self.outcomes if outcome.run.cell.label == cell.label]

    def chosen(self, cell: Cell) -> list[Outcome]:
        """A cell's finished runs at its learning rate, one for each seed."""
        if cell.label not in self.rates:
            return []
        rate = self.rates[cell.label]
        return [o for o in self.of(cell) if o.result is not None and o.run.learning_rate == rate]


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Attributes:
        done: runs that ended, those that were finished before included.
        total: of all.
        run: that this is about.
        state: what happened to it.
        error: why it failed.
    """

    done: int
    total: int
    run: Run
    state: State
    error: str | None = None


Show = Callable[[Progress], object]


def run_compare(
    config: CompareConfig,
    folder: Path,
    *,
    engine: Engine | None = None,
    show: Show | None = None,
    train: Train = train_run,
) -> Comparison:
    """Does all runs of a comparison that are not done yet.

    Each run has a folder whose name ends in a hash of its configuration, its data files and its
    model. A folder with a ``result.json`` is a finished run. The others are handed to ``train``,
    which goes on where a run was stopped. A run that fails stops no other.

    Another process that compares in the same folder waits until this one has ended.

    Args:
        config: what to compare.
        folder: of the comparison; the runs have folders in its folder ``runs``. Made if missing.
        engine: where they run; None for one process on this machine.
        show: called when something happened.
        train: does one run, in a worker.

    Raises:
        FileNotFoundError: a data file or a model is missing.
        ValueError: a learning rate is to be chosen, but the data has no validation split.
        OSError: the folder cannot be written.
    """
    folder = folder.resolve() / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        work = _Work(config, folder, engine or LocalEngine(), show, train)
        cells = config.cells()
        first = [run for cell in cells for run in config.first_runs(cell)]
        # the first seed of every method before the second of any
        work.do(sorted(first, key=lambda run: config.seeds.index(run.seed)))
        rates = {
            cell.label: best_rate(finished) if len(cell.rates) > 1 else cell.rates[0]
            for cell in cells
            if (finished := [o for o in work.outcomes if o.run.cell == cell and o.result])
        }
        work.do(
            [
                run
                for cell in cells
                if cell.label in rates and len(cell.rates) > 1
                for run in config.runs_at(cell, rates[cell.label])[1:]
            ]
        )
    return Comparison(config, tuple(cells), tuple(work.outcomes), rates)


def best_rate(finished: Sequence[Outcome]) -> float | None:
    """The learning rate with the lowest mean validation loss; None is a method's default.

    A loss that is not a number counts as infinite. Of equal ones the first wins.

    Args:
        finished: runs of one cell, with their results; at least one.
    """
    tried: dict[float | None, list[float]] = {}
    for outcome in finished:
        assert outcome.result is not None
        loss = validation_loss(outcome.result)
        tried.setdefault(outcome.run.learning_rate, []).append(loss)
    return min(tried, key=lambda rate: fmean(tried[rate]))


def validation_loss(result: Result) -> float:
    """A run's; infinite where it is not a number.

    Raises:
        ValueError: the data has no validation split.
    """
    if not result["validation"]:
        raise ValueError(
            "learning_rate: got several to choose from, takes one: the data has no validation split"
        )
    loss = float(result["validation"]["loss"])
    return math.inf if math.isnan(loss) else loss


class _Work:
    """Does runs, and keeps what became of them."""

    def __init__(
        self, config: CompareConfig, folder: Path, engine: Engine, show: Show | None, train: Train
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._addresses = Addresses(folder)
        self._engine = engine
        self._show = show
        self._train = train
        self._total = config.number_of_runs()

    def do(self, runs: Sequence[Run]) -> None:
        """Adds the outcomes of runs, in the order of the runs."""
        # Runs of two methods may be the same, for example a default and a point of the grid.
        folders = {run.label: self._addresses.of(run.config, run.label) for run in runs}
        same: dict[Path, list[Run]] = {}
        for run in runs:
            same.setdefault(folders[run.label], []).append(run)
        found: dict[str, Outcome] = {}

        def add(folder: Path, error: str | None, known: bool) -> None:
            result = None
            if error is None:
                try:
                    result = read_json(folder / RESULT)
                except (OSError, ValueError) as failure:
                    error = f"{reason(failure)}; without its folder it runs again"
            for run in same[folder]:
                found[run.label] = Outcome(run, folder, result, error, known)
                self._tell(run, "failed" if error else "known" if known else "finished",
                           error, len(found))  # fmt: skip

        for folder in same:
            if (folder / RESULT).exists():
                add(folder, None, True)
        missing = [folder for folder in same if not (folder / RESULT).exists()]
        for event in self._events([Job(same[folder][0].config, folder) for folder in missing]):
            folder = missing[event.index]
            if event.state == "started":
                self._tell(same[folder][0], "started", None, len(found))
            else:
                add(folder, event.error, False)
        self.outcomes += [found[run.label] for run in runs]

    def _events(self, jobs: Sequence[Job]) -> Iterator[Event]:
        if jobs:
            with closing(self._engine.run(jobs, self._train)) as events:
                yield from events

    def _tell(self, run: Run, state: State, error: str | None, more: int) -> None:
        if self._show is not None:
            self._show(Progress(len(self.outcomes) + more, self._total, run, state, error))
