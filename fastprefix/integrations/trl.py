"""Makes trl's trainers run a tuned model as they run PEFT's models.

trl asks ``is_peft_model``, which checks for PEFT's class, for two reasons. First, it replaces the
forward of the model inside by one that computes log-probabilities, and must know where that model
is. Second, it needs a reference to compare the policy with. A PeftModel is its own reference, with
a copy of its adapter from before training (named "ref", see
:meth:`fastprefix.PrefixTuningModel.add_adapter`). Any other model is loaded again from its source,
which for a tuned model would give the bare base. So in trl's modules, and nowhere else, the answer
is True for tuned models too.
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
    """Changes the answer in trl's modules, those that are imported already and later ones."""
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

    is_peft_model.__module__ = __name__  # so that it is not wrapped a second time
    return is_peft_model


def _is_tuned(model: Any) -> bool:
    tuning = sys.modules.get("fastprefix.tuning.tuned_model")  # if not imported, there is none
    if tuning is None:
        return False
    from accelerate.utils import extract_model_from_parallel

    return isinstance(extract_model_from_parallel(model), tuning.TunedModel)
