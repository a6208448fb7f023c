"""The folders in which files lie until they are complete, and who writes in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

START, PARTIAL, WHOLE = ".fastprefix-", ".partial", ".whole"
_NAME = re.compile(rf"{re.escape(START)}([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{32}}{re.escape(PARTIAL)}")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_DAY = 24 * 60 * 60  # seconds

_written_here: set[Path] = set()  # the partial folders in which this process writes


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder whose name says which process writes in it; removed when the block ends."""
    folder = parent / f"{START}{_HOST}-{os.getpid()}-{uuid.uuid4().hex}{PARTIAL}"
    _written_here.add(folder.absolute())
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _written_here.discard(folder.absolute())


def is_in_partial_folder(folder: Path) -> bool:
    """Whether a folder is a partial folder of this process, or inside one."""
    place = folder.absolute()
    return any(each in _written_here for each in (place, *place.parents))


def is_leftover(path: Path) -> bool:
    """Whether a folder has the name of one that files are or were written in."""
    return path.name.startswith(START) and path.suffix in (PARTIAL, WHOLE)


def is_abandoned(partial: Path) -> bool:
    """Whether nobody writes in a partial folder any more, as far as this process can know."""
    owner = _NAME.fullmatch(partial.name)
    if owner is None:  # an older version made it
        return True
    host, process = owner[1], int(owner[2])
    if host == _HOST and process == os.getpid():
        # if it is not ours, it belonged to an ended process that had our number
        return partial.absolute() not in _written_here
    if host == _HOST and os.name == "posix":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return False
    with contextlib.suppress(OSError):
        return time.time() - partial.stat().st_mtime > _DAY
    return False


def flush_to_disk(path: Path) -> None:
    """Waits until the disk has a file's content, or the names in a folder."""
    if path.is_symlink():
        return
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
