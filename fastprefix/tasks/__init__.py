"""Tasks: data sets, how their rows become token ids, and the metrics that papers report.

    task = get_task("bbc")                                   # or a Task of your own
    encoding = Encoding(task, tokenizer, "SEQ_CLS", max_length=128)
    items = list(encoding.items(load_examples(task, "train")))
    Trainer(model, arguments, train_dataset=items, data_collator=encoding.collator()).train()
    evaluate(model, encoding, load_examples(task, "test"))   # {"loss": ..., "accuracy": ...}

Everything is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastprefix.tasks.encode import Collator
    from fastprefix.tasks.encoding import Encoding, task_types
    from fastprefix.tasks.loading import load_examples, splits_of, stream_examples
    from fastprefix.tasks.measuring import (
        evaluate,
        find_answers,
        mean_loss,
        predict_classes,
        write,
    )
    from fastprefix.tasks.metrics import classification_scores, perplexity, text_scores
    from fastprefix.tasks.registry import TASKS, get_task
    from fastprefix.tasks.streaming import StreamedItems
    from fastprefix.tasks.task import (
        AnsweredQuestion,
        Classification,
        Extraction,
        Generation,
        HubSource,
        LabelledText,
        PackageSource,
        Task,
        WrittenText,
    )

_LAZY = {
    "TASKS": "registry",
    "AnsweredQuestion": "task",
    "Classification": "task",
    "Collator": "encode",
    "Encoding": "encoding",
    "Extraction": "task",
    "Generation": "task",
    "HubSource": "task",
    "LabelledText": "task",
    "PackageSource": "task",
    "StreamedItems": "streaming",
    "Task": "task",
    "WrittenText": "task",
    "classification_scores": "metrics",
    "evaluate": "measuring",
    "find_answers": "measuring",
    "get_task": "registry",
    "load_examples": "loading",
    "mean_loss": "measuring",
    "perplexity": "metrics",
    "predict_classes": "measuring",
    "splits_of": "loading",
    "stream_examples": "loading",
    "task_types": "encoding",
    "text_scores": "metrics",
    "write": "measuring",
}

__all__ = [
    "TASKS",
    "AnsweredQuestion",
    "Classification",
    "Collator",
    "Encoding",
    "Extraction",
    "Generation",
    "HubSource",
    "LabelledText",
    "PackageSource",
    "StreamedItems",
    "Task",
    "WrittenText",
    "classification_scores",
    "evaluate",
    "find_answers",
    "get_task",
    "load_examples",
    "mean_loss",
    "perplexity",
    "predict_classes",
    "splits_of",
    "stream_examples",
    "task_types",
    "text_scores",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastprefix.tasks' has no attribute {name!r}")
    module = importlib.import_module(f"fastprefix.tasks.{_LAZY[name]}")
    found = globals()[name] = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
