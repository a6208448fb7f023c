"""Checks of what was typed, before anything expensive is imported or loaded."""

from __future__ import annotations

import difflib
import os
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from fastprefix.training.config import CONFIG
from fastprefix.training.sources import (
    ADAPTER_CONFIG,
    DEFAULT_MODEL,
    HUB_NAME,
    exists,
    is_path,
    model_source,
    package,
    why,
)

__all__ = [
    "ADAPTER_WEIGHTS",
    "DEFAULT_MODEL",
    "adapter",
    "exists",
    "file_to_read",
    "file_to_write",
    "folder_to_read",
    "folder_to_write",
    "model",
    "names",
    "package",
    "place_to_write",
    "run_to_write",
    "texts",
]

_AN_ADAPTER = "the folder of an adapter, or its name on the hub as USER/NAME"
# As PEFT names it: fastprefix.formats.peft_files has it too, but imports torch.
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def model(name: str, argument: str = "--model") -> None:
    """Refuses what :func:`model_source` refuses. Does not wait for a hub that is unreachable."""
    folder, _ = model_source(name, argument)
    if not exists(Path(folder)):
        _offline_without_network()


def adapter(name: str, argument: str = "--adapter") -> None:
    """Refuses a path that is visibly no adapter, without loading it.

    Args:
        name: a folder, or a repository name on the Hugging Face hub.
        argument: what the name was given as, for messages.

    Raises:
        ValueError: there is no such folder, and the hub has no such names either; or a file of the
            adapter is missing.
    """
    path = Path(name)
    if path.is_dir():
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (path / file).is_file() and not _has_other_weights(path, file):
                raise ValueError(
                    f"{argument}: got {name}, which holds no {file}; takes {_AN_ADAPTER}"
                )
    elif exists(path):
        raise ValueError(f"{argument}: got the file {name}, takes {_AN_ADAPTER}")
    elif is_path(name) or "/" not in name:
        raise ValueError(f"{argument}: got {name!r}, which does not exist; takes {_AN_ADAPTER}")
    elif not HUB_NAME.fullmatch(name):
        raise ValueError(f"{argument}: got {name!r}, takes {_AN_ADAPTER}")
    else:
        _offline_without_network()


def texts(values: Sequence[str], argument: str) -> None:
    """Refuses empty texts, and texts that the terminal did not send as UTF-8.

    Raises:
        ValueError: one of them is such.
    """
    for value in values:
        if not value:
            raise ValueError(f"{argument}: got an empty one, takes a text")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{argument}: got {value!a}, takes a text in UTF-8")


def names(values: Sequence[str], known: Sequence[str], argument: str) -> None:
    """Refuses names that are not known, with the nearest one that is.

    Raises:
        ValueError: one of them is such.
    """
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{argument}: got {value!r}, takes {', '.join(known)}{meant}")


def file_to_read(path: Path, argument: str) -> None:
    """Refuses a path that is no readable file, or an empty one.

    Raises:
        ValueError: it is such.
    """
    if not exists(path):
        raise ValueError(f"{argument}: got {path}, which does not exist; takes a file")
    if path.is_dir():
        raise ValueError(f"{argument}: got {path}, a folder; takes a file")
    try:
        with path.open("rb") as opened:
            if not opened.read(1):
                raise ValueError(f"{argument}: got {path}, which is empty; takes a file of records")
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({why(error)})") from error


def folder_to_read(path: Path, argument: str) -> None:
    """Refuses a folder whose files cannot be listed.

    Raises:
        ValueError: it is such.
    """
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({why(error)})") from error


def folder_to_write(path: Path, argument: str, replace: bool = True) -> None:
    """Refuses a path that cannot become the folder of an adapter.

    Args:
        path: of the folder, which need not exist.
        argument: what the path was given as, for messages.
        replace: an adapter in it.

    Raises:
        ValueError: it is a file, cannot be written, or holds what must not be replaced.
    """
    if exists(path) and not path.is_dir():
        raise ValueError(f"{argument}: got {path}, a file; takes a folder")
    taken = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if exists(path / file)]
    if taken and not replace:
        raise ValueError(
            f"{argument}: got {path}, which holds an adapter; takes another folder, or --force, "
            "which replaces it"
        )
    problem = place_to_write(path)
    if problem is not None:
        raise ValueError(f"{argument}: got {path}, but {problem}")


def run_to_write(path: Path, argument: str) -> None:
    """Refuses a path that cannot become the folder of a run.

    Args:
        path: of the folder, which need not exist.
        argument: what the path was given as, for messages.

    Raises:
        ValueError: it is a file, cannot be written, or holds something else than a run.
    """
    folder_to_write(path, argument)
    if path.is_dir() and any(path.iterdir()) and not exists(path / CONFIG):
        raise ValueError(
            f"{argument}: got {path}, which holds something else than a run; takes another folder"
        )


def file_to_write(path: Path, argument: str) -> None:
    """Refuses a path that cannot be written.

    Raises:
        ValueError: it is a folder, or lies in one that is not there or cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{argument}: got {path}, a folder; takes a file")
    if not exists(path.parent):
        raise ValueError(f"{argument}: got {path}, but {path.parent} does not exist; takes a file")
    problem = None if exists(path) else place_to_write(path)
    if problem is not None:
        raise ValueError(f"{argument}: got {path}, but {problem}")


def place_to_write(path: Path) -> str | None:
    """The reason why a path cannot be written; None if it can.

    The nearest folder that exists must take a new file: it is tried, since permissions do not tell
    of a file system that takes none.
    """
    folder = path if path.is_dir() else path.parent
    while not exists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written in {folder} ({why(error)})"


def _offline_without_network() -> None:
    """Uses only the hub's local cache if the hub's address cannot be found.

    Without this the hub's client would retry for half a minute before it used the cache. It reads
    the variable when it is imported, which happens later.
    """
    if urllib.request.getproxies():  # a proxy may know the address
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _has_other_weights(folder: Path, file: str) -> bool:
    return file == ADAPTER_WEIGHTS and any(
        path.suffix in (".safetensors", ".bin") for path in folder.iterdir()
    )
