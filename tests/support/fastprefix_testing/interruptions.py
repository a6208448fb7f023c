"""Child processes that are killed while they write, or that find no room on the disk."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POSIX = {"mkdir", "open", "rename", "replace", "unlink", "rmdir", "fsync", "utime", "ftruncate"}
_WRITERS = {"serialize_file", "write_record", "write_end_of_file"}
_NEW_NAMESPACES = 0x10000000 | 0x00020000  # of users and of mounts


def in_child(work: Callable[[], Any]) -> Any:
    """Runs a function in a child process and returns its result; None if the child is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            result = work()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(result, pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0, "the child failed; its traceback is in the output"
    return pickle.loads(told)


def steps_of(work: Callable[[], Any]) -> int:
    """The number of steps at which :func:`killed_at` can stop a function, which runs in a child."""

    def counted() -> int:
        return _watched(work, None)

    return in_child(counted)


def killed_at(step: int, work: Callable[[], Any]) -> None:
    """Runs a function in a child that is killed before, or after, the n-th call that writes."""
    assert in_child(lambda: _watched(work, step)) is None, f"there is no step {step}"


def killed_at_byte(nbytes: int, work: Callable[[], Any]) -> bool:
    """Runs a function in a child that is killed when a file gets longer than so many bytes."""

    def limited() -> bool:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        work()
        return True

    return in_child(limited) is None


def _watched(work: Callable[[], Any], last: int | None) -> int:
    seen = 0

    def watch(frame: Any, event: str, called: Any) -> None:
        nonlocal seen
        if event in ("c_call", "c_return") and _writes(called):
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def _writes(called: Any) -> bool:
    name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
    if name in ("write", "close"):
        return isinstance(owner, io.IOBase)
    return name in _WRITERS or (name in _POSIX and getattr(owner, "__name__", "") == "posix")


def without_room(
    folder: Path,
    how: str,
    before: Callable[[Path], Any],
    work: Callable[[Path], Any],
    after: Callable[[Path], Any],
    room: int,
) -> tuple[str | None, Any]:
    """Does some work where only so many bytes are left.

    Args:
        folder: empty.
        how: "tmpfs", a disk of its own that is full, or "limit", a limit on the size of files.
        before: makes what is there before, with room.
        work: is given the folder.
        after: looks at the folder afterwards, with what room is left.
        room: bytes, of the whole disk or of each file.

    Returns:
        The OSError of `work` as text, None if there was none, and what `after` returned.
    """

    def child() -> tuple[str | None, Any]:
        if how == "tmpfs":
            _mount(folder)
        before(folder)
        if how == "tmpfs":
            _fill(folder, room)
        else:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        told = None
        try:
            work(folder)
        except OSError as error:
            told = f"{error}"
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return told, after(folder)

    return in_child(child)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small disk."""

    def child() -> bool:
        try:
            _mount(folder)
        except OSError:
            return False
        return True

    return sys.platform == "linux" and in_child(child)


def _mount(folder: Path) -> None:
    """A tmpfs of 1 MiB. Only this process sees it, and it ends with the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    ids = os.getuid(), os.getgid()
    if libc.unshare(_NEW_NAMESPACES) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {ids[0]} 1")
    Path("/proc/self/gid_map").write_text(f"0 {ids[1]} 1")
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=1m") != 0:
        raise OSError(ctypes.get_errno(), "mount")


def _fill(folder: Path, room: int) -> None:
    told = os.statvfs(folder)
    left = told.f_bavail * told.f_frsize - room
    (folder / "filler").write_bytes(bytes(max(0, left)))
