"""Training a prefix with transformers' own Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fastprefix.tuning.model import PrefixTuningModel


@dataclass(frozen=True)
class FitOptions:
    """How :func:`fit` trains.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences of a step.
        learning_rate: at the end of the warm-up; it then falls linearly to 0.
        warmup_steps: steps over which the learning rate rises.
        max_grad_norm: gradients are scaled down to this norm.
        gradient_checkpointing: recompute activations in the backward.
        seed: of the data order and of dropout.
    """

    steps: int = 80
    batch_size: int = 8
    learning_rate: float = 1e-2
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0


def fit(
    tuned: PrefixTuningModel,
    data: Dataset[Any],
    collator: Callable[[Any], Any],
    options: FitOptions,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[float]:
    """Trains the prefix: AdamW without weight decay, linear schedule, clipped gradients.

    Args:
        tuned: the model; only its encoder changes.
        data: items with input_ids, attention_mask and labels.
        collator: makes batches of them.
        options: see :class:`FitOptions`.
        callbacks: of the Trainer, a progress bar say.

    Returns:
        The training loss of each step.
    """
    use_cache = tuned.config.use_cache  # which the Trainer switches off for good
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer wants one, but saves nothing here
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.max_grad_norm,
            weight_decay=0.0,
            gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs=(
                {"use_reentrant": False} if options.gradient_checkpointing else None
            ),
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=tuned,
            args=arguments,
            train_dataset=data,
            data_collator=collator,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # the caller's callbacks show what happens
        try:
            trainer.train()
        finally:
            tuned.config.use_cache = use_cache
    tuned.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
