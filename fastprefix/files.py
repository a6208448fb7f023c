"""Files that are written whole or not at all, and read only if they are what was written.

What is written lies in a folder of its own, ``.fastprefix-*.partial``, until it is complete and on
the disk; then it takes its place by a rename. A process that is killed leaves at most such a
folder, which nobody reads and the next one that writes there removes.

Several files that belong together (an adapter's configuration and its weights) take their places
one after the other, which no rename does at once. Their folder is called ``.fastprefix-*.whole``
from the moment at which all of them are complete: whatever of ours finds one, after a kill, moves
the rest of it to its place before reading or writing there. (Another library that reads first,
PEFT say, may find some files of both savings.)

A safetensors file of ours holds a sha256 of all that is in it, names and metadata included. Files
without one (PEFT's, and our own of before) are read all the same: of those, a damaged number is
only noticed where it is no number any more.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_START, _PARTIAL, _WHOLE = ".fastprefix-", ".partial", ".whole"
_NAME = re.compile(rf"{re.escape(_START)}([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{32}}{re.escape(_PARTIAL)}")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
# Behind the name of a file: one of that name goes away when the others take their places.
GONE = ".fastprefix-gone"
DAMAGED = "it was damaged or changed: its sha256 is not the one that it was saved with"
_DAY = 24 * 60 * 60
_SEAL = "fastprefix-sha256"
_JSON_SEAL = "sha256"
# Far above what any file of ours has in its header or configuration, far below what hurts to parse.
MOST_TEXT = 16 * 2**20

_mine: set[Path] = set()  # folders that this process writes in


@contextlib.contextmanager
def written_whole(file: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Where to write a file that takes its name when the block ends.

    A block that raises, or a process that is killed in it, leaves the file as it was. Within a
    block of :func:`written_together`, the file takes its place with the others of that block.

    Args:
        file: replaced if it exists.
        durable: whether to wait until the disk has it, so that no loss of power leaves the name
            without what it should name; on a busy disk that can take seconds.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    file = Path(file)
    if _is_apart(file.parent):
        with _named(f"file: {file}"):
            yield file
        return
    with _named(f"file: {file}"), _own_folder(file.parent) as folder:
        partial = folder / file.name
        yield partial
        # The time of the system's clock, finer than that of its ticks: two files that take one name
        # after the other differ in it, which is how another process sees that there is a new one.
        now = time.time_ns()
        os.utime(partial, ns=(now, now))
        if durable:
            _to_disk(partial)
        partial.replace(file)


@contextlib.contextmanager
def written_together(folder: str | Path) -> Iterator[Path]:
    """Where to write files that take their places in a folder together when the block ends.

    Files in it of other names stay; sub-folders are merged; a file that is written under the name
    of another with :data:`GONE` behind it takes that other one away. See the head of this module.
    A folder that this made is removed again if the block raises. A block within another one is a
    part of that.

    Args:
        folder: made if need be.

    Raises:
        OSError: they cannot be written; the message names the file or the folder.
    """
    folder = Path(folder)
    if _is_apart(folder):
        with _named(f"folder: {folder}"):
            folder.mkdir(exist_ok=True)
            yield folder
        return
    made = not folder.exists()
    with _named(f"folder: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _named(f"folder: {folder}"), _own_folder(folder) as partial:
            remove_leftovers(folder)
            with _as_in(folder, partial):
                yield partial
            _check_places(partial, folder)
            for path in list(partial.rglob(f"*{GONE}")):
                there = folder / path.relative_to(partial)
                if not os.path.lexists(there.with_name(there.name.removesuffix(GONE))):
                    path.unlink()
            for path in sorted(partial.rglob("*")):
                _to_disk(path)
            _to_disk(partial)
            whole = partial.with_suffix(_WHOLE)
            partial.rename(whole)  # from here on the files are there
            _to_disk(folder)
            _move(whole, folder)
            _to_disk(folder)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # others may have put something in
                folder.rmdir()
        raise


def finish(folder: str | Path) -> None:
    """Ends what :func:`written_together` had begun in a folder when its process was killed.

    Raises:
        ValueError: the folder cannot be written to.
    """
    for whole in Path(folder).glob(f"{_START}*{_WHOLE}"):
        if whole.is_symlink() or not whole.is_dir():
            continue
        try:
            _move(whole, Path(folder))
        except OSError as error:
            raise ValueError(
                f"folder: {folder} holds files that were saved, but not put in their places "
                f"({whole.name}), and they cannot be put there: {reason(error)}"
            ) from error


def remove_leftovers(folder: Path) -> None:
    """Removes from a folder what killed processes had begun to write, and ends what they ended.

    Raises:
        ValueError: see :func:`finish`.
    """
    finish(folder)
    for partial in folder.glob(f"{_START}*{_PARTIAL}"):
        if not partial.is_symlink() and _is_left(partial):
            shutil.rmtree(partial, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether a folder, by its name, is one in which files are written, or were by a killed one."""
    return path.name.startswith(_START) and path.suffix in (_PARTIAL, _WHOLE)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keeps other processes, and other threads, that ask for the same file waiting.

    On Windows it does not.

    Raises:
        OSError: the file cannot be made, or is a link.
    """
    if fcntl is None:
        yield
        return
    with _named(f"file: {file}"):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a killed process lets go
        yield
    finally:
        os.close(descriptor)


def write_safetensors(
    file: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    durable: bool = True,
) -> None:
    """Writes a safetensors file, whole, with a sha256 of what is in it.

    Args:
        file: replaced if it exists.
        tensors: of any device and strides; those that share memory are written apart.
        metadata: beside them.
        durable: see :func:`written_whole`.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:  # the file's format has no such thing
            tensors[name] = tensor.clone()
        seen.add(storage)
    sealed = {"format": "pt", **metadata}
    sealed[_SEAL] = digest(tensors, sealed)
    with written_whole(file, durable=durable) as partial:
        save_file(tensors, partial, metadata=sealed)


def read_safetensors(
    file: str | Path, check: Callable[[Sequence[str], Mapping[str, str]], object] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU and in memory of their own, and the metadata.

    Args:
        file: of any writer.
        check: given the tensors' names and the metadata, before any tensor is read; raises if it
            does not take them.

    Raises:
        SafetensorError: not a whole safetensors file.
        ValueError: not what :func:`write_safetensors` wrote, or `check`'s.
        OSError: it cannot be read.
    """
    with opened(file) as content:
        metadata = dict(content.metadata() or {})
        names = list(content.keys())
        if check is not None:
            check(names, metadata)
        # a tensor of the file is the mapped file, and would change with it
        tensors = {name: content.get_tensor(name).clone() for name in names}
    seal = metadata.pop(_SEAL, None)
    if seal is not None and seal != digest(tensors, metadata):
        raise ValueError(DAMAGED)
    return tensors, metadata


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[Any]:
    """A safetensors file, as ``safetensors.safe_open`` opens it; a header of any size is refused.

    Raises:
        SafetensorError: not a whole safetensors file.
        ValueError: its header is too long.
        OSError: it cannot be read.
    """
    header_bytes(file)
    with safe_open(file, framework="pt") as content:
        yield content


def header_bytes(file: str | Path) -> int:
    """Bytes in front of the tensors of a safetensors file.

    Raises:
        ValueError: more than the file has, or than any file of ours needs.
        OSError: it cannot be read.
    """
    with open(file, "rb") as raw:
        first = raw.read(8)
        size = os.fstat(raw.fileno()).st_size
    length = int.from_bytes(first, "little")
    most = min(size - 8, MOST_TEXT)
    if len(first) < 8 or length > most:
        told = f"a header of {length:,} bytes" if len(first) == 8 else "no header"
        raise ValueError(f"not a whole safetensors file: {told} in {size:,} bytes")
    return 8 + length


def json_object(text: str) -> dict[str, Any]:
    """The object that a text holds, the metadata of a file say.

    Raises:
        ValueError: it is none.
    """
    try:
        if len(text) > MOST_TEXT:
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
    """The JSON object in a file.

    Raises:
        ValueError: not JSON, not an object, too long, or not what :func:`sealed` made; the message
            names the file.
        OSError: it cannot be read.
    """
    with file.open("rb") as raw:
        text = raw.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        raise ValueError(f"{file}: got more than {MOST_TEXT:,} bytes, takes a JSON object")
    try:
        return unsealed(json_object(text.decode("utf-8")))
    except ValueError as error:  # of JSON and of UTF-8, too
        raise ValueError(f"{file}: {error}") from error


def json_text(value: Mapping[str, Any]) -> str:
    """How files of ours hold a JSON object."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a sha256 of itself; see :func:`unsealed`."""
    return {**value, _JSON_SEAL: _json_digest(value)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`sealed` was given; an object without a sha256 is taken as it is.

    Raises:
        ValueError: another sha256 than its own.
    """
    inside = dict(value)
    seal = inside.pop(_JSON_SEAL, None)
    if not isinstance(seal, str):
        return dict(value)
    if seal != _json_digest(inside):
        raise ValueError(DAMAGED)
    return inside


def reason(error: BaseException) -> str:
    """Why something could not be read or written, in the system's words and without its numbers."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    told = re.search(r"(?:I/O error: )?([^:]*) \(os error \d+\)", str(error))
    return told[1].strip() if told else str(error)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A sha256 of everything that a file says.

    Args:
        tensors: contiguous, on the CPU.
        metadata: beside them.
    """
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        found.update(numbers)
    return found.hexdigest()


def _json_digest(value: Mapping[str, Any]) -> str:
    same = json.loads(json.dumps(value))  # as a reader has it
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A new folder that says whose it is, removed at the end."""
    folder = parent / f"{_START}{_HOST}-{os.getpid()}-{uuid.uuid4().hex}{_PARTIAL}"
    _mine.add(folder.absolute())
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _mine.discard(folder.absolute())


def _is_apart(folder: Path) -> bool:
    """Whether a folder lies in one that this process writes in, and nobody reads."""
    place = folder.absolute()
    return any(one in _mine for one in (place, *place.parents))


def _is_left(partial: Path) -> bool:
    """Whether nobody writes in this folder any more, as far as can be known."""
    owner = _NAME.fullmatch(partial.name)
    if owner is None:  # of an older version
        return True
    host, process = owner[1], int(owner[2])
    if host == _HOST and process == os.getpid():
        return partial.absolute() not in _mine  # of a process that had this one's number
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


def _check_places(source: Path, target: Path) -> None:
    """Refuses what :func:`_move` would stop at half-way."""
    for path in source.iterdir():
        place = target / path.name.removesuffix(GONE)
        if not os.path.lexists(place):
            continue
        folders = [one.is_dir() and not one.is_symlink() for one in (path, place)]
        if folders[0] != folders[1]:
            kinds = ["a folder" if one else "a file" for one in folders]
            raise FileExistsError(f"{place} is {kinds[1]}, takes none or {kinds[0]}")
        if folders[0]:
            _check_places(path, place)


def _move(source: Path, target: Path) -> None:
    """Puts what is in a folder into another one; never through a link out of it."""
    with contextlib.suppress(FileNotFoundError):  # another process does the same
        _check_places(source, target)
        for path in list(source.iterdir()):
            place = target / path.name
            with contextlib.suppress(FileNotFoundError):
                if path.name.endswith(GONE):
                    (target / path.name.removesuffix(GONE)).unlink(missing_ok=True)
                    path.unlink()
                elif path.is_dir() and not path.is_symlink() and place.is_dir():
                    _move(path, place)
                    _to_disk(place)
                else:
                    path.replace(place)
        source.rmdir()


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of writing with the name of what is written, and no number of the system's."""
    try:
        yield
    except SafetensorError as error:
        raise _error(
            OSError, f"{what} cannot be written: {reason(error)}", _number(error)
        ) from error
    except OSError as error:
        if error.strerror is None:  # not the system's: it says what it is about
            raise
        kind = type(error) if type(error).__module__ == "builtins" else OSError
        raise _error(kind, f"{what} cannot be written: {reason(error)}", error.errno) from error


@contextlib.contextmanager
def _as_in(folder: Path, partial: Path) -> Iterator[None]:
    """Errors that name a file by the place that it would have had."""
    try:
        yield
    except OSError as error:
        if error.strerror is not None or str(partial) not in str(error):
            raise
        told = str(error).replace(str(partial), str(folder))
        raise _error(type(error), told, error.errno) from error


def _error(kind: type[OSError], message: str, number: int | None) -> OSError:
    error = kind(message)
    error.errno = number
    return error


def _number(error: BaseException) -> int:
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else errno.EIO


def _to_disk(path: Path) -> None:
    """Waits until the disk has a file, or a folder's names."""
    if path.is_symlink():
        return
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
