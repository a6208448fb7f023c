"""The figures of a comparison as pictures. Each says on which machine it was measured."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastprefix.training.compare import Comparison, Outcome
from fastprefix.training.grid import Cell, field_title, shown_value
from fastprefix.training.run import read_metrics
from fastprefix.training.tables import (
    Figure,
    Results,
    count,
    is_better,
    metric_title,
    results_of,
    scored_cells,
    step_time,
    value_of,
)

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.ticker import FuncFormatter, NullLocator
except ImportError as error:
    raise ImportError("a report needs the package matplotlib (pip install matplotlib)") from error

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4C9A", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _FAINT = "#333333", "#8a8a8a"
_STYLE: Any = {
    "axes.edgecolor": "#bbbbbb",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": "#ececec",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "fastprefix",  # the same picture has the same bytes
    "text.color": _INK,
    "text.parse_math": False,  # a dollar in a title is a dollar
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_MOST_LINES = 10  # in a picture of losses
_WIDTH = 10.4  # of every picture, in inches; heights differ


@dataclass(frozen=True)
class Picture:
    """A picture in two formats.

    Attributes:
        name: fit for a file.
        caption: what it shows.
        svg: the text of an SVG file.
        png: the content of a PNG file.
    """

    name: str
    caption: str
    svg: str
    png: bytes


def draw(comparison: Comparison, machine: str) -> dict[str, Picture]:
    """All pictures that the comparison has figures for, by name.

    Args:
        comparison: with at least one finished run.
        machine: where it was measured, written below each picture.
    """
    pictures = {}
    with matplotlib.rc_context(_STYLE):
        for name, caption, drawing in _drawings(comparison):
            layout: Any = drawing.get_layout_engine()
            low = 0.16 / drawing.get_figheight()  # room for the machine
            layout.set(rect=(0, low, 1, 1 - low))
            drawing.text(0.995, 0.01, machine, ha="right", va="bottom", fontsize=6.5, color=_FAINT)
            svg, png = io.StringIO(), io.BytesIO()
            drawing.savefig(svg, format="svg", metadata={"Date": None})
            drawing.savefig(png, format="png", dpi=150, metadata={"Software": None})
            pictures[name] = Picture(name, caption, svg.getvalue(), png.getvalue())
    return pictures


def _drawings(comparison: Comparison) -> Iterator[tuple[str, str, Drawing]]:
    metric = comparison.config.deciding_metric
    if len(scored_cells(comparison)) > 1:
        yield (
            "methods",
            f"The methods by {metric_title(metric)}, the best at the top. Small dots are seeds, "
            "the bar is their standard deviation.",
            _methods(comparison),
        )
        yield (
            "parameters",
            f"What the methods train, and the {metric_title(metric)} that they reach.",
            _parameters(comparison),
        )
    for axis in comparison.config.grid:
        varied = [cell for cell, _ in scored_cells(comparison) if axis in cell.point]
        if len({repr(cell.point[axis]) for cell in varied}) > 1:
            yield (
                "grid-" + field_title(axis).replace(" ", "-"),
                f"What {field_title(axis)} changes. Bars are the standard deviation over seeds, "
                "dashed lines are other methods that train something.",
                _along(comparison, axis, varied),
            )
    shown = _cells_with_losses(comparison)
    if any(read_metrics(o.folder) for cell in shown for o in comparison.chosen(cell)):
        every = len(shown) == len(scored_cells(comparison))
        yield (
            "losses",
            "Loss while training, a line for each seed. Dots mark the weights that were kept."
            + ("" if every else " Only the best setting of each method is shown."),
            _losses(comparison, shown),
        )


def _methods(comparison: Comparison) -> Drawing:
    metric = comparison.config.deciding_metric
    cells = scored_cells(comparison)
    cells.sort(key=lambda each: _sortable(metric, each[1].mean))
    drawing = _drawing(0.75 + 0.27 * len(cells))
    ax = drawing.subplots()
    for row, (cell, figure) in enumerate(cells):
        look = _look(comparison, cell)
        seeds = [_finite(value_of(result, metric)) for result in results_of(comparison, cell)]
        if len(seeds) > 1:
            ax.plot(seeds, [row] * len(seeds), ".", color=look["color"], ms=4, alpha=0.45)
        _bar(ax, figure, row, look)
    ax.set_yticks(range(len(cells)), [cell.label for cell, _ in cells])
    ax.set_ylim(-0.6, len(cells) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(_axis_title(metric))
    return drawing


def _bar(ax: Axes, figure: Figure, row: int, look: Mapping[str, Any]) -> None:
    ax.errorbar(
        _finite(figure.mean), row, xerr=_finite(figure.spread), capsize=2.5, ms=6.5,
        elinewidth=1.2, **look,
    )  # fmt: skip


def _parameters(comparison: Comparison) -> Drawing:
    metric = comparison.config.deciding_metric
    drawing = _drawing(3.6)
    ax = drawing.subplots()
    by_method: dict[str, list[tuple[float, Cell, Figure]]] = {}
    for cell, figure in scored_cells(comparison):
        trained = results_of(comparison, cell)[0]["trainable"]
        by_method.setdefault(cell.method, []).append((trained, cell, figure))
    for method, points in by_method.items():
        look = _look(comparison, points[0][1])
        drawn = sorted((p for p in points if p[0] > 0), key=lambda point: point[0])
        if drawn:
            ax.errorbar(
                [trained for trained, _, _ in drawn],
                [_finite(figure.mean) for _, _, figure in drawn],
                [_finite(figure.spread) for _, _, figure in drawn],
                capsize=2.5, ms=6, lw=0.8, elinewidth=1.2, label=method, **look,
            )  # fmt: skip
        for trained, _, figure in points:
            if trained == 0:  # has no place on a logarithmic axis
                ax.axhline(_finite(figure.mean), ls="--", lw=1, color=look["color"],
                           label=f"{method} (trains nothing)")  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: count(number)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="trained parameters", ylabel=_axis_title(metric))
    drawing.legend(loc="outside right upper")
    return drawing


def _step_time(results: Results) -> Figure:
    return Figure(step_time(results), 0.0, len(results))


def _peak_memory(results: Results) -> Figure:
    return Figure.of(result.get("peak_memory", math.nan) / 1e6 for result in results)


# What is drawn along an axis of the grid: a title, and the figure of a cell's results.
_COSTS = (("seconds per step", _step_time), ("peak memory, MB", _peak_memory))


def _along(comparison: Comparison, axis: str, varied: Sequence[Cell]) -> Drawing:
    """The deciding metric and what it costs, along an axis of the grid."""
    metric = comparison.config.deciding_metric

    def scores(results: Results) -> Figure:
        return Figure.of(value_of(result, metric) for result in results)

    panels = [(_axis_title(metric), scores), *_COSTS]
    values = list({repr(cell.point[axis]): cell.point[axis] for cell in varied}.values())
    places = _Places(values)
    drawing = _drawing(3.2)
    lines: dict[str, list[Cell]] = {}
    for cell in varied:
        lines.setdefault(_without(cell, axis), []).append(cell)
    axes: Any = drawing.subplots(1, len(panels))
    for ax, (title, figure_of) in zip(axes, panels, strict=True):
        for number, (label, cells) in enumerate(lines.items()):
            figures = [figure_of(results_of(comparison, cell)) for cell in cells]
            ax.errorbar(
                [places.of(cell.point[axis]) for cell in cells],
                [_finite(figure.mean) for figure in figures],
                [_finite(figure.spread) for figure in figures],
                capsize=2.5, ms=5, label=label, ls=_dash(number), elinewidth=1.2,
                **{**_look(comparison, cells[0]), **_variant(comparison, lines, number)},
            )  # fmt: skip
        places.label(ax)
        ax.set(xlabel=field_title(axis), title=title)
    for cell, figure in scored_cells(comparison):
        if axis not in cell.point and results_of(comparison, cell)[0]["trainable"]:
            colour = _look(comparison, cell)["color"]
            axes[0].axhline(
                _finite(figure.mean), ls=(0, (4, 3)), lw=1, color=colour, label=cell.label
            )
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right upper")
    return drawing


class _Places:
    """Where the values of an axis lie: at their numbers, or side by side.

    Numbers that reach over a factor of 8 are drawn on a logarithmic axis.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = list(values)
        self._numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        self._log = self._numbers and min(values) > 0 and max(values) / min(values) >= 8

    def of(self, value: Any) -> float:
        return float(value) if self._numbers else float(self._values.index(value))

    def label(self, ax: Axes) -> None:
        if self._log:
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(
            [self.of(value) for value in self._values], [shown_value(v) for v in self._values]
        )
        ax.margins(x=0.12)


def _cells_with_losses(comparison: Comparison) -> list[Cell]:
    """All cells, or if they are too many to tell apart the best of each method."""
    metric = comparison.config.deciding_metric
    scored = scored_cells(comparison)
    if len(scored) <= _MOST_LINES:
        return [cell for cell, _ in scored]
    best: dict[str, tuple[Cell, Figure]] = {}
    for cell, figure in scored:
        known = best.get(cell.method)
        if known is None or is_better(metric, figure.mean, known[1].mean):
            best[cell.method] = cell, figure
    return [cell for cell, _ in best.values()]


def _losses(comparison: Comparison, cells: Sequence[Cell]) -> Drawing:
    drawing = _drawing(3.5)
    left, right = drawing.subplots(1, 2)
    labels: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        several = len({each.method for each in cells}) < len(cells)
        colour = _COLOURS[number % len(_COLOURS)] if several else _look(comparison, cell)["color"]
        look: dict[str, Any] = {"color": colour, "ls": _dash(number // len(_COLOURS)), "lw": 1.1}
        for outcome in comparison.chosen(cell):
            for ax, name in ((left, "loss"), (right, "eval_loss")):
                drawn = _line(ax, outcome, name, look)
                if drawn is not None:
                    labels.setdefault(cell.label, drawn)
    left.set(title="training loss, smoothed", xlabel="step")
    right.set(title="validation loss", xlabel="step")
    drawing.legend(labels.values(), labels.keys(), loc="outside right upper")
    return drawing


def _line(ax: Axes, outcome: Outcome, name: str, look: Mapping[str, Any]) -> Any:
    lines = [line for line in read_metrics(outcome.folder) if name in line]
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    losses = [_finite(line[name]) for line in lines]
    if name == "loss":
        return ax.plot(steps, _smooth(losses), alpha=0.75, **look)[0]
    assert outcome.result is not None
    best = outcome.result["best_step"]
    if best in steps:
        ax.plot(best, losses[steps.index(best)], "o", ms=4, color=look["color"])
    return ax.plot(steps, losses, alpha=0.75, **look)[0]


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, a twentieth of all."""
    window = max(1, len(losses) // 20)
    parts = [losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses))]
    return [sum(part) / len(part) for part in parts]


def _drawing(height: float) -> Drawing:
    return Drawing(figsize=(_WIDTH, height), layout="constrained")


def _look(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """Colour and marker of a method."""
    number = list(comparison.config.methods).index(cell.method)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number // len(_COLOURS) % len(_MARKERS)],
    }


def _variant(comparison: Comparison, lines: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Colours by line where one method has several."""
    alone = len(lines) <= len(comparison.config.methods) and all(
        label in comparison.config.methods for label in lines
    )
    return {} if alone else {"color": _COLOURS[number % len(_COLOURS)]}


def _dash(number: int) -> str:
    return ("-", "--", ":", "-.")[number % 4]


def _without(cell: Cell, axis: str) -> str:
    """A cell's label without one axis."""
    others = {name: value for name, value in cell.point.items() if name != axis}
    return Cell(cell.method, others, cell.values, cell.rates).label


def _finite(value: float | None) -> float:
    """Not a number in place of what cannot be drawn."""
    return value if value is not None and math.isfinite(value) else math.nan


def _sortable(metric: str, mean: float) -> float:
    """A key that puts the best last, which is at the top, and what is no number first."""
    if not math.isfinite(mean):
        return -math.inf
    return mean if is_better(metric, 1.0, 0.0) else -mean


def _axis_title(metric: str) -> str:
    direction = "higher" if is_better(metric, 1.0, 0.0) else "lower"
    return f"{metric_title(metric)} ({direction} is better)"
