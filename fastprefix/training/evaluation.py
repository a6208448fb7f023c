"""What a trained model does on held-out examples: after its training, and later from its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastprefix.tasks.encoding import Encoding
from fastprefix.tasks.loading import load_examples, splits_of
from fastprefix.tasks.measuring import evaluate, mean_loss, write
from fastprefix.tasks.registry import get_task
from fastprefix.tasks.task import Example, Generation, Split, WrittenText
from fastprefix.training.base_models import load_tokenizer
from fastprefix.training.config import ADAPTER, RunConfig
from fastprefix.training.examples import Splits, task_type_of
from fastprefix.training.methods import load_trained

SAMPLES = 5  # texts of a model in a result


def measured(
    config: RunConfig, model: nn.Module, encoding: Encoding, splits: Splits
) -> dict[str, Any]:
    """The figures of ``validation`` and ``test``, and ``samples`` of what a language model writes.

    The figures of further test sets are among those of ``test``, with the set's name behind
    theirs. Where there is a test split, a generation's validation is its loss alone: its texts are
    not reported.
    """
    size = config.eval_batch_size
    writes = isinstance(encoding.task, Generation)
    found: dict[str, Any] = {"validation": None, "test": None}
    with computing(config, model):
        if splits.validation and splits.test and writes:
            loss = mean_loss(model, encoding, splits.validation, size)
            found["validation"] = {"loss": loss}
        elif splits.validation:
            found["validation"] = evaluate(model, encoding, splits.validation, size)
        if splits.test:
            found["test"] = evaluate(model, encoding, splits.test, size)
        for name, examples in splits.more_tests.items():
            figures = evaluate(model, encoding, examples, size)
            named = {f"{metric} ({name})": figure for metric, figure in figures.items()}
            found["test"] = (found["test"] or {}) | named
        shown = (splits.test or splits.validation or [])[:SAMPLES]
        if writes and shown:
            texts = write(model, encoding, shown, size)
            found["samples"] = [_sample(*each) for each in zip(shown, texts, strict=True)]
    return found


def evaluate_run(
    config: RunConfig,
    folder: Path,
    split: str | None = None,
    data_files: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> tuple[str, int, dict[str, float]]:
    """Measures what a run has trained.

    Args:
        config: of the run.
        folder: of the run.
        split: "train", "validation" or "test"; test if None, or validation where there is none.
        data_files: other files than the run's, by split.
        limit: at most that many examples, from the start.
        batch_size: of a forward pass; the run's if None.

    Returns:
        The split, the number of its examples, the task's metrics and ``loss``.

    Raises:
        ValueError: there is no such split, or what is stored does not fit.
        OSError: the run has not stored anything, or a file cannot be read.
    """
    task = get_task(config.task)
    files = dict(data_files) if data_files else config.files
    there = splits_of(task, files)
    chosen = split or ("test" if "test" in there else "validation")
    if chosen not in there:
        raise ValueError(f"split: got {chosen}, {task.name} has {list(there)}")
    examples = load_examples(
        task, cast(Split, chosen), data_files=files, columns=config.columns, limit=limit
    )
    task_type = task_type_of(config, task)
    tokenizer = load_tokenizer(config.model, task_type)
    encoding = Encoding(task, tokenizer, task_type, config.max_length, config.max_target_length)
    model = load_run(config, folder, task_type)
    with computing(config, model):
        found = evaluate(model, encoding, examples, batch_size or config.eval_batch_size)
    return chosen, len(examples), found


def load_run(config: RunConfig, folder: Path, task_type: str | None = None) -> nn.Module:
    """The model that a run has trained, for inference.

    Raises:
        ValueError: the run has stored nothing, or what is stored does not fit the base.
        OSError: a file is missing.
    """
    stored = folder / ADAPTER
    if not stored.is_dir() and config.method != "none":
        raise ValueError(
            f"run: got {folder}, which has stored nothing: it has not ended, or save was false"
        )
    task = get_task(config.task)
    dtype = getattr(torch, config.dtype)
    labels: Sequence[str] = getattr(task, "labels", ())
    kind = task_type or task_type_of(config, task)
    return load_trained(config.method, stored, config.model, kind, dtype, tuple(labels))


@contextlib.contextmanager
def computing(config: RunConfig, model: nn.Module) -> Iterator[None]:
    """The dtype of a run's computation, in this block."""
    if config.dtype == "float32":
        yield
        return
    device = next(model.parameters()).device.type
    with torch.autocast(device, getattr(torch, config.dtype)):
        yield


def _sample(example: Example, text: str) -> dict[str, Any]:
    written = cast(WrittenText, example)
    return {"source": written.source, "written": text, "references": list(written.targets)}
