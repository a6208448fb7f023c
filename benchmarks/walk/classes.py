"""Which classes there are: transformers' own lists of models for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

# Task, and the list that names its classes. A class in several lists is walked in the first.
TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Entry:
    """A class to walk.

    Attributes:
        name: of the class.
        task: a key of `TASKS`.
        model_type: under which transformers lists it first.
    """

    name: str
    task: str
    model_type: str

    def load(self) -> Any:
        """The class itself.

        Raises:
            AttributeError: this version of transformers lists it and does not have it.
        """
        return getattr(transformers, self.name)


def all_classes() -> dict[str, Entry]:
    """Every class by name, in the order of the lists."""
    multimodal = set(getattr(modeling_auto, TASKS["image-text"], {}).values())
    found: dict[str, Entry] = {}
    for task, listed in TASKS.items():
        for model_type, names in getattr(modeling_auto, listed, {}).items():
            for name in (names,) if isinstance(names, str) else names:
                # those that read images as well are walked as such
                if not (task == "causal" and name in multimodal):
                    found.setdefault(name, Entry(name, task, model_type))
    return found
