"""Pictures of records: time and memory by prefix length and by batch, and where one copy wins.

Every picture says what it was measured on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pictures need the package matplotlib (pip install matplotlib)") from error

from fastprefix.bench.tables import Record, median, origin, ratio

matplotlib.use("Agg")
Family = list[Record]  # records that differ in B and P alone


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draws what the records have enough lengths or batches for.

    Returns:
        The files: for each suite and work ``bench_*.png``, and ``bench_*_map.png`` where several
        batches meet several lengths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, family in families(records).items():
        lengths, batches = ({line["fields"][axis] for line in family} for axis in "PB")
        if len(lengths) < 2 and len(batches) < 2:
            continue
        files.append(folder / f"bench_{name}.png")
        _curves(family).savefig(files[-1], dpi=140)
        if len(lengths) > 1 and len(batches) > 1:
            files.append(folder / f"bench_{name}_map.png")
            _map(family).savefig(files[-1], dpi=140)
    return files


def families(records: Sequence[Record]) -> dict[str, Family]:
    """The largest family of every suite and work, by a name for files."""
    groups: dict[str, dict[tuple[Any, ...], Family]] = {}
    for line in records:
        fields = {k: v for k, v in line["fields"].items() if k not in ("B", "P", "flex")}
        name = "_".join([line["suite"], *([fields["work"]] if "work" in fields else [])])
        groups.setdefault(name, {}).setdefault(tuple(fields.items()), []).append(line)
    return {name: max(found.values(), key=len) for name, found in groups.items()}


def _curves(family: Family) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for column, (axis, other) in enumerate((("P", "B"), ("B", "P"))):
        counts = Counter(line["fields"][other] for line in family)
        # of the values that most records share the largest
        fixed = max(counts, key=lambda value: (counts[value], value))
        lines = [line for line in family if line["fields"][other] == fixed]
        lines.sort(key=lambda line: line["fields"][axis])
        words = {"P": "prefix length", "B": "batch"}
        for row, what in enumerate(("ms", "MB")):
            axes = panels[row][column]
            _panel(axes, lines, axis, what)
            axes.set_title(f"{words[other]} {fixed}", fontsize=9)
            axes.set_xlabel(words[axis])
    panels[0][0].legend(fontsize=7)
    _say(figure, family)
    return figure


def _panel(axes: Axes, lines: Family, axis: str, what: str) -> None:
    figure = next(iter(lines[0]["figures"]))
    for name in dict.fromkeys(name for line in lines for name in line["providers"]):
        points = []
        for line in lines:
            value = median(line, name, figure)
            if what == "MB":
                peak = line["providers"].get(name, {}).get("peak_bytes")
                value = None if peak is None else peak / 1e6
            if value is not None:
                points.append((line["fields"][axis], value))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=3, linewidth=1)
    axes.set_ylabel(lines[0]["figures"][figure] if what == "ms" else "peak MB beyond the inputs")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_yscale("log" if what == "ms" else "symlog")
    values = sorted({line["fields"][axis] for line in lines})
    axes.set_xticks(values, list(map(str, values)))
    axes.grid(True, alpha=0.3)


def _map(family: Family) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    key = next(iter(family[0]["figures"]))
    lengths, batches = (sorted({line["fields"][axis] for line in family}) for axis in "PB")
    cells = {(line["fields"]["B"], line["fields"]["P"]): ratio(line, key) for line in family}
    grid = [[cells.get((B, P)) or float("nan") for P in lengths] for B in batches]
    image = axes.imshow(
        grid, norm=TwoSlopeNorm(1, 0, 4), cmap="RdBu", origin="lower", aspect="auto"
    )
    for y, B in enumerate(batches):
        for x, P in enumerate(lengths):
            if cells.get((B, P)):
                axes.text(x, y, f"{cells[B, P]:.1f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(lengths)), list(map(str, lengths)))
    axes.set_yticks(range(len(batches)), list(map(str, batches)))
    axes.set_xlabel("prefix length")
    axes.set_ylabel("batch")
    figure.colorbar(image, label="best peer's time over fastprefix's")
    axes.set_title("above 1, blue: one copy of the prefix wins", fontsize=9)
    _say(figure, family)
    return figure


def _say(figure: Figure, family: Family) -> None:
    """What the picture shows, and what it was measured on."""
    fields = family[0]["fields"]
    said = ", ".join(f"{k} {v}" for k, v in fields.items() if k not in ("B", "P", "flex", "tiny"))
    figure.suptitle(f"{family[0]['suite']}: {said}", fontsize=10)
    figure.supxlabel(origin(family[-1]), fontsize=7)
