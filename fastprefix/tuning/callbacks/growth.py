"""A prefix that becomes longer while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastprefix.arguments import check_number, check_whole, methods_refuse_unknown_arguments
from fastprefix.encoders import Encoder
from fastprefix.tuning.callbacks.trained_encoders import trained_encoders

_GROWN = "num_virtual_tokens"  # an entry of the log history says when a prefix grew


@methods_refuse_unknown_arguments
class ProgressiveLength(TrainerCallback):
    """Adds virtual tokens whenever the training loss stops falling.

    The start is the model's own ``num_virtual_tokens``. At the moment of growing the present tokens
    stay what they are, to the bit (but not those of an LSTM, which reads the new ones too), and the
    optimizer keeps what it knows of them; new ones come behind, drawn as at a random start (the
    optimizer knows nothing of them yet). The function of the model changes: it is that of the
    longer prefix. No choice of keys and values could avoid that, as a token always takes some of
    the attention. The text's positions move with the length, unless ``position_offset`` is set:
    then they stay where they are.

    Training resumes from checkpoints of any length, and the best of them may be loaded at the end.

    Args:
        step: tokens that are added at a time.
        maximum: length at which growing ends.
        threshold: the relative fall of the loss that counts as one.
        patience: how many logged losses in a row may miss it before the prefix grows.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is not positive (threshold: negative, or not below 1). When training
            begins: several processes, or a prefix longer than the maximum.
    """

    def __init__(self, step: int, maximum: int, threshold: float = 0.01, patience: int = 2) -> None:
        for name, value in (("step", step), ("maximum", maximum), ("patience", patience)):
            check_whole(name, value, 1)
        check_number("threshold", threshold)
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold: got {threshold}, takes 0 <= threshold < 1")
        self.step, self.maximum = step, maximum
        self.threshold, self.patience = threshold, patience

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the model load checkpoints of another length."""
        for encoder in trained_encoders(kwargs["model"]):
            encoder.any_length = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks what cannot be known before."""
        if args.world_size > 1:
            raise ValueError(
                f"ProgressiveLength: got {args.world_size} processes, takes one; the others would "
                "not know of the new tokens"
            )
        for encoder in trained_encoders(kwargs["model"]):
            length = encoder.layout.num_virtual_tokens
            if length > self.maximum:
                raise ValueError(
                    f"maximum: got {self.maximum}, takes {length} or more for a prefix of "
                    f"{length} tokens"
                )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Grows where the losses since the last growth ask for it."""
        if control.should_training_stop and state.global_step < state.max_steps:
            return  # another callback stopped a run that went wrong; what it restored stays
        if "loss" not in kwargs["logs"] or not self._stalled(state):
            return
        for encoder in trained_encoders(kwargs["model"]):
            length = encoder.layout.num_virtual_tokens
            more = min(self.step, self.maximum - length)
            if more > 0:
                # draws of its own: those of the data and of dropout are replayed when resuming
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(args.seed + state.global_step)
                    grow(encoder, more, kwargs["optimizer"])
                state.log_history.append({_GROWN: length + more, "step": state.global_step})

    def _stalled(self, state: TrainerState) -> bool:
        losses: list[float] = []
        for entry in state.log_history:
            if _GROWN in entry:
                losses = []
            elif "loss" in entry:
                losses.append(entry["loss"])
        if len(losses) <= self.patience:
            return False
        before, lately = min(losses[: -self.patience]), min(losses[-self.patience :])
        return lately > (1.0 - self.threshold) * before


def grow(encoder: Encoder, num_tokens: int, optimizer: Optimizer) -> None:
    """Makes the encoder's prefix longer, and its optimizer go on with it.

    Args:
        encoder: see :meth:`Encoder.grow`.
        num_tokens: how many tokens are added.
        optimizer: keeps its state of the present tokens; that of new ones is zeros.

    Raises:
        ValueError: the optimizer does not train the encoder, or keeps something of the parameter
            that has another shape (as factored optimizers do). Nothing is changed.
    """
    old = encoder.embedding
    groups = [group for group in optimizer.param_groups if any(p is old for p in group["params"])]
    if not groups:
        raise ValueError("optimizer: got one that does not train this encoder's embedding")
    state: dict[str, Any] = optimizer.state.get(old, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape != old.shape:
            raise ValueError(
                f"optimizer: got a {type(optimizer).__name__}, whose {name} of shape "
                f"{list(value.shape)} cannot be carried over to a longer prefix; takes one that "
                "keeps a number for each of the parameter's, such as AdamW"
            )
    carry = encoder.grow(num_tokens)
    new = encoder.embedding
    for group in groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = {
            name: carry(value) if isinstance(value, Tensor) and value.dim() > 0 else value
            for name, value in state.items()
        }
