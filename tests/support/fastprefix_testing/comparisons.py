"""Comparisons in a process of their own, to be stopped from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprefix.training.run import train_run

# Its arguments: a configuration, a folder, the number of workers, a module, a function of it.
_SCRIPT = """
if __name__ == "__main__":  # workers read this file, too
    import importlib, sys
    from pathlib import Path
    from fastprefix.training.compare import run_compare
    from fastprefix.training.engines import LocalEngine
    from fastprefix.training.grid import CompareConfig
    from fastprefix.training.report import write_report

    file, folder, jobs, module, function = sys.argv[1:]
    train = getattr(importlib.import_module(module), function)
    config, engine = CompareConfig.read(Path(file)), LocalEngine(int(jobs))
    write_report(run_compare(config, Path(folder), engine=engine, train=train), Path(folder))
"""


def start(
    config: Path, folder: Path, jobs: int, train: Callable[..., object] = train_run
) -> subprocess.Popen[str]:
    """Starts a comparison that writes its report, in a process group as a terminal gives it.

    Args:
        config: its YAML file.
        folder: for the runs and the report.
        jobs: worker processes.
        train: does a run.
    """
    script = folder / "compare_script.py"
    script.write_text(_SCRIPT)
    support = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [
            sys.executable,
            str(script),
            str(config),
            str(folder),
            str(jobs),
            train.__module__,
            train.__name__,
        ],
        env=os.environ | {"PYTHONPATH": support},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def gone(process: int) -> bool:
    """Whether a process has ended; one that its parent has not asked for is as good as gone."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def eventually(check: Callable[[], Any], seconds: float = 120) -> Any:
    """What a function returns as soon as that is true, or what it returns in the end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.05)
    return check()


def begun(folder: Path) -> list[int]:
    """The processes that began runs below a folder."""
    return [int(line) for file in folder.glob("**/began") for line in file.read_text().split()]
