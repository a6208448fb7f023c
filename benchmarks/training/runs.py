"""All the runs of a comparison, in worker processes; what is done already is not done again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from fastprefix.files import read_json

from .costs import measured
from .plan import (
    Budget,
    Method,
    Run,
    TaskName,
    best_rates,
    fingerprint,
    first_runs,
    further_runs,
)
from .train import Source, train_to_file, write_whole

Result = dict[str, Any]


def digest_of(source: Source) -> str:
    """Identifies a model and its data: names and contents of the files."""
    digest = hashlib.sha256(Path(source.model).name.encode())
    for entry in source.data:
        path = Path(entry)
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        for file in files:
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def known(file: Path, fingerprint: str) -> Result | None:
    """What was found before, if it was found with the same budget, model and data.

    Raises:
        ValueError: the file is damaged.
    """
    if not file.is_file():
        return None
    result = read_json(file)
    return result if result.get("fingerprint") == fingerprint else None


def _worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the workers share the processor
    logging.set_verbosity_error()  # every fresh classifier would be told that its head is new
    logging.disable_progress_bar()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise train on, for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def do(
    runs: Sequence[Run],
    source: Source,
    folder: Path,
    jobs: int,
    done: Callable[[Run, bool], object],
) -> list[tuple[Run, Result]]:
    """The results of runs, from their files where they are there.

    Args:
        runs: what to run.
        source: the model and data of their task.
        folder: where each run leaves a file; made if missing.
        jobs: worker processes, of one thread each.
        done: called after each run, with whether its result was there already.

    Raises:
        RuntimeError: runs failed. All others are finished first, and their files kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    material = digest_of(source)
    results: dict[Run, Result] = {}
    for run in runs:
        result = known(folder / f"{run.key}.json", run.fingerprint(material))
        if result is not None:
            results[run] = result
            done(run, True)
    missing = [run for run in runs if run not in results]
    failures = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_worker) as pool:
        futures = {}
        for run in missing:
            file = folder / f"{run.key}.json"
            futures[pool.submit(train_to_file, run, source, file, run.fingerprint(material))] = run
        for future in as_completed(futures):
            run = futures[future]
            try:
                future.result()
            except Exception as error:
                failures.append(f"{run.key}: {error!r}")
            else:
                results[run] = read_json(folder / f"{run.key}.json")
            done(run, False)
    if failures:
        raise RuntimeError("\n".join(["runs failed:", *failures]))
    return [(run, results[run]) for run in runs]


def compare(
    task: TaskName,
    methods: Sequence[Method],
    budget: Budget,
    source: Source,
    folder: Path,
    jobs: int,
    done: Callable[[Run, bool], object],
) -> tuple[list[tuple[Run, Result]], dict[str, float]]:
    """First every method at its learning rates, then all others at the best of them.

    Returns:
        The runs with their results, and each method's learning rate.
    """
    first = do(first_runs(task, methods, budget), source, folder, jobs, done)
    rates = best_rates({run: result["dev_loss"] for run, result in first}, methods)
    further = further_runs(task, rates, methods, budget)
    return [*first, *do(further, source, folder, jobs, done)], rates


def costs(
    task: TaskName, methods: Sequence[Method], source: Source, budget: Budget, folder: Path
) -> dict[str, dict[str, float]]:
    """What :func:`training.costs.measured` says, measured once.

    Args:
        task: see `measured`, like methods, source and budget.
        methods: see task.
        source: see task.
        budget: see task.
        folder: where the figures are kept, as those of runs.
    """
    file = folder / f"{task}-costs.json"
    built = {method.name: method.built_from for method in methods}
    mark = fingerprint(task, built, asdict(budget), digest_of(source))
    result = known(file, mark)
    if result is None:
        result = measured(task, methods, source, budget) | {"fingerprint": mark}
        write_whole(file, result)
    return {what: result[what] for what in ("seconds", "megabytes")}


def number_of_runs(task: TaskName, methods: Iterable[Method], budget: Budget) -> int:
    """How many :func:`compare` makes."""
    methods = list(methods)
    rates = {m.name: (m.rates or (0.0,))[0] for m in methods}
    return len(first_runs(task, methods, budget)) + len(further_runs(task, rates, methods, budget))
