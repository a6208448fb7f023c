"""Texts and their classes, read from folders, for ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from fastprefix.arguments import methods_refuse_unknown_arguments, refuses_unknown_arguments
from fastprefix.tasks.splitting import side_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class Example:
    """A text and the name of its class."""

    text: str
    label: str


@refuses_unknown_arguments
def load_folders(root: str | PathLike[str]) -> list[Example]:
    """Return the texts of a folder that has a folder for each class, as in the BBC news data set.

    Every ``.txt`` file is one text; white space at its ends is dropped, and bytes that are not
    UTF-8 are read as Latin-1. Sorted by class and file name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds fewer than two classes, or a file without text.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is no folder")
    examples = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            data = file.read_bytes()
            try:
                text = data.decode("utf-8").strip()
            except UnicodeDecodeError:
                text = data.decode("latin-1").strip()
            if not text:
                raise ValueError(f"root: {file} holds no text")
            examples.append(Example(text, folder.name))
    found = sorted({example.label for example in examples})
    if len(found) < 2:
        raise ValueError(f"root: {root} holds the classes {found}, takes at least two")
    return examples


@refuses_unknown_arguments
def split_examples(
    examples: Sequence[Example], heldout_share: float = 0.2
) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples; a text is always on the same side.

    Which side is read off the text itself, so that it depends on nothing else. Repeated texts,
    of which BBC news has a hundred, are kept once.

    Raises:
        ValueError: heldout_share is not between 0 and 1, a text has two classes, or a side would
            be empty.
    """
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share: got {heldout_share}, takes a number between 0 and 1")
    unique: dict[str, Example] = {}
    sides: dict[str, list[Example]] = {"train": [], "heldout": []}
    for example in examples:
        key = " ".join(example.text.split())
        known = unique.get(key)
        if known is None:
            unique[key] = example
            sides[side_of(key, heldout_share)].append(example)
        elif known.label != example.label:
            raise ValueError(
                f"examples: {key[:60]!r}... is in {known.label!r} and in {example.label!r}"
            )
    train, heldout = sides.values()
    if not (train and heldout):
        raise ValueError(
            f"heldout_share: {heldout_share} leaves {len(train)} and {len(heldout)} of "
            f"{len(unique)} texts"
        )
    return train, heldout


@methods_refuse_unknown_arguments
class ClassificationDataset(Dataset[dict[str, Any]]):
    """Examples encoded once; items have ``input_ids``, ``attention_mask`` and ``labels``.

    Texts longer than max_length are cut at the end, as is usual for news, whose start says most.

    Args:
        examples: at least one.
        tokenizer: of the model.
        max_length: tokens, special ones included.
        classes: the names, in the order of the labels.

    Raises:
        ValueError: an example's class is not among the classes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        classes: Sequence[str],
    ) -> None:
        number = {name: i for i, name in enumerate(classes)}
        self._items = []
        for example in examples:
            if example.label not in number:
                raise ValueError(
                    f"examples: got the class {example.label!r}, takes one of {list(classes)}"
                )
            encoded = tokenizer(example.text, truncation=True, max_length=max_length)
            self._items.append(
                {
                    "input_ids": list(encoded["input_ids"]),
                    "attention_mask": list(encoded["attention_mask"]),
                    "labels": number[example.label],
                }
            )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one encoded example."""
        return self._items[index]
