"""JSON objects in files: read with a limit on their size, and with a sha256 of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastprefix.files.digests import DAMAGED, json_digest

# The most bytes of a JSON text or of a header that we parse. No file of ours comes near it, and
# parsing as much does no harm.
MAX_TEXT_BYTES = 16 * 2**20
_DIGEST = "sha256"


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object, for example one in a file's metadata.

    Raises:
        ValueError: the text is not a JSON object, or is too long.
    """
    try:
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError(f"got {len(text):,} characters, takes a JSON object")
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"got a JSON {type(value).__name__}, takes an object")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        ValueError: the file holds no JSON object, is too long, or has another sha256 than
            :func:`sealed` gave it; the message names the file.
        OSError: the file cannot be read.
    """
    with file.open("rb") as raw:
        text = raw.read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{file}: got more than {MAX_TEXT_BYTES:,} bytes, takes a JSON object")
    try:
        return unsealed(json_object(text.decode("utf-8")))
    except ValueError as error:  # this includes text that is not UTF-8
        raise ValueError(f"{file}: {error}") from error


def json_text(value: Mapping[str, Any]) -> str:
    """The text of a JSON object as our files hold it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a JSON object a sha256 of itself; :func:`unsealed` checks it."""
    return {**value, _DIGEST: json_digest(value)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Checks and removes the sha256 that :func:`sealed` added. Without one, nothing is checked.

    Raises:
        ValueError: the sha256 is not that of the object.
    """
    content = dict(value)
    saved = content.pop(_DIGEST, None)
    if not isinstance(saved, str):
        return dict(value)
    if saved != json_digest(content):
        raise ValueError(DAMAGED)
    return content
