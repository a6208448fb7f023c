"""Terminal output shared by the sub-commands."""

from __future__ import annotations

import os
import warnings
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

console = Console()


def quiet_libraries() -> None:
    """Leaves the terminal to our own progress bars."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft|torch|transformers")


class TrainingProgress(TrainerCallback):
    """A rich progress bar with the running loss."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the bar."""
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, loss="-")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Moves the bar."""
        if logs and "loss" in logs:
            self._progress.update(
                self._task, completed=state.global_step, loss=f"{float(logs['loss']):.3f}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the finished bar on the screen."""
        self._progress.stop()
