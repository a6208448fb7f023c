"""A lock between processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastprefix.files.errors import write_errors_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """A block in which only one thread of one process can be at a time, for each file.

    On Windows there is no such lock, and the block just runs.

    Args:
        file: the file that stands for the lock; created if it does not exist.

    Raises:
        OSError: the file cannot be created, or is a link.
    """
    if fcntl is None:
        yield
        return
    with write_errors_name(f"file: {file}"):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # the system releases it if the process is killed
        yield
    finally:
        os.close(descriptor)
