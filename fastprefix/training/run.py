"""One training run: from a configuration to a folder with all that is known about it.

The folder holds ``config.yaml``, ``environment.json``, ``metrics.jsonl`` (a line for each log of
the Trainer), ``adapter/`` and, when the run has ended, ``result.json``. A run that was stopped goes
on from its last checkpoint.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CHAT_TEMPLATE_FILE

from fastprefix.files import json_text, read_json, written_whole
from fastprefix.hf.versions import checkpointing_arguments
from fastprefix.tasks.encode import prompt_template
from fastprefix.tasks.encoding import Encoding
from fastprefix.tasks.metrics import check_installed
from fastprefix.tasks.registry import get_task
from fastprefix.tasks.task import Generation, Task
from fastprefix.training.base_models import load_for, load_tokenizer
from fastprefix.training.config import ADAPTER, CONFIG, RunConfig
from fastprefix.training.environment import environment, processes
from fastprefix.training.evaluation import measured
from fastprefix.training.examples import Splits, read_splits, task_type_of
from fastprefix.training.memory import peak_memory
from fastprefix.training.methods import Trained, build
from fastprefix.training.record import Record, read_lines
from fastprefix.training.speed import is_slow
from fastprefix.tuning.trainer import PrefixTrainer

ENVIRONMENT, METRICS, RESULT = "environment.json", "metrics.jsonl", "result.json"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"

# Called with the steps done, all steps, and a note.
Show = Callable[[int, int, str], object]
Result = dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """What a run works with."""

    config: RunConfig
    folder: Path
    task: Task
    encoding: Encoding
    splits: Splits
    trained: Trained


def train_run(
    config: RunConfig, folder: Path, *, resume: bool = True, show: Show | None = None
) -> Result:
    """Trains, evaluates and saves. A run that is there already is only read.

    In a process that ``torchrun`` or ``accelerate launch`` started, all processes train together
    and the first one writes.

    Args:
        config: of the run.
        folder: of the run; made if missing.
        resume: goes on from the last checkpoint. If False, this run replaces the one in the
            folder, whatever its configuration, once all that it needs has been loaded.
        show: is called after each step.

    Returns:
        What ``result.json`` holds: the fields of the configuration that name the run, ``trainable``
        and ``total`` numbers, ``bytes`` that are stored, ``steps``, ``best_step``, ``seconds`` of
        the training, ``seconds_per_step`` (their median), ``peak_memory`` (bytes above what the
        loaded model took), ``train_loss`` (mean of the last tenth of the steps), ``validation`` and
        ``test`` (the task's metrics and ``loss``; None without such a split), ``samples`` of a
        generation.

    Raises:
        ValueError: a field does not fit the task, the model or the data, or the folder holds a run
            with another configuration.
        OSError: something cannot be read or written.
        ImportError: a package is missing.
    """
    finished = _begun(config, folder) if resume else None
    if finished is not None:
        return finished
    main = processes().is_main_process
    run = _prepared(config, folder)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            _remove(folder)
        _write(folder / CONFIG, config.yaml())
        _write(folder / ENVIRONMENT, json_text(environment()))
    processes().wait_for_everyone()  # before one looks for a checkpoint that the first removes
    record = Record(folder / METRICS, main, show)
    trained = {} if config.method == "none" else _train(run, record)
    processes().wait_for_everyone()
    result = _described(run) | trained
    if main:
        result |= measured(config, run.trained.model, run.encoding, run.splits)
        if config.save and config.method != "none":
            run.trained.save(folder / ADAPTER)
            result["bytes"] = _size(folder / ADAPTER)
            _write_template(run)
        _write(folder / RESULT, json_text(result))
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    processes().wait_for_everyone()
    return read_json(folder / RESULT)


def _warn_of_slow(name: str, device: torch.device) -> None:
    if is_slow(getattr(torch, name), device):
        warnings.warn(
            f"dtype: got {name}, which this CPU multiplies several times as slowly as float32",
            stacklevel=3,
        )


def _remove(folder: Path) -> None:
    """Removes what a run has written: nothing of it may be taken for a part of the next one."""
    for name in (RESULT, METRICS):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD, ADAPTER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _begun(config: RunConfig, folder: Path) -> Result | None:
    """The result that a folder holds; None if the run has not ended.

    Raises:
        ValueError: the folder belongs to another configuration.
    """
    if not (folder / CONFIG).exists():
        return None
    there = RunConfig.read(folder / CONFIG).plain()
    ours = config.plain()
    for field, value in ours.items():
        if there[field] != value:
            raise ValueError(
                f"{field}: got {value!r}, but {folder} holds a run with {there[field]!r}; takes "
                "another folder"
            )
    return read_json(folder / RESULT) if (folder / RESULT).exists() else None


def _prepared(config: RunConfig, folder: Path) -> _Run:
    task = get_task(config.task)
    check_installed(task.metrics)
    task_type = task_type_of(config, task)
    tokenizer = load_tokenizer(config.model, task_type)
    encoding = Encoding(task, tokenizer, task_type, config.max_length, config.max_target_length)
    splits = read_splits(config, task, encoding)
    set_seed(config.seed)  # a new head and the start of a prefix are random
    frozen = config.method not in ("full", "head", "bitfit")
    _warn_of_slow(config.dtype, processes().device)
    dtype = getattr(torch, config.dtype) if frozen else torch.float32
    model = load_for(config.model, task_type, dtype, getattr(task, "labels", ()))
    if model.config.pad_token_id is None:  # a causal classifier finds the last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    trained = build(config.method, config.options, model, tokenizer, task_type)
    return _Run(config, folder, task, encoding, splits, trained)


def _train(run: _Run, record: Record) -> Result:
    config, checkpoints = run.config, run.folder / CHECKPOINTS
    items = run.splits.train
    watched = run.splits.validation_items
    own = config.method in ("prefix", "prompt")
    kind: Any = PrefixTrainer if own else Trainer
    trainer = kind(
        run.trained.model,
        _arguments(config, checkpoints, run.splits.steps, bool(watched)),
        train_dataset=items,
        eval_dataset=watched or None,
        data_collator=run.splits.collator,
        callbacks=[record],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if config.report_to == "tensorboard":
        trainer.add_callback(_tensorboard(run.folder / TENSORBOARD))
    if config.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    with peak_memory() as memory:
        trainer.train(resume_from_checkpoint=last)
    state = trainer.state
    return {
        "steps": state.global_step,
        "best_step": state.best_global_step or state.global_step,
        "peak_memory": round(memory.megabytes * 1e6),
        **record.summary(),
    }


def _tensorboard(folder: Path) -> TensorBoardCallback:
    """What writes into a folder of the run, which outlives its checkpoints."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "report_to: tensorboard needs the package tensorboard (pip install tensorboard)"
        ) from error
    return TensorBoardCallback(SummaryWriter(str(folder)))


def _arguments(
    config: RunConfig, checkpoints: Path, steps: int, evaluated: bool
) -> TrainingArguments:
    every = config.eval_steps or max(1, steps // 5)
    return TrainingArguments(
        str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        **(checkpointing_arguments(use_reentrant=False) if config.gradient_checkpointing else {}),
        learning_rate=config.rate,
        warmup_steps=round(config.warmup * steps),
        lr_scheduler_type=config.lr_scheduler,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        seed=config.seed,
        logging_steps=max(1, steps // 200),
        eval_strategy="steps" if evaluated else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=evaluated,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        use_cpu=not torch.accelerator.is_available(),  # else bfloat16 is refused without a GPU
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,  # items hold what the model takes, and nothing else
        report_to="none",
        disable_tqdm=True,
    )


def _described(run: _Run) -> Result:
    config, trained = run.config, run.trained
    return {
        "task": config.task,
        "model": config.model,
        "method": config.method,
        "seed": config.seed,
        "learning_rate": config.rate,
        "train_examples": run.splits.train_examples,
        "trainable": trained.trainable,
        "total": trained.total,
        "bytes": sum(p.nbytes for p in trained.model.parameters() if p.requires_grad),
        "steps": 0,
        "best_step": 0,
    }


def _write_template(run: _Run) -> None:
    """Stores beside the adapter how its prompts are written, as a chat template."""
    if isinstance(run.task, Generation) and run.encoding.task_type == "CAUSAL_LM":
        template = prompt_template(run.encoding.tokenizer, run.task.question)
        _write(run.folder / ADAPTER / CHAT_TEMPLATE_FILE, template)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write(file: Path, text: str) -> None:
    with written_whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, oldest first."""
    return read_lines(folder / METRICS)
