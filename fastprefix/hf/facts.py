"""Remembers what was found out about a model until the model changes."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from fastprefix.hf.devices import device_of, dtype_of

_Found = TypeVar("_Found")


class Facts(Generic[_Found]):
    """One value for each model; forgotten when its modules, its dtype or its device change."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, _Found]] = (
            weakref.WeakKeyDictionary()
        )

    def recall(self, model: PreTrainedModel) -> _Found | None:
        """What is known of a model as it is now; None of a new or a changed one."""
        likeness, found = self._found.get(model, (None, None))
        return found if likeness is not None and likeness == _likeness(model) else None

    def remember(self, model: PreTrainedModel, found: _Found) -> _Found:
        """Keeps what was found out, in place of what was known before."""
        self._found[model] = _likeness(model), found
        return found


def _likeness(model: PreTrainedModel) -> Any:
    return tuple(map(id, model.modules())), dtype_of(model), device_of(model)
