"""Small text files, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from fastprefix.files import written_whole


def write_text(path: Path, text: str) -> None:
    """Writes a file so that what was there before is kept if that fails.

    A pipe or a device (``/dev/stdout``) is written to as it is.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
