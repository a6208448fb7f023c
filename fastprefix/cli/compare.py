"""``fastprefix compare``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from fastprefix.cli.console import progress, tell
from fastprefix.cli.errors import complain
from fastprefix.training.compare import Progress, run_compare
from fastprefix.training.engines import Engine
from fastprefix.training.grid import CompareConfig
from fastprefix.training.report import write_report


def run_comparison(config: CompareConfig, output: Path, engine: Engine, command: str) -> int:
    """Does what is not done yet, with a bar, writes the report, and says where it is.

    Returns:
        The exit code: 1 if a run failed.
    """
    with contextlib.ExitStack() as shown:
        bars: list[Callable[[int, str], None]] = []

        def show(now: Progress) -> None:
            if not bars:
                bars.append(shown.enter_context(progress("runs", now.total)))
            if now.state != "started":
                bars[0](now.done, now.run.label)
            if now.error is not None:
                tell(f"failed: {now.run.label}: {now.error}")

        comparison = run_compare(config, output, engine=engine, show=show)
    tell(f"{len(comparison.outcomes) - len(comparison.failed)} runs are done")
    print(write_report(comparison, output, command=command))
    if comparison.failed:
        return complain(f"{len(comparison.failed)} runs failed", 1)
    return 0
