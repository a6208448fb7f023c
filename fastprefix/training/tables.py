"""The figures of a comparison as tables, the same for every kind of report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastprefix.tasks.metrics import TEXT_METRICS
from fastprefix.training.compare import Comparison, Outcome, validation_loss
from fastprefix.training.grid import Cell, field_title, shown_value
from fastprefix.training.run import read_metrics

NOTHING = "–"
Results = Sequence[Mapping[str, Any]]  # of one cell, by seed
# Metrics of which less is better.
_FALLING = ("loss", "perplexity")
_TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "f1": "F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "squad_em": "SQuAD EM",
    "squad_f1": "SQuAD F1",
}


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and the standard deviation (of a sample, so with n - 1)."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        """Of at least one value."""
        values = list(values)
        if not all(map(math.isfinite, values)):  # a run diverged
            return cls(sum(values) / len(values), math.nan, len(values))
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), spread, len(values))

    def show(self, digits: int) -> str:
        """The mean, and ± spread where there is more than one seed."""
        around = f" ± {self.spread:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{around}"


@dataclass(frozen=True)
class Column:
    """A column's title, and whether it holds numbers."""

    title: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Texts by row and column.

    Attributes:
        columns: of every row.
        rows: each as long as the columns.
        strong: places (row, column) that are set off.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    strong: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def is_better(metric: str, one: float, other: float) -> bool:
    """Whether the first value of a metric is better."""
    return one < other if _kind(metric) in _FALLING else one > other


def metric_title(name: str) -> str:
    """A metric as papers spell it."""
    kind = _kind(name)
    return _TITLES.get(kind, kind.replace("_", " ")) + name.removeprefix(kind)


def digits_of(metric: str) -> int:
    """Decimals to show: scores of texts go up to 100, other metrics up to 1."""
    return 2 if _kind(metric) in TEXT_METRICS else 3


def _kind(metric: str) -> str:
    """The metric of a name such as "bleu (unseen)", which is that of a further test set."""
    return metric.partition(" (")[0]


def held_out(result: Mapping[str, Any]) -> Mapping[str, float]:
    """A run's metrics on the test set; where the data has none, on the validation set."""
    return result["test"] or result["validation"] or {}


def value_of(result: Mapping[str, Any], metric: str) -> float:
    """A metric of a run, see :func:`held_out`."""
    return float(held_out(result)[metric])


def results_of(comparison: Comparison, cell: Cell) -> Results:
    """The results at a cell's learning rate, one for each seed."""
    return [o.result for o in comparison.chosen(cell) if o.result is not None]


def scored_cells(comparison: Comparison) -> list[tuple[Cell, Figure]]:
    """All cells with finished runs, and their deciding metric."""
    metric = comparison.config.deciding_metric
    return [
        (cell, Figure.of(value_of(result, metric) for result in results))
        for cell in comparison.cells
        if (results := results_of(comparison, cell))
    ]


def best_cell(comparison: Comparison) -> Cell | None:
    """The one with the best mean of the deciding metric; None if there is no such figure."""
    metric = comparison.config.deciding_metric
    best: tuple[Cell, Figure] | None = None
    for cell, figure in scored_cells(comparison):
        if math.isfinite(figure.mean) and (
            best is None or is_better(metric, figure.mean, best[1].mean)
        ):
            best = cell, figure
    return None if best is None else best[0]


def level_with(comparison: Comparison, best: Cell) -> list[Cell]:
    """The cells whose mean is no further from the best one's than seeds vary in either."""
    scored = dict(scored_cells(comparison))
    top = scored[best]
    return [
        cell
        for cell, figure in scored.items()
        if cell != best and abs(figure.mean - top.mean) <= max(figure.spread, top.spread)
    ]


def metrics_of(comparison: Comparison) -> list[str]:
    """The names of all metrics, the deciding one first, the loss last."""
    decides = comparison.config.deciding_metric
    found: dict[str, None] = {}
    for outcome in comparison.outcomes:
        if outcome.result is not None:
            found.update(dict.fromkeys(held_out(outcome.result)))
    others = [name for name in found if name not in (decides, "loss")]
    return [name for name in dict.fromkeys((decides, *others, "loss")) if name in found]


def scores_table(comparison: Comparison) -> Table:
    """A row for each cell: what it reaches."""
    metrics = metrics_of(comparison)
    columns = [
        *(Column(metric_title(name)) for name in metrics),
        *(Column("learning rate"), Column("seeds")),
    ]

    def row(cell: Cell) -> list[str]:
        results = results_of(comparison, cell)
        figures = [
            Figure.of(value_of(result, name) for result in results).show(digits_of(name))
            for name in metrics
        ]
        return [*figures, _rate(results[0]["learning_rate"]), str(len(results))]

    return _by_cell(comparison, columns, row)


def costs_table(comparison: Comparison) -> Table:
    """A row for each cell: what it costs."""

    def row(cell: Cell) -> list[str]:
        chosen = comparison.chosen(cell)
        return [show(chosen) for _, show in _COSTS]

    table = _by_cell(comparison, [Column(title) for title, _ in _COSTS], row)
    return replace(table, strong=frozenset())


def _by_cell(
    comparison: Comparison, columns: Sequence[Column], row: Callable[[Cell], list[str]]
) -> Table:
    """A table with a row for each cell; the best one's name and first figure are set off."""
    axes = list(comparison.config.grid)
    best = best_cell(comparison)
    rows, strong = [], set()
    for number, cell in enumerate(comparison.cells):
        point = [shown_value(cell.point[axis]) if axis in cell.point else "" for axis in axes]
        ran = bool(comparison.chosen(cell))
        rows.append([cell.method, *point, *(row(cell) if ran else [NOTHING] * len(columns))])
        if cell is best:
            strong |= {(number, 0), (number, 1 + len(axes))}
    names = [Column("method", False), *(Column(field_title(axis)) for axis in axes)]
    return Table([*names, *columns], rows, frozenset(strong))


def rates_table(comparison: Comparison) -> Table | None:
    """The validation loss at each learning rate that was tried; None if no method has several."""
    cells = [cell for cell in comparison.cells if len(cell.rates) > 1]
    if not cells:
        return None
    rates = sorted({rate for cell in cells for rate in cell.rates if rate is not None})
    first = comparison.config.seeds[0]
    rows, strong = [], set()
    for number, cell in enumerate(cells):
        tried = {o.run.learning_rate: o for o in comparison.of(cell) if o.run.seed == first}
        chosen = comparison.rates.get(cell.label)
        row = [cell.label]
        for place, rate in enumerate(rates):
            result = tried[rate].result if rate in tried else None
            loss = "" if rate not in tried else "failed" if result is None else _validation(result)
            row.append(loss)
            if rate == chosen:
                strong.add((number, 1 + place))
        at_edge = chosen in (min(tried, key=_or_0), max(tried, key=_or_0))
        rows.append([*row, "at the edge" if at_edge else ""])
    numbers = [Column(f"{rate:g}") for rate in rates]
    return Table([Column("method", False), *numbers, Column("", False)], rows, frozenset(strong))


def runs_table(comparison: Comparison) -> Table:
    """A row for each run."""
    metrics = metrics_of(comparison)
    columns = [
        Column("run", False),
        Column("seed"),
        Column("learning rate"),
        *(Column(metric_title(name)) for name in metrics),
        *(Column("validation loss"), Column("steps"), Column("training")),
        Column("folder", False),
    ]
    rows = []
    for outcome in comparison.outcomes:
        result = outcome.result
        row = [outcome.run.cell.label, str(outcome.run.seed)]
        if result is None:
            row += [_rate(outcome.run.learning_rate), *[NOTHING] * len(metrics), "failed", "", ""]
        else:
            figures = [f"{value_of(result, m):.{digits_of(m)}f}" for m in metrics]
            row += [_rate(result["learning_rate"]), *figures,
                    _validation(result), f"{result['steps']:,}",
                    duration(result.get("seconds", 0))]  # fmt: skip
        rows.append([*row, outcome.folder.name])
    return Table(columns, rows)


def failed_table(failed: Sequence[Outcome]) -> Table:
    """What failed, and why."""
    columns = [Column("run", False), Column("error", False), Column("folder", False)]
    rows = [[o.run.label, o.error or "", o.folder.name] for o in failed]
    return Table(columns, rows)


def _mean(chosen: Sequence[Outcome], name: str) -> float:
    return statistics.fmean(float(result[name]) for result in _results(chosen))


def _results(chosen: Sequence[Outcome]) -> Results:
    return [outcome.result for outcome in chosen if outcome.result is not None]


def _validation(result: Mapping[str, Any]) -> str:
    return f"{validation_loss(result):.4f}" if result["validation"] else NOTHING


def _rate(rate: float | None) -> str:
    return "default" if rate is None else f"{rate:g}"


def _or_0(rate: float | None) -> float:
    return rate or 0.0


def _trained(chosen: Sequence[Outcome]) -> str:
    return f"{_results(chosen)[0]['trainable']:,}"


def _share(chosen: Sequence[Outcome]) -> str:
    result = _results(chosen)[0]
    share = 100 * result["trainable"] / result["total"]
    return "0" if not share else f"{share:.2g} %" if share < 10 else f"{share:.0f} %"


def _stored(chosen: Sequence[Outcome]) -> str:
    return size(_results(chosen)[0]["bytes"])


def _steps(chosen: Sequence[Outcome]) -> str:
    best, last = (round(_mean(chosen, name)) for name in ("best_step", "steps"))
    return f"{last:,}" if best == last else f"{best:,} of {last:,}"


def _epochs(chosen: Sequence[Outcome]) -> str:
    """Those until the weights that were kept."""
    found = [_epoch(o.folder, o.result["best_step"]) for o in chosen if o.result is not None]
    known = [epoch for epoch in found if epoch is not None]
    return f"{statistics.fmean(known):.1f}" if known else NOTHING


def _epoch(folder: Path, step: int) -> float | None:
    """The epoch of a step; None if that is not in the run's log."""
    epochs = [line["epoch"] for line in read_metrics(folder) if line["step"] == step]
    return epochs[0] if epochs else None


def step_time(results: Results) -> float:
    """The seconds of a step in the least disturbed of several runs; NaN if nothing was trained."""
    return min((float(r.get("seconds_per_step", math.nan)) for r in results), default=math.nan)


def _seconds_per_step(chosen: Sequence[Outcome]) -> str:
    seconds = step_time(_results(chosen))
    return NOTHING if math.isnan(seconds) else f"{seconds:.3g}"


def _training_time(chosen: Sequence[Outcome]) -> str:
    seconds = step_time(_results(chosen)) * _mean(chosen, "steps")
    return NOTHING if math.isnan(seconds) else duration(seconds)


def _peak_memory(chosen: Sequence[Outcome]) -> str:
    known = all("peak_memory" in result for result in _results(chosen))
    return size(_mean(chosen, "peak_memory")) if known else NOTHING


def size(count: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    return _in_unit(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), " B")


def count(number: float) -> str:
    """A number of parameters in short: 230 K."""
    return _in_unit(number, (("B", 1e9), ("M", 1e6), ("K", 1e3)), "")


def _in_unit(number: float, units: Sequence[tuple[str, float]], none: str) -> str:
    """In the largest unit that it has one of, with three digits or all those before the point."""
    for unit, factor in units:
        if number >= factor:
            digits = max(0, 2 - int(math.log10(number / factor)))
            shown = f"{number / factor:.{digits}f}"
            return f"{shown.rstrip('0').rstrip('.') if digits else shown} {unit}"
    return f"{number:.0f}{none}"


def duration(seconds: float) -> str:
    """A time in the unit that fits."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


# What a cell costs: a column's title, and what it shows of the runs at the chosen learning rate.
_COSTS: tuple[tuple[str, Callable[[Sequence[Outcome]], str]], ...] = (
    ("trained", _trained),
    ("share", _share),
    ("stored", _stored),
    ("steps", _steps),
    ("epochs", _epochs),
    ("s / step", _seconds_per_step),
    ("training", _training_time),
    ("peak memory", _peak_memory),
)
