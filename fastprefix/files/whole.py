"""One file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fastprefix.files.errors import write_errors_name
from fastprefix.files.partial_folders import flush_to_disk, is_in_partial_folder, partial_folder


@contextlib.contextmanager
def written_whole(file: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """A block that writes a file. The file takes its place when the block ends.

    If the block raises, or the process is killed in it, the file stays as it was. In a block of
    :func:`written_together`, the file takes its place together with the others of that block.

    Args:
        file: replaced if it exists.
        durable: whether to wait until the disk has the content, so that a loss of power cannot
            leave the name without it. On a busy disk this can take seconds.

    Yields:
        Where the block is to write.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    file = Path(file)
    if is_in_partial_folder(file.parent):
        with write_errors_name(f"file: {file}"):
            yield file
        return
    with write_errors_name(f"file: {file}"), partial_folder(file.parent) as folder:
        partial = folder / file.name
        yield partial
        # Another process sees by the time that a file is a new one. The system clock is finer than
        # the file system's ticks, within which two files could get the same time.
        now = time.time_ns()
        os.utime(partial, ns=(now, now))
        if durable:
            flush_to_disk(partial)
        partial.replace(file)
