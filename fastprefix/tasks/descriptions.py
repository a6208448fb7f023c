"""Records of attributes and the sentence that describes them, from the package or from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from os import PathLike
from typing import Literal, get_args

from fastprefix.arguments import (
    as_path,
    methods_refuse_unknown_arguments,
    refuses_unknown_arguments,
)

Split = Literal["train", "heldout"]


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class Record:
    """Attributes, in the order of the prompt, and one sentence that describes them."""

    # A dict has no hash. Equal records have equal descriptions, so their hash is enough.
    attributes: Mapping[str, str] = field(hash=False)
    description: str

    @property
    def prompt(self) -> str:
        """The attributes on one line: ``name: Alder Court | type: inn | price: £85 a night``."""
        return " | ".join(f"{key}: {value}" for key, value in self.attributes.items())


@refuses_unknown_arguments
def load_descriptions(split: Split) -> list[Record]:
    """Return the records of one split of the data set that ships with the package.

    Raises:
        ValueError: ``split`` is neither "train" nor "heldout".
    """
    if split not in get_args(Split):
        raise ValueError(f"split: got {split!r}, takes one of {get_args(Split)}")
    file = resources.files("fastprefix.tasks") / "data" / f"descriptions-{split}.jsonl"
    return _parse(file.read_bytes(), file.name, _from_json)


@refuses_unknown_arguments
def load_records(path: str | PathLike[str]) -> list[Record]:
    """Return the records of a user's file.

    A file whose name ends in ``.jsonl`` holds a JSON object a line,
    ``{"attributes": {"name": "..."}, "description": "..."}``, where attributes are text. Any
    other file holds ``name : ... | price : ...||sentence`` on each line, as E2E does. Lines
    of white space alone are skipped. A line that was cut short is refused in a ``.jsonl`` file;
    that lines are missing, or that a sentence of the other kind was cut, nothing tells.

    Raises:
        OSError: the file cannot be read.
        TypeError: path is no path.
        ValueError: the file has no record or is not UTF-8, or a line is malformed; the message
            names the file and the line.
    """
    path = as_path("path", path)
    parse_line = _from_json if path.suffix.lower() == ".jsonl" else _from_text
    return _parse(path.read_bytes(), str(path), parse_line)


def _parse(data: bytes, source: str, parse_line: Callable[[str], Record]) -> list[Record]:
    records = []
    # Split as bytes: str.splitlines would also split at characters that JSON allows in a string.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
            if line:
                records.append(parse_line(line))
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}, line {number}: not UTF-8 ({error.reason})") from error
        except _MalformedError as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
    if not records:
        raise ValueError(f"{source}: no records; the file is empty")
    return records


class _MalformedError(Exception):
    """What is wrong with a line, before the file and the line number are known."""


def _from_json(line: str) -> Record:
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
    for key in ("attributes", "description"):
        if key not in value:
            raise _MalformedError(f'the key "{key}" is missing')
    attributes = value["attributes"]
    if not isinstance(attributes, dict):
        raise _MalformedError(f'"attributes" must be an object, not {type(attributes).__name__}')
    return _record(attributes.items(), value["description"])


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Of two equal keys json keeps the last, and an attribute would be lost silently.
    return dict(_distinct(pairs))


def _from_text(line: str) -> Record:
    meaning, bars, description = line.partition("||")
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
    return _record(_distinct(pairs), description.strip())


def _distinct(pairs: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    seen = set()
    for key, value in pairs:
        if key in seen:
            raise _MalformedError(f'the key "{key}" is there twice')
        seen.add(key)
        yield key, value


def _record(pairs: Iterable[tuple[str, object]], description: object) -> Record:
    attributes = {}
    for key, value in pairs:
        if not key.strip():
            raise _MalformedError("an attribute has an empty name")
        text = _text(value, f'the attribute "{key}"')
        # The prompt is one line: the line break after it is where the description begins.
        if "\n" in key or "\n" in text:
            raise _MalformedError(f'the attribute "{key}" holds a line break')
        attributes[key] = text
    if not attributes:
        raise _MalformedError("there are no attributes")
    return Record(attributes, _text(description, "the description"))


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _MalformedError(f"{what} must be text, not {type(value).__name__}")
    if not value.strip():
        raise _MalformedError(f"{what} is empty")
    return value
