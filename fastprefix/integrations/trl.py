"""The trainers of trl run a tuned model as they run PEFT's.

They ask ``is_peft_model``, which goes by PEFT's class, in two matters: where a model's own forward
is, into which they put a head that computes log-probabilities, and what the policy is compared
with. A PeftModel is its own reference, with its adapter as it was before training (a copy by the
name of "ref", see :meth:`fastprefix.PrefixTuningModel.add_adapter`); any other model is loaded a
second time from where it came, which of a tuned model is the bare base. So in trl's modules, and
nowhere else, the answer is True for tuned models as well.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from fastprefix.after_import import after_import

_QUESTION = "is_peft_model"


def register() -> None:
    """Has trl's modules answer so, those that are imported already and those that will be."""
    after_import("trl.*", _recognise)


def _recognise(module: ModuleType) -> None:
    asked = vars(module).get(_QUESTION)
    if asked is not None and asked.__module__.startswith("accelerate."):
        setattr(module, _QUESTION, _with_tuned_models(asked))


def _with_tuned_models(asked: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @wraps(asked)
    def is_peft_model(model: Any) -> bool:
        if not _is_tuned(model):
            return asked(model)
        if importlib.util.find_spec("peft") is None:
            raise ImportError("peft: is not installed; trl needs it to run a model with a prefix")
        return True

    is_peft_model.__module__ = __name__  # not to be taken for accelerate's once more
    return is_peft_model


def _is_tuned(model: Any) -> bool:
    tuning = sys.modules.get("fastprefix.tuning.tuned_model")  # without it there is no tuned model
    if tuning is None:
        return False
    from accelerate.utils import extract_model_from_parallel

    return isinstance(extract_model_from_parallel(model), tuning.TunedModel)
