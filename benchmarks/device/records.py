"""What a part of the suite did, line by line in a file, so that nothing is lost when it dies.

A part writes four kinds of lines: what it will do ("planned"), what it begins ("started"), how that
ended ("name", "outcome", and "why" unless it passed), and a unit after which the device answered no
longer ("lost").
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDS = "FASTPREFIX_GPU_RECORDS"  # the file
DEADLINE = "FASTPREFIX_GPU_DEADLINE"  # seconds since the epoch after which nothing begins
BEFORE = "FASTPREFIX_GPU_BEFORE"  # records of an earlier process of the same stage
SUITE_ON = "FASTPREFIX_GPU_SUITE_ON"  # "cpu" or an architecture to simulate; see tests/gpu
LOST = 70  # exit status of a process whose device answers no longer
NO_TIME = "no time left in the budget"


def write(line: dict[str, Any]) -> None:
    """Appends a line, where a file is named."""
    if file := os.environ.get(RECORDS):
        with Path(file).open("a") as records:
            records.write(json.dumps(line) + "\n")


def seconds_left() -> float:
    """Until the deadline."""
    return float(os.environ.get(DEADLINE, "inf")) - time.time()


def device_is_lost() -> bool:
    """Whether the device answers no longer, as after an access out of bounds."""
    torch = sys.modules.get("torch")  # what has not imported it has used no device
    if torch is None or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@dataclass(frozen=True)
class Record:
    """The lines of a file, put together."""

    planned: list[str]
    started: list[str]
    done: dict[str, dict[str, Any]]

    @staticmethod
    def read(file: Path) -> Record:
        """What is known so far. A line that a killed process left half written is ignored."""
        planned: dict[str, None] = {}
        started: dict[str, None] = {}
        done: dict[str, dict[str, Any]] = {}
        for text in file.read_text().splitlines() if file.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            planned.update(dict.fromkeys(line.get("planned", ())))
            if "started" in line:
                started[line["started"]] = None
            if "outcome" in line:
                done[line["name"]] = line
        return Record(list(planned), list(started), done)

    @property
    def missing(self) -> list[str]:
        """Planned, without an outcome."""
        return [name for name in self.planned if name not in self.done]

    @property
    def died(self) -> list[str]:
        """Begun, without an outcome."""
        return [name for name in self.started if name not in self.done]


def earlier() -> Record:
    """What an earlier process of the same stage did."""
    file = os.environ.get(BEFORE)
    return Record.read(Path(file)) if file else Record([], [], {})


def run_units(units: Iterable[tuple[str, float, Callable[[], dict[str, Any]]]]) -> None:
    """Runs a part: (name, least seconds that it needs, function) in order, and records each.

    A unit that an earlier process of this part finished or died in is not run again. A unit that
    raises is a result too. NotImplementedError says that it was skipped.
    """
    units = list(units)
    before = earlier()
    write({"planned": [name for name, _, _ in units]})
    for name, seconds, function in units:
        if name in before.done or name in before.died:
            continue
        if seconds_left() < seconds:
            write({"name": name, "outcome": "skipped", "why": NO_TIME})
            continue
        write({"started": name})
        began = time.perf_counter()
        line: dict[str, Any] = {"name": name}
        try:
            line |= {"outcome": "passed", **function()}
        except NotImplementedError as error:
            line |= {"outcome": "skipped", "why": str(error)}
        except Exception as error:  # a unit that fails is a result too
            line |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:1000]}
        write(line | {"seconds": round(time.perf_counter() - began, 2)})
        print(f"{name}: {line['outcome']} {line.get('why', '')}", flush=True)
        if line["outcome"] == "failed" and device_is_lost():
            os._exit(LOST)  # nothing works in this process any more; another one goes on
