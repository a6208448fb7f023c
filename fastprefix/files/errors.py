"""Errors of writing and reading: they name the file, and give the reason in words."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def reason(error: BaseException) -> str:
    """Why something could not be read or written, in the system's words, without error numbers."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"(?:I/O error: )?([^:]*) \(os error \d+\)", str(error))
    return found[1].strip() if found else str(error)


@contextlib.contextmanager
def write_errors_name(what: str) -> Iterator[None]:
    """A block that writes. Its errors name what is written, and the reason without its number."""
    try:
        yield
    except SafetensorError as error:
        raise _os_error(
            OSError, f"{what} cannot be written: {reason(error)}", _error_number(error)
        ) from error
    except OSError as error:
        if error.strerror is None:  # raised by us: it names the file already
            raise
        kind = type(error) if type(error).__module__ == "builtins" else OSError
        raise _os_error(kind, f"{what} cannot be written: {reason(error)}", error.errno) from error


@contextlib.contextmanager
def errors_name_target(partial: Path, target: Path) -> Iterator[None]:
    """A block whose errors name a file by its later place instead of its present one.

    Args:
        partial: the folder in which the files lie for now.
        target: the folder to which they belong.
    """
    try:
        yield
    except OSError as error:
        if error.strerror is not None or str(partial) not in str(error):
            raise
        message = str(error).replace(str(partial), str(target))
        raise _os_error(type(error), message, error.errno) from error


def _os_error(kind: type[OSError], message: str, number: int | None) -> OSError:
    error = kind(message)
    error.errno = number
    return error


def _error_number(error: BaseException) -> int:
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else errno.EIO
