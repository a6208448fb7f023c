"""Stopping a run that has gone wrong, and restoring the last good prefix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastprefix.arguments import check_number, check_whole, methods_refuse_unknown_arguments

_LOGGER = logging.get_logger(__name__)


@methods_refuse_unknown_arguments
class StopOnCollapse(TrainerCallback):
    """Stops when numbers are no longer finite or the loss has collapsed, and restores the prefix.

    Gradients are checked before each optimizer step. If one holds a NaN or an infinity, the step is
    not taken. (In fp16 training the gradient scaler skips such steps, and they are not checked
    here.) After the step the trained parameters are checked, and so is each loss that the Trainer
    logs. The state that is restored is the latest one from which a good loss was logged, that is,
    the one at the logged step before it.

    Args:
        factor: the loss has collapsed if it is more than this many times the lowest logged one.
        patience: the number of collapsed losses in a row after which training stops.

    Attributes:
        reason: why training was stopped, or None.

    Raises:
        TypeError: factor or patience is no number.
        ValueError: factor is not above 1, or patience is not positive.
    """

    def __init__(self, factor: float = 3.0, patience: int = 2) -> None:
        check_number("factor", factor)
        check_whole("patience", patience, 1)
        if not factor > 1.0:
            raise ValueError(f"factor: got {factor}, takes more than 1")
        self.factor, self.patience = factor, patience
        self.reason: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the state at the start, the first one to return to."""
        self.reason = None
        self._lowest, self._collapsed = math.inf, 0
        self._good = self._latest = _copy(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops gradients that are not finite, so that the optimizer changes nothing."""
        if args.fp16:
            return
        model: nn.Module = kwargs["model"]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                self.reason = f"the gradient of {name} was not finite"
                model.zero_grad(set_to_none=True)
                return

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops if a gradient or a parameter of this step is not finite."""
        model: nn.Module = kwargs["model"]
        if self.reason is None:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not torch.isfinite(parameter).all():
                    self.reason = f"{name} was no longer finite"
                    break
        if self.reason is not None:
            self._stop(state, control, model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the loss; a good one confirms the state at the logged step before."""
        loss = kwargs["logs"].get("loss")
        if loss is None or self.reason is not None:
            return
        if math.isfinite(loss) and loss <= self.factor * self._lowest:
            self._lowest, self._collapsed = min(loss, self._lowest), 0
            self._good, self._latest = self._latest, _copy(kwargs["model"])
            return
        self._collapsed += 1
        if self._collapsed >= self.patience or not math.isfinite(loss):
            self.reason = f"the loss was {loss:.4g}, after a lowest of {self._lowest:.4g}"
            self._stop(state, control, kwargs["model"])

    def _stop(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        model.load_state_dict(self._good)
        control.should_training_stop = True
        _LOGGER.warning(
            f"training stopped at step {state.global_step}: {self.reason}; the prefix is what it "
            "was at the last good loss"
        )


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
