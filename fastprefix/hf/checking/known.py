"""What is known of a model: the questions that were asked about it, and their answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastprefix.hf.checking.trace import undisturbed
from fastprefix.hf.devices import is_offloaded
from fastprefix.hf.facts import Facts
from fastprefix.hf.patch.probe import Slots, UnsupportedModelError

Question = Literal["patch", "prefix", "prompt"]

SWITCH_OFF = "check=False switches this check off"

_LOGGER = logging.getLogger("fastprefix")


@dataclass(eq=False)
class Known:
    """What is known of a model, for as long as its modules, dtype and device are the same.

    Attributes:
        slots: what the probe found.
        answers: for each question that was asked, what is wrong, or "" if nothing is.
        errors: the largest relative error that was seen; nothing for a question without a
            comparison.
    """

    slots: Slots
    answers: dict[Question, str] = field(default_factory=dict)
    errors: dict[Question, float] = field(default_factory=dict)


FACTS = Facts[Known]()


def ask(
    model: PreTrainedModel,
    known: Known,
    question: Question,
    compare: Callable[[], tuple[str, float | None]],
) -> None:
    """Asks a question about a model, unless the answer is known.

    A model whose weights are not all here is not asked; a warning in the log says so.

    Args:
        model: the model to run.
        known: what is known of it; gets the answer.
        question: the question.
        compare: returns what is wrong, or "", and the largest error, or None if nothing was
            compared.

    Raises:
        UnsupportedModelError: the answer, found now or before, says that something is wrong.
    """
    if question not in known.answers:
        why = _unable(model)
        if why:
            _LOGGER.warning("%s: %s is not checked: %s", type(model).__name__, question, why)
            known.answers[question] = ""
            return
        with undisturbed(model):
            known.answers[question], error = compare()
        if error is not None:
            known.errors[question] = error
    if known.answers[question]:
        raise UnsupportedModelError(known.answers[question])


def _unable(model: PreTrainedModel) -> str:
    """Why this process cannot run a model and compare its results; "" if it can."""
    parameters = list(model.parameters())
    if any(x.is_meta for x in parameters) and not is_offloaded(model):
        return "some of its weights are on the meta device"
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "its weights are sharded"
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "it is tensor-parallel"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "its weights are DeepSpeed's"
    return ""
