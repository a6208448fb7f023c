"""What a training step of each method costs: seconds and memory, all methods in turn.

Seconds and memory are measured in one process each. Time needs the ordinary allocator; memory needs
one that returns every freed block to the system.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from fastprefix.training.memory import ALLOCATOR_ENVIRONMENT, PeakMemory

from .material import InfixCollator
from .plan import METHODS, Budget, Method, TaskName
from .train import Source, fresh, material_of

What = Literal["seconds", "megabytes"]

# A fresh Python that finds this package.
_MEASURE = f"""
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
from training.costs import main
main()
"""


class _Step:
    """A method's training step, always on the same batch."""

    def __init__(self, task: TaskName, method: Method, source: Source, budget: Budget) -> None:
        data = material_of(source, task, budget)
        self._built, _ = fresh(task, method, 0, source, data, budget)
        collator = InfixCollator(data.collator) if self._built.infix else data.collator
        self._batch = collator([data.train[i] for i in range(budget.batch_size)])
        parameters = [p for p in self._built.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        self._bf16 = budget.bf16
        self._built.model.train()

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16) if self._bf16 else nullcontext():
            loss = self._built.model(**self._batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def measure(
    what: What,
    task: TaskName,
    methods: Sequence[Method],
    source: Source,
    budget: Budget,
    repeats: int = 1,
) -> dict[str, float]:
    """Medians by method's name, of steps after a first one that does not count.

    Seconds are taken in two rounds over all methods, forwards and backwards. Megabytes are what
    the second step's peak lies above the state before the first: gradients, the optimizer's
    state and activations, without the model.
    """
    found: dict[str, list[float]] = {method.name: [] for method in methods}
    rounds = [methods, methods[::-1]] if what == "seconds" else [methods]
    for order in rounds:
        for method in order:
            step = _Step(task, method, source, budget)
            if what == "megabytes":
                with PeakMemory() as peak:
                    step()
                    step()
                found[method.name].append(peak.megabytes)
            else:
                step()
                for _ in range(repeats):
                    start = time.perf_counter()
                    step()
                    found[method.name].append(time.perf_counter() - start)
            del step
            gc.collect()
    return {name: statistics.median(values) for name, values in found.items()}


def measured(
    task: TaskName, methods: Sequence[Method], source: Source, budget: Budget
) -> dict[str, dict[str, float]]:
    """Seconds and megabytes by method's name, each measured in a process of its own.

    Raises:
        RuntimeError: a measurement failed.
    """
    found: dict[str, dict[str, float]] = {}
    for what in ("seconds", "megabytes"):
        spec = {
            "what": what,
            "task": task,
            "methods": [method.name for method in methods],
            "source": asdict(source),
            "budget": asdict(budget),
        }
        result = subprocess.run(
            [sys.executable, "-c", _MEASURE, json.dumps(spec)],
            env=os.environ | (ALLOCATOR_ENVIRONMENT if what == "megabytes" else {}),
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{what} of {task}: {result.stderr[-2000:]}")
        found[what] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    """One measurement; its argument is the JSON of :func:`measured`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec")
    spec: dict[str, Any] = json.loads(parser.parse_args().spec)
    by_name = {method.name: method for method in METHODS[spec["task"]]}
    source = Source(spec["source"]["model"], tuple(spec["source"]["data"]))
    methods = [by_name[name] for name in spec["methods"]]
    budget = Budget(**spec["budget"])
    print(json.dumps(measure(spec["what"], spec["task"], methods, source, budget)))
