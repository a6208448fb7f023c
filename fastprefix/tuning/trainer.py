"""Training a prefix with transformers' own Trainers, with defaults that suit a prefix."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils.generic import find_labels

from fastprefix.arguments import (
    methods_refuse_unknown_arguments,
    refuses_unknown_arguments,
    unknown_argument,
)
from fastprefix.files import reason, remove_leftovers, written_together
from fastprefix.hf.versions import checkpointing_arguments
from fastprefix.tuning.callbacks import PrefixMonitor, ProgressiveLayers, ProgressiveLength
from fastprefix.tuning.prefix_model import PrefixTuningModel


@dataclass
class _Defaults:
    """The defaults that differ from those of TrainingArguments.

    AdamW without weight decay, a linear schedule and gradients clipped to a norm of 1 are defaults
    of transformers already. ``lr_scheduler_type="cosine"`` suits a prefix as well.
    """

    learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Higher than for a whole model: a prefix starts from little."},
    )
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Steps, or below 1 a share of all steps."}
    )


@methods_refuse_unknown_arguments
@dataclass
class PrefixTrainingArguments(_Defaults, TrainingArguments):
    """``transformers.TrainingArguments`` with defaults for a prefix."""


@methods_refuse_unknown_arguments
@dataclass
class PrefixSeq2SeqTrainingArguments(_Defaults, Seq2SeqTrainingArguments):
    """``transformers.Seq2SeqTrainingArguments`` with defaults for a prefix."""


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


@methods_refuse_unknown_arguments
class _SavesTheAdapter(_Base):
    """What both trainers add to transformers' own."""

    _partial: Path | None = None  # the folder in which a checkpoint is being written

    def __init__(self, model: Any, args: TrainingArguments, **options: Any) -> None:
        known = inspect.signature(super().__init__).parameters
        for name in options:
            if name not in known:
                raise unknown_argument(type(self).__name__, name, known)
        # transformers switches the base's cache off for good; here it is off only in train()
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model, args, **options)
        if use_cache is not None:
            model.config.use_cache = use_cache
        if args.label_names is None:  # found by the base's class; the wrapper's says nothing
            self.label_names = find_labels(type(model.base_model))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``."""
        folder = Path(self.args.output_dir or "")
        if self.args.should_save and folder.is_dir():
            remove_leftovers(folder)  # before the last checkpoint is looked for
        model: Any = self.model
        use_cache = getattr(model.config, "use_cache", None)
        if use_cache is not None:
            model.config.use_cache = self.args.use_cache
        try:
            return super().train(*args, **kwargs)
        finally:
            if use_cache is not None:
                model.config.use_cache = use_cache
            # these change or watch the model, and an interrupted run would not end them
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (ProgressiveLayers, PrefixMonitor)):
                    callback.on_train_end(self.args, self.state, self.control, model=model)

    def add_callback(self, callback: Any) -> None:
        """See ``transformers.Trainer.add_callback``."""
        super().add_callback(callback)
        added = self.callback_handler.callbacks[-1]
        if isinstance(added, ProgressiveLength):  # on_init_end has been called for the others
            added.on_init_end(self.args, self.state, self.control, model=self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes only the adapter, for ``from_pretrained`` and PEFT.

        A checkpoint also holds the encoder's parameters, from which training resumes.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        folder = output_dir if output_dir is not None else self.args.output_dir
        model: Any = self.accelerator.unwrap_model(self.model)
        # every process must do this: each may hold a shard of the parameters
        model.save_pretrained(folder, is_main_process=self.args.should_save)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a whole checkpoint or none: it gets its name when it is complete.

        In a run of several processes all of them write into it, so it is written in place.
        """
        if self.args.world_size > 1:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with written_together(folder) as self._partial, _errors_naming(folder / name):
                # transformers' method sees only this folder: the best and the old ones come below
                super()._save_checkpoint(model, trial)
                self._write_best(folder, self._partial / name)
        finally:
            self._partial = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._partial is None:  # else it does not have its name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _write_best(self, folder: Path, written: Path) -> None:
        """Sets the path of the best checkpoint, also in the state that was just written."""
        best = self.state.best_global_step
        if self.args.save_strategy == "no" or not best:
            return
        place = folder / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if place.name == written.name or place.exists():
            self.state.best_model_checkpoint = str(place)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))


@contextlib.contextmanager
def _errors_naming(checkpoint: Path) -> Iterator[None]:
    """A block whose errors of writing name the checkpoint."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = str(error).splitlines()[0] if str(error) else repr(error)
        from_torch = any(mark in why for mark in ("inline_container", "StreamWriter", "iostream"))
        if isinstance(error, OSError):
            if error.strerror is None:  # not the system's error: it names a file already
                raise
            why = reason(error)
        elif isinstance(error, SafetensorError):
            why = reason(error)
        elif not from_torch:
            raise
        raise OSError(f"output_dir: {checkpoint} cannot be written: {why}") from error


class PrefixTrainer(_SavesTheAdapter, Trainer):
    """A ``transformers.Trainer`` that saves only the adapter and leaves the base as it was.

    Args:
        model: a :class:`PrefixTuningModel`; only its prefix is trained.
        args: :class:`PrefixTrainingArguments` if None.
        options: other arguments of ``transformers.Trainer``.

    Example:
        >>> arguments = PrefixTrainingArguments("out", max_steps=100)
        >>> PrefixTrainer(tuned, arguments, train_dataset=data).train()
    """

    def __init__(
        self, model: PrefixTuningModel, args: TrainingArguments | None = None, **options: Any
    ) -> None:
        super().__init__(model, args or PrefixTrainingArguments(), **options)


class PrefixSeq2SeqTrainer(_SavesTheAdapter, Seq2SeqTrainer):
    """A ``transformers.Seq2SeqTrainer`` that saves only the adapter and leaves the base as it was.

    Args:
        model: a :class:`PrefixTuningModel`; only its prefix is trained.
        args: :class:`PrefixSeq2SeqTrainingArguments` if None.
        options: other arguments of ``transformers.Seq2SeqTrainer``.
    """

    def __init__(
        self,
        model: PrefixTuningModel,
        args: Seq2SeqTrainingArguments | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, args or PrefixSeq2SeqTrainingArguments(), **options)


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class FitOptions:
    """How :func:`fit` trains.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences in each step.
        learning_rate: the rate at the end of the warm-up; it then falls linearly to 0.
        warmup_steps: steps over which the learning rate rises.
        max_grad_norm: gradients with a larger norm are scaled down to this one.
        gradient_checkpointing: whether to recompute activations in the backward.
        seed: the seed of the data order and of dropout.
    """

    steps: int = 80
    batch_size: int = 8
    learning_rate: float = 1e-2
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0


@refuses_unknown_arguments
def fit(
    tuned: PrefixTuningModel,
    data: Dataset[Any] | Sequence[Any],
    collator: Callable[[Any], Any],
    options: FitOptions,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[float]:
    """Trains the prefix by AdamW without weight decay, a linear schedule and clipped gradients.

    Args:
        tuned: the model; only its encoder changes.
        data: items with input_ids, attention_mask and labels.
        collator: makes batches of them.
        options: see :class:`FitOptions`.
        callbacks: callbacks of the Trainer, for example a progress bar.

    Returns:
        The training loss of each step.
    """
    recompute = checkpointing_arguments(use_reentrant=False)
    if not options.gradient_checkpointing:
        recompute = {}
    with tempfile.TemporaryDirectory() as scratch:  # needed even if nothing is saved
        arguments = PrefixTrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.max_grad_norm,
            **recompute,
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = PrefixTrainer(
            model=tuned,
            args=arguments,
            train_dataset=data,
            data_collator=collator,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # the caller's callbacks show what happens
        trainer.train()
    tuned.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
