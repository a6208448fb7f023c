"""Growing a prefix while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastprefix.arguments import check_number, check_whole, methods_refuse_unknown_arguments
from fastprefix.encoders import Encoder
from fastprefix.tuning.callbacks.trained_encoders import trained_encoders

_GROWN = "num_virtual_tokens"  # the key of an entry in the log history for each growth


@methods_refuse_unknown_arguments
class ProgressiveLength(TrainerCallback):
    """Adds virtual tokens whenever the training loss stops falling.

    The prefix starts with the model's ``num_virtual_tokens``. When it grows, the present tokens
    stay the same, to the bit, and so does the optimizer's state of them. (An LSTM is different: it
    reads the new tokens too, so all tokens change.) The new tokens are appended, drawn as at a
    random start, and the optimizer's state of them is zero.

    The outputs of the model change at that moment, because each token takes some of the attention,
    whatever its keys and values are. The text's positions move with the length, unless
    ``position_offset`` is set.

    Training resumes from checkpoints of any length, and the best of them can be loaded at the end.

    Args:
        step: the number of tokens that are added at a time.
        maximum: the length at which growing ends.
        threshold: the relative fall of the loss that counts as progress.
        patience: the number of logged losses in a row without progress after which the prefix
            grows.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is not positive, or threshold is not from 0 to below 1. When
            training begins: there are several processes, or the prefix is longer than maximum.
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
        """Allows the model to load checkpoints of another length."""
        for encoder in trained_encoders(kwargs["model"]):
            encoder.any_length = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the run and the prefix, which are not known before."""
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
        """Grows the prefix if the losses since the last growth show no progress."""
        if control.should_training_stop and state.global_step < state.max_steps:
            return  # another callback stopped the run; the prefix that it restored stays
        if "loss" not in kwargs["logs"] or not self._stalled(state):
            return
        for encoder in trained_encoders(kwargs["model"]):
            length = encoder.layout.num_virtual_tokens
            more = min(self.step, self.maximum - length)
            if more > 0:
                # a seed of its own: a resumed run replays the draws of data and dropout
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
    """Makes the encoder's prefix longer, and lets its optimizer continue with it.

    Args:
        encoder: see :meth:`Encoder.grow`.
        num_tokens: the number of tokens to add.
        optimizer: it keeps its state of the present tokens; that of the new ones is zero.

    Raises:
        ValueError: the optimizer does not train the encoder, or its state of the parameter has
            another shape than the parameter (as in factored optimizers). Nothing is changed then.
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
