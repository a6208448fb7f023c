"""The data of both tasks, encoded: what is trained with, chosen by and reported on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from fastprefix.tasks import (
    Classification,
    Encoding,
    LabelledText,
    WrittenText,
    get_task,
    load_examples,
)
from fastprefix.tasks.encode import IGNORED
from fastprefix.tasks.files import folders_of_texts
from fastprefix.tasks.splitting import position

from .plan import Budget


def shuffled(things: Sequence[Any], key: Any) -> list[Any]:
    """In an order that depends on the things alone."""
    return sorted(things, key=lambda thing: hashlib.sha256(key(thing).encode()).digest())


class InfixCollator:
    """A collator whose batches say where the description begins, which is where an infix goes."""

    def __init__(self, collator: Callable[[Any], dict[str, Tensor]]) -> None:
        self._collator = collator

    def __call__(self, items: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """The collator's batch with ``infix_positions`` [B]."""
        batch = self._collator(items)
        starts = [sum(label == IGNORED for label in item["labels"]) for item in items]
        return batch | {"infix_positions": torch.tensor(starts)}


@dataclass(frozen=True)
class Material:
    """A task's data; items are those of an encoding of :mod:`fastprefix.tasks`.

    Attributes:
        train: items for the Trainer, shuffled.
        dev: held-out items to choose learning rates by.
        test: held-out items that are reported.
        collator: makes batches of them.
        described: of E2E, what the test items describe, with all its sentences; empty for news.
        encoding: of E2E.
        classes: of news; empty for E2E.
    """

    train: Any
    dev: Any
    test: Any
    collator: Any
    described: tuple[WrittenText, ...] = ()
    encoding: Encoding | None = None
    classes: tuple[str, ...] = ()


def e2e(
    train_file: str | Path, heldout_file: str | Path, tokenizer: PreTrainedTokenizerBase, b: Budget
) -> Material:
    """Attributes to a sentence, from two files that the task "descriptions" takes.

    No attributes of the held-out part occur in training.

    Raises:
        ValueError: the files hold fewer records than the budget asks for.
    """

    def fits(example: Any) -> bool:
        text = f"{example.source}\n{example.targets[0]}"
        return len(tokenizer(text)["input_ids"]) + 2 <= b.max_length

    data_files = {"train": train_file, "validation": train_file, "test": heldout_file}
    every: list[Any] = load_examples("descriptions", "test", data_files=data_files)
    every = shuffled(every, lambda one: one.source)
    seen = {one.source for one in every}
    heldout = list(islice(filter(fits, every), b.dev_size + b.test_size))
    train: list[Any] = load_examples("descriptions", "train", data_files=data_files)
    train = [one for one in train if one.source not in seen]
    train = shuffled(train, lambda one: f"{one.source}\n{one.targets[0]}")
    train = list(islice(filter(fits, train), b.train_size))
    if len(heldout) < b.dev_size + b.test_size or len(train) < b.batch_size:
        raise ValueError(
            f"data: got {len(train)} records to train with and {len(heldout)} held out, takes at "
            f"least {b.batch_size} and {b.dev_size + b.test_size}"
        )
    dev, test = heldout[: b.dev_size], heldout[b.dev_size :]
    task = get_task("descriptions")
    # all of a target is learned from, and fewer tokens are generated
    encoding = Encoding(task, tokenizer, "CAUSAL_LM", 2 * b.max_length, b.max_length)
    train_items, dev_items, test_items = (list(encoding.items(part)) for part in (train, dev, test))
    return Material(
        train_items,
        dev_items,
        test_items,
        encoding.collator(),
        described=tuple(test),
        encoding=replace(encoding, max_target_length=b.max_new_tokens),
    )


def news(folder: str | Path, tokenizer: PreTrainedTokenizerBase, b: Budget) -> Material:
    """Texts to a class, from a folder that has a folder for each class.

    Raises:
        ValueError: the folder holds fewer texts than the budget asks for.
    """
    rows = {" ".join(row["text"].split()): row for row in folders_of_texts(Path(folder))}
    classes = tuple(sorted({row["label"] for row in rows.values()}))
    task = Classification(
        name="news", doc="news by topic", source=None, columns=("text", "label"), text="text",
        labels=classes,
    )  # fmt: skip
    every = [LabelledText(row["text"], None, classes.index(row["label"])) for row in rows.values()]
    every = shuffled(every, lambda one: one.text)
    heldout = [one for one in every if position(one.text) < 0.2]
    train = [one for one in every if position(one.text) >= 0.2]
    if len(heldout) < b.dev_size + b.test_size or len(train) < b.batch_size:
        raise ValueError(
            f"data: got {len(train)} texts to train with and {len(heldout)} held out, takes at "
            f"least {b.batch_size} and {b.dev_size + b.test_size}"
        )
    encoding = Encoding(task, tokenizer, "SEQ_CLS", b.max_length)
    return Material(
        list(encoding.items(train[: b.train_size])),
        list(encoding.items(heldout[: b.dev_size])),
        list(encoding.items(heldout[b.dev_size : b.dev_size + b.test_size])),
        DataCollatorWithPadding(tokenizer),
        classes=classes,
    )
