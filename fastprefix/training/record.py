"""What a run writes down while it trains."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines that a :class:`Record` wrote, oldest first; none without the file.

    A process that is killed while it writes leaves the start of a line. It is left out.
    """
    if not file.exists():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


class Record(TrainerCallback):
    """Writes a line of JSON for each log of a Trainer, and times its steps.

    A line has ``step``, ``epoch``, ``seconds`` since the training began, and either ``loss`` and
    ``learning_rate`` or ``eval_loss``. When a run goes on from a checkpoint, lines of the steps
    behind it are dropped: those steps are done again.

    Args:
        file: for the lines.
        writes: whether this process writes.
        show: called with the steps done, all steps and a note, after each step.
    """

    def __init__(
        self, file: Path, writes: bool, show: Callable[[int, int, str], object] | None
    ) -> None:
        self._file, self._writes, self._show = file, writes, show
        self._lines: list[dict[str, Any]] = []
        self._before = 0.0
        self._steps: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps what is known of the steps before a checkpoint."""
        lines = read_lines(self._file)
        self._lines = [line for line in lines if line["step"] <= state.global_step]
        self._before = max((line["seconds"] for line in self._lines), default=0.0)
        self._rewrite()
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock of a step."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it."""
        self._steps.append(time.perf_counter() - self._step_began)
        if self._show is not None and self._writes:
            losses = [line["loss"] for line in self._lines[-3:] if "loss" in line]
            note = f"loss {losses[-1]:.3f}" if losses else ""
            self._show(state.global_step, state.max_steps, note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes a line."""
        kept = {key: logs[key] for key in ("loss", "learning_rate", "eval_loss") if key in logs}
        if not kept.keys() & {"loss", "eval_loss"}:  # the summary at the end
            return
        seconds = self._before + time.perf_counter() - self._began
        line = {"step": state.global_step, "epoch": state.epoch, **kept, "seconds": seconds}
        self._lines.append(line)
        if self._writes:
            with self._file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, float]:
        """``seconds``, ``seconds_per_step`` and ``train_loss`` of the training."""
        losses = [line["loss"] for line in self._lines if "loss" in line]
        last = losses[-max(1, len(losses) // 10) :]
        return {
            "seconds": max((line["seconds"] for line in self._lines), default=0.0),
            "seconds_per_step": statistics.median(self._steps) if self._steps else 0.0,
            "train_loss": statistics.fmean(last) if last else float("nan"),
        }

    def _rewrite(self) -> None:
        if self._writes:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            self._file.write_text(text, encoding="utf-8")
