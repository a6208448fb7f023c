"""A folder with a file for each prefix, and an index of their priorities and pins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from fastprefix.files import json_text, locked, read_json, sealed, written_whole

_SUFFIX = ".safetensors"
_INDEX, _LOCK = "index.json", "index.lock"
# Tells apart files that have the same name one after the other: inode, time and size.
FileVersion = tuple[int, int, int]


class IndexEntry(NamedTuple):
    """What the index says about a prefix.

    Attributes:
        priority: prefixes of the lowest priority are evicted first.
        pinned: whether the prefix is never evicted.
    """

    priority: int
    pinned: bool


def check_name(name: str) -> None:
    """Checks the name of a prefix.

    Raises:
        TypeError: it is not text.
        ValueError: it is empty, or no file can have it; see :func:`file_name`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, takes text")
    if not name:
        raise ValueError("name: got '', takes text that is not empty")
    file_name(name)


def file_name(name: str) -> str:
    """The name of a prefix's file. The prefix's own name may have any characters.

    ASCII letters and digits stay. Each UTF-8 byte of other characters becomes three characters.

    Raises:
        ValueError: the result has more than the 255 bytes that file systems accept, or the name
            cannot be written in UTF-8.
    """
    try:
        file = quote(name, safe=" ") + _SUFFIX
    except UnicodeEncodeError as error:
        raise ValueError(f"name: {name!r} cannot be written in UTF-8") from error
    if len(file) > 255:
        raise ValueError(f"name: {name!r} makes a file name of {len(file)} bytes, takes 255")
    return file


def names_in(folder: Path) -> dict[str, Path]:
    """The files of the prefixes in a folder, by the prefixes' names.

    Raises:
        ValueError: two files belong to the same name.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        name = unquote(file.name[: -len(_SUFFIX)])
        if name in found:
            raise ValueError(
                f"folder: {folder} has {found[name].name} and {file.name}, both for the prefix "
                f"{name!r}; takes one of them"
            )
        found[name] = file
    return found


def file_version(file: Path) -> FileVersion:
    """The version of a file; see :data:`FileVersion`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_index(folder: Path) -> dict[str, IndexEntry]:
    """Reads the index of a folder; it is empty if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / _INDEX
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        inside = found.get("prefixes", {})
        if "prefixes" in found and not isinstance(inside.get("priority"), int):
            found = inside  # files of older versions lack this outer object
        return {n: IndexEntry(int(e["priority"]), bool(e["pinned"])) for n, e in found.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"folder: {file} does not hold priorities and pins ({error}); without this file all "
            "prefixes have priority 0"
        ) from error


@contextlib.contextmanager
def changed_index(folder: Path, name: str, entry: IndexEntry | None) -> Iterator[None]:
    """A block that changes the file of a prefix, with the index entry that belongs to it.

    No other process changes the folder meanwhile. If the block raises, the index stays as it was.

    Args:
        folder: the folder.
        name: the prefix.
        entry: its new entry; None removes the entry.

    Raises:
        OSError: the index cannot be written.
        ValueError: the index is damaged.
    """
    with locked(folder / _LOCK):
        index = read_index(folder)
        index.pop(name, None)
        existing = names_in(folder)
        index = {one: known for one, known in index.items() if one in existing}
        if entry is not None:
            index[name] = entry
        content = {"prefixes": {one: known._asdict() for one, known in index.items()}}
        with written_whole(folder / _INDEX, durable=False) as partial:
            # written before the block: if the disk is full, nothing has changed yet
            partial.write_text(json_text(sealed(content)), encoding="utf-8")
            yield
