"""The examples of a run: which split has which, and as what a Trainer gets them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastprefix.tasks.encoding import Encoding, TaskType, task_types
from fastprefix.tasks.loading import load_examples, splits_of
from fastprefix.tasks.streaming import StreamedItems
from fastprefix.tasks.task import Example, Extraction, Generation, Split, Task
from fastprefix.training.base_models import load_config
from fastprefix.training.config import RunConfig
from fastprefix.training.environment import processes
from fastprefix.training.sources import model_source


@dataclass(frozen=True)
class Splits:
    """What a run trains with and is measured by.

    Attributes:
        train: items for the Trainer.
        train_examples: how many examples they come from; None if that is not known beforehand.
        steps: optimizer steps of the run.
        collator: makes batches of items.
        validation: held-out examples that decide when to stop; None if there are none.
        validation_items: the same as items.
        test: held-out examples that are reported; None if there are none.
        more_tests: further ones, by name.
    """

    train: Any
    train_examples: int | None
    steps: int
    collator: Callable[[list[dict[str, Any]]], Any]
    validation: Sequence[Example] | None
    validation_items: list[dict[str, Any]]
    test: Sequence[Example] | None
    more_tests: Mapping[str, Sequence[Example]]


def task_type_of(config: RunConfig, task: Task) -> TaskType:
    """What the model does in a run: as configured, or what suits task and model.

    Raises:
        ValueError: the task cannot be trained like this.
    """
    kinds = task_types(task)
    if config.task_type is not None:
        if config.task_type not in kinds:
            raise ValueError(
                f"task_type: got {config.task_type}, {task.name} takes one of {list(kinds)}"
            )
        return config.task_type
    if isinstance(task, Extraction):
        return "QUESTION_ANS"
    _, gguf = model_source(config.model)
    if gguf is not None:
        return "CAUSAL_LM"
    described = load_config(config.model)
    if getattr(described, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    writes = any("LM" in name for name in described.architectures or ["ForCausalLM"])
    masked = any("Masked" in name for name in described.architectures or [])
    if isinstance(task, Generation) or (writes and not masked):
        return "CAUSAL_LM"
    return "SEQ_CLS"


def read_splits(config: RunConfig, task: Task, encoding: Encoding) -> Splits:
    """All examples of a run.

    Raises:
        ValueError: see :func:`fastprefix.tasks.loading.load_examples`.
    """
    there = splits_of(task, config.files)
    validation = test = train = None
    if "validation" in there:
        validation = _load(config, task, "validation", config.validation_size)
    if "test" in there:
        test = _load(config, task, "test", config.test_size)
    if config.streaming:
        items: Any = StreamedItems(
            encoding, "train", data_files=config.files, columns=config.columns, seed=config.seed
        )
        steps = config.steps_of(0)
    else:
        train = _sample(_load(config, task, "train"), config.train_size, f"{config.seed}")
        items = list(encoding.items(train))
        steps = config.steps_of(len(items), processes().num_processes)
    return Splits(
        train=items,
        train_examples=None if train is None else len(train),
        steps=steps,
        collator=encoding.collator(config.packing),
        validation=validation,
        validation_items=list(encoding.items(validation or [])),
        test=test,
        more_tests={
            name: load_examples(
                task,
                "test",
                data_files={"test": file},
                columns=config.columns,
                limit=config.test_size,
            )
            for name, file in (config.more_tests or {}).items()
        },
    )


def _load(config: RunConfig, task: Task, split: Split, limit: int | None = None) -> list[Example]:
    return load_examples(task, split, data_files=config.files, columns=config.columns, limit=limit)


def _sample(examples: list[Example], size: int | None, salt: str) -> list[Example]:
    """Some of the examples, chosen by their content, so that their order does not matter."""
    if size is None or size >= len(examples):
        return examples
    ordered = sorted(examples, key=lambda each: hashlib.sha256(f"{salt}{each!r}".encode()).digest())
    return ordered[:size]
