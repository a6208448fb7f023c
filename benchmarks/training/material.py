"""The data of both tasks, encoded: what is trained with, chosen by and reported on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from fastprefix.tasks import (
    ClassificationDataset,
    Collator,
    DescriptionDataset,
    Record,
    load_folders,
    load_records,
    split_examples,
)
from fastprefix.tasks.encode import IGNORED

from .plan import Budget


def shuffled(things: Sequence[Any], key: Any) -> list[Any]:
    """In an order that depends on the things alone."""
    return sorted(things, key=lambda thing: hashlib.sha256(key(thing).encode()).digest())


@dataclass(frozen=True)
class Described:
    """Records with the same attributes: one to compute a loss on, and all their descriptions."""

    record: Record
    references: tuple[str, ...]


def described(records: Sequence[Record]) -> list[Described]:
    """Records by their attributes, shuffled; the record of each is its first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.prompt, []).append(record)
    grouped = [
        Described(group[0], tuple(record.description for record in group))
        for group in groups.values()
    ]
    return shuffled(grouped, lambda one: one.record.prompt)


class InfixCollator:
    """A collator whose batches say where the description begins, which is where an infix goes."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, items: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """The collator's batch with ``infix_positions`` [B]."""
        batch = self._collator(items)
        starts = [sum(label == IGNORED for label in item["labels"]) for item in items]
        return batch | {"infix_positions": torch.tensor(starts)}


@dataclass(frozen=True)
class Material:
    """A task's data; items are those of a data set of :mod:`fastprefix.tasks`.

    Attributes:
        train: items for the Trainer, shuffled.
        dev: held-out items to choose learning rates by.
        test: held-out items that are reported.
        collator: makes batches of them.
        described: of E2E, what the test items describe; empty for news.
        classes: of news; empty for E2E.
    """

    train: Any
    dev: Any
    test: Any
    collator: Any
    described: tuple[Described, ...] = ()
    classes: tuple[str, ...] = ()


def e2e(
    train_file: str | Path, heldout_file: str | Path, tokenizer: PreTrainedTokenizerBase, b: Budget
) -> Material:
    """Attributes to a sentence, from two files that :func:`load_records` takes.

    No attributes of the held-out part occur in training.

    Raises:
        ValueError: the files hold fewer records than the budget asks for.
    """

    def fits(record: Record) -> bool:
        text = f"{record.prompt}\n{record.description}"
        return len(tokenizer(text)["input_ids"]) + 2 <= b.max_length

    every = described(load_records(heldout_file))
    seen = {one.record.prompt for one in every}
    heldout = list(islice((x for x in every if fits(x.record)), b.dev_size + b.test_size))
    train = [r for r in load_records(train_file) if r.prompt not in seen]
    train = shuffled(train, lambda r: f"{r.prompt}\n{r.description}")
    train = list(islice(filter(fits, train), b.train_size))
    if len(heldout) < b.dev_size + b.test_size or len(train) < b.batch_size:
        raise ValueError(
            f"data: got {len(train)} records to train with and {len(heldout)} held out, takes at "
            f"least {b.batch_size} and {b.dev_size + b.test_size}"
        )
    dev, test = heldout[: b.dev_size], heldout[b.dev_size :]

    def encode(records: Sequence[Record]) -> DescriptionDataset:
        return DescriptionDataset(records, tokenizer, b.max_length)

    return Material(
        encode(train),
        encode([one.record for one in dev]),
        encode([one.record for one in test]),
        Collator(tokenizer),
        described=tuple(test),
    )


def news(folder: str | Path, tokenizer: PreTrainedTokenizerBase, b: Budget) -> Material:
    """Texts to a class, from a folder that :func:`load_folders` takes.

    Raises:
        ValueError: the folder holds fewer texts than the budget asks for.
    """
    train, heldout = split_examples(load_folders(folder))
    train, heldout = (shuffled(part, lambda one: one.text) for part in (train, heldout))
    if len(heldout) < b.dev_size + b.test_size or len(train) < b.batch_size:
        raise ValueError(
            f"data: got {len(train)} texts to train with and {len(heldout)} held out, takes at "
            f"least {b.batch_size} and {b.dev_size + b.test_size}"
        )
    classes = tuple(sorted({example.label for example in train}))

    def encode(examples: Sequence[Any]) -> ClassificationDataset:
        return ClassificationDataset(examples, tokenizer, b.max_length, classes)

    return Material(
        encode(train[: b.train_size]),
        encode(heldout[: b.dev_size]),
        encode(heldout[b.dev_size : b.dev_size + b.test_size]),
        DataCollatorWithPadding(tokenizer),
        classes=classes,
    )
