"""``fastprefix train``."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fastprefix.cli.console import progress, tell
from fastprefix.training.config import ADAPTER, CONFIG, RunConfig
from fastprefix.training.environment import processes
from fastprefix.training.run import CHECKPOINTS, RESULT, train_run


def run_training(config: RunConfig, output: Path, replace: bool) -> None:
    """Trains, with a bar, and prints the result as JSON.

    Of several processes only the first one prints.
    """
    first = processes().is_main_process
    if replace and first:
        for name in (CONFIG, RESULT):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    processes().wait_for_everyone()
    if not first:
        train_run(config, output)
        return
    tell(f"training {config.method} of {config.model} on {config.task}")
    with contextlib.ExitStack() as shown:
        bars: list[Callable[[int, str], None]] = []

        def show(done: int, total: int, note: str) -> None:
            if not bars:  # how many steps there are is known once the data is read
                bars.append(shown.enter_context(progress("training", total)))
            bars[0](done, note)

        result = train_run(config, output, show=show)
    share = result["trainable"] / result["total"]
    told = f"trained {result['trainable']:,d} numbers ({share:.3%}), {result['steps']} steps"
    tell(f"{told}; adapter in {output / ADAPTER}" if config.save else told)
    print(json.dumps({"validation": result["validation"], "test": result["test"]}, indent=1))
