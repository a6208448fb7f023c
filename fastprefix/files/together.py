"""Several files of a folder that take their places together."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastprefix.files.errors import errors_name_target, reason, write_errors_name
from fastprefix.files.partial_folders import (
    PARTIAL,
    START,
    WHOLE,
    flush_to_disk,
    is_abandoned,
    is_in_partial_folder,
    partial_folder,
)

# At the end of a name: the file without this ending is removed when the others take their places.
GONE = ".fastprefix-gone"


@contextlib.contextmanager
def written_together(folder: str | Path) -> Iterator[Path]:
    """A block that writes files of a folder. They take their places together when it ends.

    :mod:`fastprefix.files` says what happens if the process is killed. Files of other names stay in
    the folder, and sub-folders are merged. To remove a file of the folder, write one that has its
    name with :data:`GONE` at the end. If the block raises, a folder that it created is removed
    again. A block inside another one belongs to the outer one.

    Args:
        folder: created if it does not exist.

    Yields:
        The folder in which the block is to write.

    Raises:
        OSError: the files cannot be written; the message names the file or the folder.
    """
    folder = Path(folder)
    if is_in_partial_folder(folder):
        with write_errors_name(f"folder: {folder}"):
            folder.mkdir(exist_ok=True)
            yield folder
        return
    created = not folder.exists()
    with write_errors_name(f"folder: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with write_errors_name(f"folder: {folder}"), partial_folder(folder) as partial:
            remove_leftovers(folder)
            with errors_name_target(partial, folder):
                yield partial
            _check_places(partial, folder)
            for path in list(partial.rglob(f"*{GONE}")):
                place = folder / path.relative_to(partial)
                if not os.path.lexists(place.with_name(place.name.removesuffix(GONE))):
                    path.unlink()
            for path in sorted(partial.rglob("*")):
                flush_to_disk(path)
            flush_to_disk(partial)
            whole = partial.with_suffix(WHOLE)
            partial.rename(whole)  # from now on the files count as written
            flush_to_disk(folder)
            _move(whole, folder)
            flush_to_disk(folder)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):  # somebody else may have put a file into it
                folder.rmdir()
        raise


def finish(folder: str | Path) -> None:
    """Completes a block of :func:`written_together` whose process was killed at its end.

    Raises:
        ValueError: the folder cannot be written to.
    """
    for whole in Path(folder).glob(f"{START}*{WHOLE}"):
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
    """Completes what killed processes had finished writing in a folder, and removes the rest.

    Raises:
        ValueError: see :func:`finish`.
    """
    finish(folder)
    for partial in folder.glob(f"{START}*{PARTIAL}"):
        if not partial.is_symlink() and is_abandoned(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _check_places(source: Path, target: Path) -> None:
    """Refuses what would stop :func:`_move` half-way: a file where a folder is, or the reverse."""
    for path in source.iterdir():
        place = target / path.name.removesuffix(GONE)
        if not os.path.lexists(place):
            continue
        is_folder, place_is_folder = (x.is_dir() and not x.is_symlink() for x in (path, place))
        if is_folder != place_is_folder:
            wanted, found = ("a folder" if x else "a file" for x in (is_folder, place_is_folder))
            raise FileExistsError(f"{place} is {found}, takes none or {wanted}")
        if is_folder:
            _check_places(path, place)


def _move(source: Path, target: Path) -> None:
    """Moves the content of a folder into another one, never through a link out of it."""
    with contextlib.suppress(FileNotFoundError):  # another process moves the same files
        _check_places(source, target)
        for path in list(source.iterdir()):
            place = target / path.name
            with contextlib.suppress(FileNotFoundError):
                if path.name.endswith(GONE):
                    (target / path.name.removesuffix(GONE)).unlink(missing_ok=True)
                    path.unlink()
                elif path.is_dir() and not path.is_symlink() and place.is_dir():
                    _move(path, place)
                    flush_to_disk(place)
                else:
                    path.replace(place)
        source.rmdir()
