"""transformers' pipelines know PEFT's models by the names of their classes; this adds ours."""

from __future__ import annotations

from transformers.pipelines.base import SUPPORTED_PEFT_TASKS


def accept(class_name: str) -> None:
    """Has pipelines take models of a class without saying that it is not supported.

    They look at the name alone, so every task takes it; whether the base does the task shows when
    it runs.
    """
    for names in SUPPORTED_PEFT_TASKS.values():
        if class_name not in names:
            names.append(class_name)
