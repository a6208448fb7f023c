"""Training with a progress bar, as the sub-commands use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from fastprefix.cli.console import progress
from fastprefix.tuning import PrefixTuningModel
from fastprefix.tuning.trainer import FitOptions, fit


def train_prefix(
    tuned: PrefixTuningModel,
    items: Sequence[dict[str, Any]],
    collator: Callable[[Any], Any],
    options: FitOptions,
) -> list[float]:
    """The training loss of each step; see :func:`fastprefix.tuning.trainer.fit`."""
    with progress("training", options.steps) as show:
        return fit(tuned, items, collator, options, [_Show(show)])


class _Show(TrainerCallback):
    """Shows the running loss of each step."""

    def __init__(self, show: Any) -> None:
        self._show = show

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Moves the bar."""
        if logs and "loss" in logs:
            self._show(state.global_step, f"loss {float(logs['loss']):.3f}")
