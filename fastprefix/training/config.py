"""The configuration of one training run."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fastprefix.training.settings import Settings
from fastprefix.training.sources import DEFAULT_MODEL

TaskTypeName = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "QUESTION_ANS"]
MethodName = Literal["prefix", "prompt", "lora", "full", "head", "bitfit", "none"]
SplitName = Literal["train", "validation", "test"]

# In a run's folder: its configuration, and what it has trained.
CONFIG, ADAPTER = "config.yaml", "adapter"

# Where a learning rate is not given. From comparisons on SmolLM2 and MiniLM: a prefix and a prompt
# take rates that would destroy the weights of a model.
LEARNING_RATES: dict[MethodName, float] = {
    "prefix": 3e-2,
    "prompt": 1e-1,
    "lora": 3e-3,
    "full": 1e-4,
    "head": 1e-1,
    "bitfit": 1e-2,
    "none": 0.0,
}


class RunConfig(Settings):
    """One model, one way to train it, one task.

    Attributes:
        task: its name in :data:`fastprefix.tasks.TASKS`.
        model: the base, as :func:`fastprefix.training.sources.model_source` takes it.
        method: what is trained. "prefix" and "prompt" are this library's, "lora" is PEFT's, "full"
            trains all weights, "head" the new head alone, "bitfit" the biases, "none" nothing.
        options: of ``PrefixConfig``, ``PromptConfig`` or ``peft.LoraConfig``, by the method.
        task_type: PEFT's name of what the model does; found from model and task if None.
        data_files: files of your own by split, in place of the task's source.
        more_tests: further files of test examples, by a name that the figures get behind theirs:
            "bleu (unseen)". For test sets that differ from the training data in kind.
        columns: the names of the task's columns in the files.
        train_size: examples to train with, a sample that depends on the seed; all if None.
        validation_size: examples to evaluate with while training, always the same; all if None.
        test_size: examples that are reported, always the same; all if None.
        max_length: tokens of an example.
        max_target_length: tokens of a target; the task's own limit if None.
        packing: several examples in a row, so that no batch is padded.
        streaming: examples are read while they are trained with; ``max_steps`` is needed.
        max_steps: optimizer steps; of those, the best evaluation's weights are kept.
        epochs: passes through the data, in place of ``max_steps``.
        batch_size: examples in a step of one process.
        eval_batch_size: examples in a forward pass of an evaluation.
        gradient_accumulation_steps: passes in an optimizer step.
        learning_rate: after the warm-up; the method's default if None.
        warmup: share of all steps in which the rate rises.
        lr_scheduler: transformers' name of how it falls afterwards.
        weight_decay: of AdamW.
        max_grad_norm: gradients with a larger norm are scaled down to it.
        eval_steps: steps between evaluations, each of which writes a checkpoint; a fifth of the
            run if None.
        patience: evaluations without a better loss after which training stops; None never stops.
        dtype: of the computation. What is trained is float32 always.
        gradient_checkpointing: less memory, more time.
        seed: of everything random.
        save: whether the trained weights are kept.
        report_to: "tensorboard" writes its files into the run's folder, too.
    """

    task: str
    model: str = DEFAULT_MODEL
    method: MethodName = "prefix"
    options: dict[str, Any] = Field(default_factory=dict)
    task_type: TaskTypeName | None = None
    data_files: dict[SplitName, str] | None = None
    more_tests: dict[str, str] | None = None
    columns: dict[str, str] | None = None
    train_size: int | None = Field(default=None, ge=1)
    validation_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=256, ge=8)
    max_target_length: int | None = Field(default=None, ge=1)
    packing: bool = False
    streaming: bool = False
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    eval_batch_size: int = Field(default=16, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    warmup: float = Field(default=0.06, ge=0, le=1)
    lr_scheduler: str = "linear"
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0)
    eval_steps: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    save: bool = True
    report_to: Literal["none", "tensorboard"] = "none"

    @field_validator("lr_scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        from transformers import SchedulerType

        known = [kind.value for kind in SchedulerType]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"takes one of {known}"
            raise ValueError(f"lr_scheduler: got {name!r}, {meant}")
        return name

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("max_steps, epochs: got both, takes one of them")
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming: got no max_steps, which it takes: a stream has no length")
        if self.streaming and self.train_size is not None:
            raise ValueError("streaming, train_size: got both, takes one of them")
        if self.packing and self.method == "prompt":
            raise ValueError(
                "packing: got it for method prompt, takes others: each of the packed "
                "examples would need the prompt"
            )
        if self.options and self.method in ("full", "head", "bitfit", "none"):
            raise ValueError(f"options: got {list(self.options)}, but {self.method} has none")
        return self

    @property
    def files(self) -> dict[str, str] | None:
        """``data_files`` with names that any mapping of texts takes."""
        if self.data_files is None:
            return None
        return {str(split): file for split, file in self.data_files.items()}

    @property
    def rate(self) -> float:
        """The learning rate, the method's default where none was given."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    def steps_of(self, examples: int, processes: int = 1) -> int:
        """Optimizer steps of a run with that many training examples. The default is 3 epochs."""
        if self.method == "none":
            return 0
        if self.max_steps is not None:
            return self.max_steps
        each = self.batch_size * processes * self.gradient_accumulation_steps
        return max(1, math.ceil(examples / each * (self.epochs or 3)))
