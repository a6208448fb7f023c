"""transformers' pipelines know PEFT's models by their class names; this adds the names of ours."""

from __future__ import annotations

from transformers.pipelines.base import SUPPORTED_PEFT_TASKS


def accept(class_name: str) -> None:
    """Keeps pipelines from saying that models of a class are not supported.

    Pipelines check nothing but the name. So the name is added for every task. Whether the base
    model can do the task shows when the pipeline runs.
    """
    for names in SUPPORTED_PEFT_TASKS.values():
        if class_name not in names:
            names.append(class_name)
