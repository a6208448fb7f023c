"""Which models work, in which ways, with fastprefix and with PEFT.

Every cell (an architecture, a capability, a library) is a tiny random model that is given a
random prefix through the library's public door and compared with plain transformers, which runs
each row alone and unpadded with the same numbers concatenated. It passes, is wrong (a result came
back and was not right), is refused (an error), or does not apply (the bare model, without any
prefix, does not do it either). Both libraries run in one go.

With ``--all`` every model class of transformers that can be built small is walked instead, with
fastprefix alone, in the ways of :mod:`walk.ways`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compat.architectures import ARCHITECTURES
from compat.capabilities import CAPABILITIES
from compat.cells import Cell, run_architecture
from compat.libraries import LIBRARIES
from compat.report import insert, long_report, picture, short_table


def cells_of(
    architecture: str, capabilities: list[str], libraries: list[str], limit: float
) -> list[Cell]:
    """A worker's job."""
    import torch

    torch.set_num_threads(1)
    return list(run_architecture(architecture, capabilities, libraries, limit))


def run(
    architectures: list[str],
    capabilities: list[str],
    libraries: list[str],
    limit: float = 60.0,
    jobs: int = 1,
    console: Console | None = None,
) -> list[Cell]:
    """All cells, in the order of the arguments."""
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    found: dict[str, list[Cell]] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("architectures", total=len(architectures))
        if jobs == 1:
            for name in architectures:
                progress.update(task, description=name)
                found[name] = cells_of(name, capabilities, libraries, limit)
                progress.advance(task)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(jobs, mp_context=context) as pool:
                futures = {
                    pool.submit(cells_of, name, capabilities, libraries, limit): name
                    for name in reversed(architectures)  # encoder-decoders take longest
                }
                for future in as_completed(futures):
                    found[futures[future]] = future.result()
                    progress.update(task, advance=1, description=futures[future])
    return [cell for name in architectures for cell in found[name]]


def table(cells: list[Cell]) -> Table:
    """For the console: what each library does on each architecture, counted."""
    shown = Table(title="passes / wrong / refused")
    libraries = list(dict.fromkeys(cell.library for cell in cells))
    for column in ("", *libraries):
        shown.add_column(column)
    for name in dict.fromkeys(cell.architecture for cell in cells):
        row = []
        for library in libraries:
            c = Counter(
                cell.status
                for cell in cells
                if cell.architecture == name and cell.library == library
            )
            row.append(f"{c['passes']} / {c['wrong']} / {c['refused']}")
        shown.add_row(name, *row)
    return shown


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}, takes {', '.join(known)}")
        return names

    return parse


def main() -> None:
    """Runs, prints, writes the table, the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, known in (
        ("architectures", ARCHITECTURES),
        ("capabilities", CAPABILITIES),
        ("libraries", LIBRARIES),
    ):
        parser.add_argument(
            f"--{option}",
            type=_names(known),
            default=list(known),
            help=f"some of {', '.join(known)}, with commas; all if left out",
        )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for compatibility.md, .json, .png; results beside this file if all is run",
    )
    parser.add_argument("--json", type=Path, help="file for the cells alone")
    parser.add_argument("--page", type=Path, help="file whose marked part the short table becomes")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        help="CPU seconds for a cell; with --all for a class",
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--all", action="store_true", help="walk every class of transformers")
    parser.add_argument("--classes", help="with --all: some classes or tasks, with commas")
    parser.add_argument("--ways", help="with --all: some ways of use, with commas")
    chosen = parser.parse_args()
    if chosen.all:
        from walk.command import main as walk_all

        walk_all(chosen, Console())
        return
    if chosen.classes or chosen.ways:
        parser.error("--classes and --ways go with --all")
    everything = (list(ARCHITECTURES), list(CAPABILITIES), list(LIBRARIES))
    if (chosen.architectures, chosen.capabilities, chosen.libraries) == everything:
        chosen.output = chosen.output or Path(__file__).parent / "results"
    console = Console()
    cells = run(
        chosen.architectures,
        chosen.capabilities,
        chosen.libraries,
        chosen.time_limit,
        chosen.jobs,
        console,
    )
    console.print(table(cells))
    for cell in cells:
        if cell.library == "fastprefix" and cell.status in ("wrong", "refused"):
            place = f"{cell.architecture}, {CAPABILITIES[cell.capability].title}"
            console.print(f"{place}: {cell.status}: {cell.message}", markup=False)
    versions = {name: version(name.lower()) for name in chosen.libraries}
    short = short_table(cells, versions)
    with_packages = {**versions, **{n: version(n) for n in ("transformers", "torch")}}
    content = json.dumps(
        {"versions": with_packages, "cells": [asdict(cell) for cell in cells]}, indent=1
    )
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)
        report = long_report(cells, with_packages, short)
        (chosen.output / "compatibility.md").write_text(report, encoding="utf-8")
        (chosen.output / "compatibility.json").write_text(content + "\n")
        picture(cells, versions, chosen.output / "compatibility.png")
    if chosen.json:
        chosen.json.write_text(content + "\n")
    if chosen.page:
        insert(chosen.page, short)


if __name__ == "__main__":
    main()
