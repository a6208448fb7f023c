"""The stages of the suite, in the order of their importance, and how one is run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import BEFORE, DEADLINE, NO_TIME, RECORDS, SUITE_ON, Record

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "benchmarks" / "gpu.py"
ATTEMPTS = 3  # a process that dies is started again, without what it died in
WORKERS = 8  # processes of tests that share the device


@dataclass(frozen=True)
class Stage:
    """One part of the suite.

    Attributes:
        name: in the JSON.
        commands: arguments after `python`, run side by side; they share a file of records.
        doc: what it shows.
        environment: what they need beside the suite's own.
        share: of the time that is left, the most that it may take. A stage that hangs leaves
            something to the others.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    doc: str
    environment: dict[str, str] = field(default_factory=dict)
    share: float = 0.6


def pytest_command(*files: str, workers: int = 1, only: str = "") -> tuple[str, ...]:
    """Tests of the GPU suite; several processes where pytest-xdist is installed."""
    many = workers > 1 and importlib.util.find_spec("xdist") is not None
    spread = ("-n", str(workers)) if many else ("-p", "no:xdist")
    chosen = ("-k", only) if only else ()
    paths = [str(ROOT / "tests" / "gpu" / file) for file in files]
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *spread, *chosen, *paths)


def part(name: str, *options: str) -> tuple[str, ...]:
    """A part that `benchmarks/gpu.py` runs in a process of its own."""
    return (str(COMMAND), "--part", name, *options)


def compilation(arch: str, jobs: int) -> Stage:
    """Compiles what the later stages launch, on a simulated device, without the real one."""
    shards = max(1, jobs // 3)
    return Stage(
        "kernels",
        (
            pytest_command("test_features.py", "test_models.py", workers=max(1, jobs - shards - 1)),
            *(part("operator", "--shard", f"{i}/{shards}") for i in range(shards)),
            part("models"),
        ),
        "every kernel of the later stages compiled, or found in the folder that was carried along",
        {SUITE_ON: arch, "CUDA_VISIBLE_DEVICES": ""},
    )


def on_device(arch: str | None, jobs: int) -> list[Stage]:
    """All stages on a GPU; without an architecture of NVIDIA nothing is compiled beforehand."""
    first = [compilation(arch, jobs)] if arch is not None else []
    return [
        Stage("about", (part("about"),), "the device, its peaks, versions, the commit"),
        *first,
        Stage(
            "numerics", (pytest_command("test_features.py", workers=WORKERS),),
            "every feature against float64: forward, backward, decoding",
        ),
        Stage(
            "execution",
            (pytest_command("test_graphs.py", "test_execution.py", workers=WORKERS),),
            "CUDA graphs, compilation, synchronisation, memory, the same bits in every run",
        ),
        Stage(
            "models", (pytest_command("test_models.py", workers=WORKERS),),
            "generate and training steps of a model against the concatenation",
        ),
        Stage("operator", (part("operator"),), "the operator against its peers, timed"),
        Stage(
            "model figures", (part("models"),), "tokens per second, step time, peak memory",
            share=1.0,
        ),
    ]  # fmt: skip


def reduced() -> list[Stage]:
    """A few cases of every stage in Triton's interpreter: that the suite itself works."""
    environment = {SUITE_ON: "cpu", "TRITON_INTERPRET": "1"}
    cases = (
        "training and softcap or decoding and sinks",
        "replay and decode",
        "dynamic and one or checkpointing and several or compiled and one",
    )
    files = ("test_features.py", "test_graphs.py", "test_models.py")
    tests = pytest_command(*files, only=f"({') or ('.join(cases)})")
    stages = {
        "about": (part("about"), "versions, the commit"),
        "tests": (tests, "features, a tiny model; graphs skip"),
        "operator": (part("operator"), "that the sides agree"),
        "model figures": (part("models"), "that the sides agree"),
    }
    return [
        Stage(name, (command,), doc, environment, share=1.0)
        for name, (command, doc) in stages.items()
    ]


def run(stage: Stage, log: Path, deadline: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a stage until it ends or its time is over; what did not run is listed with a reason.

    Args:
        stage: what to run.
        log: the file to which everything that is printed is added.
        deadline: seconds since the epoch at which the suite is stopped.
        environment: of the processes.
    """
    deadline = time.time() + stage.share * (deadline - time.time())
    with tempfile.TemporaryDirectory() as folder:
        return _run(stage, Path(folder), log, deadline, environment)


def _run(
    stage: Stage, folder: Path, log: Path, deadline: float, environment: dict[str, str]
) -> dict[str, Any]:
    records = folder / "records.jsonl"
    environment = {
        **environment, **stage.environment, RECORDS: str(records), DEADLINE: str(deadline),
    }  # fmt: skip
    began, statuses = time.time(), [0]
    for attempt in range(ATTEMPTS):
        if time.time() >= deadline:
            break
        if attempt:
            before = folder / f"before-{attempt}.jsonl"
            before.write_bytes(records.read_bytes() if records.exists() else b"")
            environment[BEFORE] = str(before)
        statuses = _side_by_side(stage.commands, log, deadline, environment)
        if all(status in (0, 1, 5) for status in statuses):  # pytest's: passed, failed, no tests
            break
    found = Record.read(records)
    units, missing = _divided(found, late=time.time() >= deadline)
    if not found.planned:
        why = NO_TIME if time.time() >= deadline else f"nothing began; see {log.name}"
        missing.append({"name": stage.name, "why": why})
    return {
        "name": stage.name, "doc": stage.doc, "seconds": round(time.time() - began, 1),
        "exit": statuses, "outcomes": dict(Counter(line["outcome"] for line in units)),
        "units": units, "not_run": missing,
    }  # fmt: skip


def _divided(found: Record, *, late: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What ran, and what did not, with a reason."""
    units = [line for line in found.done.values() if NO_TIME not in line.get("why", "")]
    ran = {line["name"] for line in units}
    begun = f"{NO_TIME}; it was running" if late else "its process died"
    missing = [
        {"name": name, "why": begun if name in found.died else NO_TIME}
        for name in found.planned
        if name not in ran
    ]
    return units, missing


def _side_by_side(
    commands: Sequence[Sequence[str]], log: Path, deadline: float, environment: dict[str, str]
) -> list[int]:
    """Exit statuses of processes; at the deadline they and their children are ended."""
    with log.open("ab") as out:
        out.write(f"\n== {' | '.join(' '.join(command) for command in commands)}\n".encode())
        out.flush()
        processes = [
            subprocess.Popen(
                [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                env=environment, start_new_session=True,
            )
            for command in commands
        ]  # fmt: skip
        try:
            for process in processes:
                process.wait(timeout=max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return [process.wait() for process in processes]
