"""``python benchmarks/compatibility.py --all``: runs the walk, prints, writes its page."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from walk.classes import TASKS, all_classes
from walk.judge import Cell
from walk.report import MARKS, page
from walk.run import walk
from walk.ways import WAY_NAMES


def names_of(text: str | None) -> list[str]:
    """Classes by name or by task, with commas; all if None.

    Raises:
        SystemExit: one that transformers does not list.
    """
    known = all_classes()
    if text is None:
        return list(known)
    chosen: dict[str, None] = {}
    for name in text.split(","):
        if name in TASKS:
            chosen.update({n: None for n, entry in known.items() if entry.task == name})
        elif name in known:
            chosen[name] = None
        else:
            raise SystemExit(f"--classes: got {name!r}, takes classes of transformers' lists")
    return list(chosen)


def ways_of(text: str | None) -> list[str] | None:
    """Ways by name, with commas; None for all.

    Raises:
        SystemExit: one that is not there.
    """
    if text is None:
        return None
    chosen = text.split(",")
    for name in chosen:
        if name not in WAY_NAMES:
            raise SystemExit(f"--ways: got {name!r}, takes {', '.join(WAY_NAMES)}")
    return chosen


def main(chosen: argparse.Namespace, console: Console) -> list[Cell]:
    """Runs what is chosen; all of it is written to the results beside the benchmark."""
    names, ways = names_of(chosen.classes), ways_of(chosen.ways)
    if chosen.classes is None and ways is None:
        chosen.output = chosen.output or Path(__file__).parents[1] / "results"
    columns = (TextColumn("{task.description:>40}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("classes", total=len(names))
        cells = walk(
            names,
            ways,
            chosen.jobs,
            chosen.time_limit,
            lambda name, _: progress.update(task, advance=1, description=name),
        )
    for cell in cells:
        if cell.status in ("wrong", "crash"):
            console.print(f"{cell.name}, {cell.way}: {cell.status}: {cell.message}", markup=False)
    console.print(_counted(cells))
    packages = {name: version(name) for name in ("fastprefix", "transformers", "torch")}
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)
        text = page(cells, packages)
        (chosen.output / "all_models.md").write_text(text, encoding="utf-8")
        chosen.json = chosen.json or chosen.output / "all_models.json"
    if chosen.json:
        chosen.json.write_text(as_json(cells, packages), encoding="utf-8")
    return cells


def as_json(cells: list[Cell], versions: dict[str, str]) -> str:
    """The cells with each reason once, a class a line.

    Of a cell: its status, then the error, if any, then the number of the reason, if any.
    """
    reasons = list(dict.fromkeys(cell.message for cell in cells if cell.message))
    numbers = {reason: number for number, reason in enumerate(reasons)}
    classes: dict[str, dict[str, Any]] = {}
    for cell in cells:
        entry = classes.setdefault(cell.name, {"task": cell.task, "ways": {}})
        error = None if cell.error is None else float(f"{cell.error:.2g}")
        entry["ways"][cell.way] = [cell.status, error, numbers.get(cell.message)]
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in classes.items()]
    head = f'{{"versions": {json.dumps(versions)},\n"reasons": {json.dumps(reasons, indent=0)},\n'
    return head + '"classes": {\n' + ",\n".join(lines) + "\n}}\n"


def _counted(cells: list[Cell]) -> Table:
    shown = [status for status in MARKS if any(cell.status == status for cell in cells)]
    table = Table(title="classes")
    for column in ("", "", *shown):
        table.add_column(column)
    for task in dict.fromkeys(cell.task for cell in cells):
        for way in dict.fromkeys(cell.way for cell in cells if cell.task == task):
            found = [cell for cell in cells if (cell.task, cell.way) == (task, way)]
            counts = Counter(cell.status for cell in found)
            table.add_row(task, way, *(str(counts[status] or "") for status in shown))
    return table
