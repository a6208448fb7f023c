"""How long the suite should take on a GPU: counted cases, measured compilation, assumptions.

`make gpu-cache` counts the kernels of every case and measures how long they compile, and writes
both to `benchmarks/results/gpu_kernels.json`. What only a GPU could say is assumed, in ASSUMED.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from . import model_rows, operator_rows
from .shapes import SHAPES, Shape
from .stages import ROOT, WORKERS, pytest_command

COUNTED = ROOT / "benchmarks" / "results" / "gpu_kernels.json"
# Seconds, unless said otherwise. Nothing here was measured on a GPU.
ASSUMED = {
    "kernels": 240,  # their number, until `make gpu-cache` has counted them
    "kernel": 3.0,  # compilation of one by one processor, until it has measured that
    "start": 10.0,  # of a stage's processes: imports, the device's context
    "numerics": 1.5,  # a test, most of it the reference in float64
    "execution": 4.0,  # a test; some compile with torch.compile
    "models": 8.0,  # a test, most of it generation without graphs
    "models compiled": 45.0,  # a test that transformers compiles
    "side": 0.7,  # of a timed shape: check, capture, replays
}


def remember(stage: dict[str, Any], arch: str) -> None:
    """Writes the counts of a compilation that started with an empty folder."""
    units = [unit for unit in stage["units"] if unit.get("compiled")]
    if any(unit.get("found") for unit in stage["units"]) and COUNTED.exists():
        print("kernels were found in the folder: the counts stay as they were")
        return
    import triton

    found = {
        "arch": arch, "triton": triton.__version__,
        "kernels": sum(len(unit["compiled"]) for unit in units),
        "processor_s": round(sum(unit["processor_s"] for unit in units), 1),
        "by_case": {u["name"]: [len(u["compiled"]), u["processor_s"]] for u in units},
    }  # fmt: skip
    COUNTED.write_text(json.dumps(found, indent=1) + "\n")


def counted() -> dict[str, Any]:
    """What :func:`remember` wrote, or what is assumed until then."""
    if COUNTED.exists():
        return json.loads(COUNTED.read_text())
    kernels = int(ASSUMED["kernels"])
    return {
        "arch": "no device yet (assumed)", "triton": "-", "kernels": kernels,
        "processor_s": kernels * ASSUMED["kernel"],
    }  # fmt: skip


def tests_of(file: str) -> list[str]:
    """The names of the tests in a file of tests/gpu."""
    command = [sys.executable, *pytest_command(file), "--collect-only"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment())
    return [line for line in done.stdout.splitlines() if "::" in line]


def _environment() -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}


def timed_sides(s: Shape) -> int:
    """How many sides a shape has where no package is installed: see fastprefix.bench.peers."""
    forward = 2 * (s.work != "train")  # Hydragen, and keys that are concatenated
    rows = s.work == "decode" and s.Hq != s.Hkv  # SDPA with a group's heads as rows
    return 2 + forward + rows + 2 * s.flex


def expected(jobs: int) -> list[tuple[str, str, float]]:
    """(stage, what was counted, seconds) of every stage, no kernels carried along."""
    known, start = counted(), ASSUMED["start"]
    features, models = tests_of("test_features.py"), tests_of("test_models.py")
    execution = [*tests_of("test_graphs.py"), *tests_of("test_execution.py")]
    compiled = [name for name in models if "compiled" in name]
    plain = len(models) - len(compiled)
    flex = sum(2 * operator_rows.FLEX_SECONDS[s.work] for s in SHAPES if s.flex)
    sides = sum(map(timed_sides, SHAPES))
    cold = start + known["processor_s"] / jobs
    rows = []
    rows.append(("about", "device and peaks", start))
    rows.append((
        "kernels", f"{known['kernels']} kernels, {known['processor_s']:.0f} s of compilation by "
        f"{jobs} processes; {start:.0f} s if they were carried along", cold,
    ))  # fmt: skip
    rows.append((
        "numerics", f"{len(features)} tests in {WORKERS} processes",
        start + ASSUMED["numerics"] * len(features) / WORKERS,
    ))  # fmt: skip
    rows.append((
        "execution", f"{len(execution)} tests in {WORKERS} processes",
        start + ASSUMED["execution"] * len(execution) / WORKERS,
    ))  # fmt: skip
    rows.append((
        "models", f"{plain} tests, and {len(compiled)} that compile, in {WORKERS} processes",
        start + ASSUMED["models"] * plain / WORKERS + ASSUMED["models compiled"],
    ))  # fmt: skip
    rows.append((
        "operator", f"{sides} sides of {len(SHAPES)} shapes; FlexAttention compiles "
        f"{flex:.0f} s", start + ASSUMED["side"] * sides + flex,
    ))  # fmt: skip
    rows.append((
        "model figures", f"{len(model_rows.ROWS)} rows",
        start + sum(model_rows.needs(row) for row in model_rows.ROWS),
    ))  # fmt: skip
    return rows


def show(jobs: int) -> None:
    """Prints the table."""
    known = counted()
    title = "Expected on a GPU: counted cases, assumed seconds; nothing was measured there"
    table = Table(title=title)
    for name in ("stage", "counted", "s"):
        table.add_column(name, justify="right" if name == "s" else "left")
    rows = expected(jobs)
    for stage, what, seconds in rows:
        table.add_row(stage, what, f"{seconds:.0f}")
    table.add_row("all", "", f"{sum(seconds for _, _, seconds in rows):.0f}")
    table.caption = (
        f"compilation: for {known['arch']} with Triton {known['triton']}, where `make gpu-cache` "
        "ran last; benchmarks/device/expected.py holds the assumptions"
    )
    Console(width=110).print(table)
