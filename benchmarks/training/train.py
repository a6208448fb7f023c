"""One run: a fresh model, transformers' Trainer, held-out figures."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from fastprefix.files import sealed, written_whole
from fastprefix.tasks import write
from fastprefix.tasks.encode import IGNORED

from . import material
from .build import Built, build
from .material import InfixCollator, Material
from .plan import Budget, Method, Run, TaskName


@dataclass(frozen=True)
class Source:
    """Where a task's model and data are.

    Attributes:
        model: a folder or a name on the hub.
        data: of E2E the files to train with and held out; of news one folder.
    """

    model: str
    data: tuple[str, ...]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return AutoTokenizer.from_pretrained(self.model)

    def load(self, task: TaskName, classes: int, dtype: torch.dtype) -> PreTrainedModel:
        """A fresh model, in evaluation mode."""
        model: Any
        if task == "e2e":
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.model, dtype=dtype, num_labels=classes
            )
        return model.eval()


@cache  # a worker meets few
def material_of(source: Source, task: TaskName, budget: Budget) -> Material:
    """A task's data, encoded."""
    return getattr(material, task)(*source.data, source.tokenizer(), budget)


TASK_TYPES: dict[TaskName, str] = {"e2e": "CAUSAL_LM", "news": "SEQ_CLS"}


def fresh(
    task: TaskName, method: Method, seed: int, source: Source, data: Material, b: Budget
) -> tuple[Built, PreTrainedTokenizerBase]:
    """The method's model before training; all that starts at random depends on the seed.

    What is trained is float32 always, what is frozen in the dtype of the computation.
    """
    tokenizer = source.tokenizer()
    torch.manual_seed(seed)
    frozen = b.bf16 and method.kind != "full"
    dtype = torch.bfloat16 if frozen else torch.float32
    model = source.load(task, len(data.classes), dtype)
    return build(method, model, tokenizer, TASK_TYPES[task]), tokenizer


def train(run: Run, source: Source) -> dict[str, Any]:
    """Trains and evaluates.

    Returns:
        For JSON: the training loss of every step, `dev_loss` and `test_loss` (nats per target
        token, or per text), `bleu` or `accuracy` in percent, numbers and bytes, seconds.
    """
    began = time.perf_counter()
    b = run.budget
    data = material_of(source, run.task, b)
    built, _ = fresh(run.task, run.method, run.seed, source, data, b)
    collator = InfixCollator(data.collator) if built.infix else data.collator
    known = len(data.train) if run.method.train_size is None else run.method.train_size
    items: Subset[Any] = Subset(data.train, range(min(known, len(data.train))))
    losses = [] if run.method.kind == "none" else _fit(run, built, items, collator)
    built.model.eval()
    result = {
        "method": run.method.name,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "train_losses": losses,
        "trainable": built.trainable,
        "stored": built.stored,
        "bytes": built.bytes_on_disk(),
    }
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if b.bf16 else nullcontext():
        if run.task == "e2e":
            result |= _of_descriptions(built, data, collator, b)
        else:
            result |= _of_classes(built, data, collator)
    return result | {"seconds": time.perf_counter() - began}


def _fit(run: Run, built: Built, items: Any, collator: Callable[[Any], Any]) -> list[float]:
    b = run.budget
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            use_cpu=True,
            bf16=b.bf16,
            max_steps=b.steps,
            per_device_train_batch_size=b.batch_size,
            learning_rate=run.learning_rate,
            warmup_steps=b.steps // 10,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=run.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(built.model, arguments, train_dataset=items, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _of_descriptions(built: Built, data: Material, collator: Any, b: Budget) -> dict[str, Any]:
    import sacrebleu

    assert data.encoding is not None
    texts = [
        text.split("\n")[0]
        for text in write(built.model, data.encoding, data.described, len(data.described))
    ]
    most = max(len(one.targets) for one in data.described)
    # sacrebleu takes one list for each place among the references, with None where there is none
    references: Any = [
        [one.targets[i] if i < len(one.targets) else None for one in data.described]
        for i in range(most)
    ]
    return {
        "dev_loss": target_loss(built.model, data.dev, collator, 8),
        "test_loss": target_loss(built.model, data.test, collator, 8),
        "bleu": sacrebleu.corpus_bleu(texts, references).score,
        "texts": texts[:3],
    }


def target_loss(model: Any, items: Any, collator: Any, batch_size: int) -> float:
    """Mean cross entropy in nats per target token, over all items."""
    total, tokens = 0.0, 0
    for start in range(0, len(items), batch_size):
        batch = collator(items[start : start + batch_size])
        # no token precedes the first one, so its label does not count
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


def _of_classes(built: Built, data: Material, collator: Any) -> dict[str, float]:
    def measured(items: Any) -> tuple[float, float]:
        loss = right = 0.0
        for start in range(0, len(items), 50):
            chosen = [items[i] for i in range(start, min(start + 50, len(items)))]
            batch = collator(chosen)
            output = built.model(**batch)
            loss += float(output.loss) * len(chosen)
            right += float((output.logits.argmax(-1) == batch["labels"]).sum())
        return loss / len(items), 100 * right / len(items)

    test_loss, accuracy = measured(data.test)
    return {"dev_loss": measured(data.dev)[0], "test_loss": test_loss, "accuracy": accuracy}


def train_to_file(run: Run, source: Source, file: Path, fingerprint: str) -> None:
    """A worker's job: what :func:`train` returns, whole or not at all."""
    write_whole(file, train(run, source) | {"fingerprint": fingerprint})


def write_whole(file: Path, result: dict[str, Any]) -> None:
    """As JSON; who reads the file never sees a part of it."""
    with written_whole(file) as partial:
        partial.write_text(json.dumps(sealed(result), indent=1))
