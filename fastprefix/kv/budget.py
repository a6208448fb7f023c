"""A limit on the memory that prefixes take, with the rest of them on disk or on the CPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import torch

from fastprefix.arguments import (
    as_device,
    as_path,
    check_flag,
    check_type,
    check_whole,
    methods_refuse_unknown_arguments,
    refuses_unknown_arguments,
)
from fastprefix.files import json_text, locked, read_json, remove_leftovers, sealed, written_whole
from fastprefix.kv.prefix import LayerShape, PrefixKV, measure

_SUFFIX = ".safetensors"
_INDEX, _LOCK = "index.json", "index.lock"
# What tells the files apart that have one name, one after the other.
_Version = tuple[int, int, int]


class KVBudgetError(RuntimeError):
    """A prefix does not fit, whatever is evicted; nothing was changed."""


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class Eviction:
    """What left the device to make room.

    Attributes:
        name: of the prefix.
        nbytes: that it took.
        priority: that it had.
        target: "cpu" or the file that holds it.
    """

    name: str
    nbytes: int
    priority: int
    target: str


@dataclass
class _Entry:
    """One prefix.

    Attributes:
        nbytes: that it takes on the device.
        shapes: of its layers.
        priority: the lowest leaves first.
        pinned: never leaves.
        used: when it was last asked for, in a count of all such questions.
        resident: on the device, None while evicted.
        home: where it stays for good: on the CPU, or the file.
        version: of the file that the other fields are of.
    """

    nbytes: int
    shapes: tuple[LayerShape, ...]
    priority: int
    pinned: bool
    used: int
    resident: PrefixKV | None
    home: PrefixKV | Path
    version: _Version | None = None


@methods_refuse_unknown_arguments
class KVBudget:
    """Named prefixes, of which as many bytes as allowed lie on a device.

    Whatever does not fit is evicted, lowest priority first and among equals the one that was not
    used for longest, and comes back when it is asked for. A prefix is in its home (a file, or the
    CPU's memory) before :meth:`put` returns, so that eviction only drops a copy: with a folder, a
    process that is killed at any moment loses nothing that it had put, and a new KVBudget on the
    folder finds it. (What was put in the seconds before a loss of power may be lost; a file of
    which that left a part is refused by name.) Threads may share a budget.

    Room is made before a prefix comes to the device, so that what the budget keeps there never
    takes more than max_bytes, not for a moment. A prefix that a caller still holds is not freed by
    its eviction; only copies that the budget itself keeps are counted.

    Several processes may use a folder, each with a limit and evictions of its own. Each sees what
    the others put, replace and remove when it next asks for it: a prefix that it has on its device
    is loaded again if its file is another by then. Of two that put the same name, the last stays,
    with its priority and pin. Priorities and pins that another process sets are found when a folder
    is opened, or a prefix first met. They write one at a time (not so on Windows).

    Args:
        max_bytes: that resident prefixes may take together.
        folder: home of the prefixes, made if need be; None for the CPU's memory.
        device: where resident prefixes lie.

    Attributes:
        evictions: all of them so far, oldest first.

    Raises:
        NotADirectoryError: the folder is a file.
        OSError: the folder cannot be made.
        TypeError: max_bytes is no whole number, folder no path, or device no device.
        ValueError: max_bytes is below 0, no such device, no folder for device "cpu", a file in the
            folder is not whole, or two are of the same prefix.
        KVBudgetError: what is pinned in the folder does not fit.
    """

    def __init__(
        self,
        max_bytes: int,
        folder: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_whole("max_bytes", max_bytes, 0)
        self.max_bytes, self.device = max_bytes, as_device("device", device)
        self.folder = None if folder is None else as_path("folder", folder)
        if self.folder is None and self.device.type == "cpu":
            raise ValueError("folder: got None with device 'cpu', takes a folder to evict to")
        self.evictions: list[Eviction] = []
        self._entries: dict[str, _Entry] = {}
        self._clock = 0
        self._lock = threading.RLock()
        if self.folder is not None:
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(f"folder: got {folder}, which is a file, takes a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(self.folder)

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device now; never above max_bytes."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values() if entry.resident)

    @property
    def resident_names(self) -> tuple[str, ...]:
        """Names of the prefixes on the device now."""
        with self._lock:
            return tuple(name for name, entry in self._entries.items() if entry.resident)

    def put(
        self, name: str, kv: PrefixKV, *, priority: int = 0, pinned: bool = False
    ) -> list[Eviction]:
        """Adds a prefix, or replaces the one of this name.

        Args:
            name: any text but the empty one, in a folder as long as names of files may be (see
                :func:`file_name`).
            kv: a finished prefix; with gradients it would not be one.
            priority: the lowest are evicted first.
            pinned: whether it is never evicted.

        Returns:
            What was evicted for it. An unpinned prefix larger than the budget goes home at once.

        Raises:
            TypeError: name is not text, kv no PrefixKV, priority no whole number, or pinned neither
                True nor False.
            ValueError: no name or too long a one, kv requires gradients, or, with a folder, is not
                all finite, or the folder's index is damaged.
            KVBudgetError: pinned, and it does not fit beside the other pinned ones.
            OSError: its file cannot be written; the one before it stays.
        """
        check_name(name)
        check_type("kv", kv, PrefixKV, "a PrefixKV")
        check_type("priority", priority, int, "a whole number")
        check_flag("pinned", pinned)
        if kv.requires_grad:
            raise ValueError(
                "kv: got a prefix that requires gradients, takes a finished one: kv.detach()"
            )
        with self._lock:
            others = sum(e.nbytes for n, e in self._entries.items() if e.pinned and n != name)
            if pinned and others + kv.nbytes > self.max_bytes:
                raise KVBudgetError(
                    f"kv: {name!r} takes {kv.nbytes:,} bytes and is pinned, others that are pinned "
                    f"{others:,} of {self.max_bytes:,}"
                )
            home: PrefixKV | Path
            version = None
            if self.folder is None:
                home = _copied(kv, torch.device("cpu"))
            else:
                self._known(name)
                before = self._entries.get(name)
                home = before.home if before is not None else self.folder / file_name(name)
                assert isinstance(home, Path)
                with self._index(name, (priority, pinned)):
                    kv.save(home, durable=False)
                    version = _version(home)
            self._entries.pop(name, None)
            entry = _Entry(
                kv.nbytes, kv.shapes, priority, pinned, self._tick(), None, home, version
            )
            self._entries[name] = entry
            evicted = self._make_room(entry)
            if evicted is None:
                return []
            # a copy: what a caller does to his must not change what was put
            entry.resident = _copied(kv, self.device)
            return evicted

    def get(self, name: str) -> PrefixKV:
        """A prefix on the device, brought back if it had been evicted.

        One larger than what pinned prefixes leave of the budget is loaded for the caller alone.

        Raises:
            KeyError: no prefix of this name.
            ValueError: its file is not whole any more.
        """
        with self._lock:
            entry = self._entry(name)
            entry.used = self._tick()
            if entry.resident is None:
                fits = self._make_room(entry) is not None
                home = entry.home
                try:
                    kv = PrefixKV.load(home, self.device) if isinstance(home, Path) else home
                except FileNotFoundError:  # another process removed it just now
                    return self.get(name)
                kv = kv.to(self.device)
                if fits and kv.nbytes == entry.nbytes:
                    entry.resident = kv
                return kv
            return entry.resident

    def shapes(self, name: str) -> tuple[LayerShape, ...]:
        """Of a prefix's layers; loads nothing.

        Raises:
            KeyError: no prefix of this name.
        """
        with self._lock:
            return self._entry(name).shapes

    def remove(self, name: str) -> None:
        """Forgets a prefix, its file included.

        Raises:
            KeyError: no prefix of this name.
        """
        with self._lock:
            entry = self._entry(name)
            if isinstance(entry.home, Path):
                with self._index(name, None):
                    entry.home.unlink(missing_ok=True)
            del self._entries[name]

    def evict(self, name: str) -> Eviction | None:
        """Sends a prefix home by hand; None where it is there already.

        Raises:
            KeyError: no prefix of this name.
            ValueError: it is pinned.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.pinned:
                raise ValueError(
                    f"name: got {name!r}, which is pinned, takes one that is not; unpin it first"
                )
            return self._evict(name, entry) if entry.resident else None

    def set_priority(self, name: str, priority: int) -> None:
        """Changes how early a prefix is evicted.

        Raises:
            KeyError: no prefix of this name.
        """
        with self._lock:
            entry = self._entry(name)
            entry.priority = priority
            self._tell(name, entry)

    def pin(self, name: str) -> None:
        """Keeps a prefix on the device from now on, and brings it there.

        Raises:
            KeyError: no prefix of this name.
            KVBudgetError: it does not fit beside the other pinned ones.
        """
        with self._lock:
            entry = self._entry(name)
            others = sum(e.nbytes for e in self._entries.values() if e.pinned and e is not entry)
            if others + entry.nbytes > self.max_bytes:
                raise KVBudgetError(
                    f"name: {name!r} takes {entry.nbytes:,} bytes, others that are pinned "
                    f"{others:,} of {self.max_bytes:,}"
                )
            self.get(name)
            entry.pinned = True
            self._tell(name, entry)

    def unpin(self, name: str) -> None:
        """Lets a prefix be evicted again.

        Raises:
            KeyError: no prefix of this name.
        """
        with self._lock:
            entry = self._entry(name)
            entry.pinned = False
            self._tell(name, entry)

    def __contains__(self, name: object) -> bool:
        """Whether a prefix of this name was put."""
        with self._lock:
            return isinstance(name, str) and self._known(name)

    def __iter__(self) -> Iterator[str]:
        """All names, wherever the prefixes are."""
        with self._lock:
            return iter(self._names())

    def __len__(self) -> int:
        """Number of prefixes, wherever they are."""
        with self._lock:
            return len(self._names())

    def _entry(self, name: str) -> _Entry:
        if not self._known(name):
            raise KeyError(f"no prefix {name!r}; there are {sorted(self._names())}")
        return self._entries[name]

    def _names(self) -> tuple[str, ...]:
        """Of the prefixes that are there now, the oldest of this budget first."""
        if self.folder is None:
            return tuple(self._entries)
        there = names_in(self.folder)
        for name in [name for name in self._entries if name not in there]:
            del self._entries[name]
        return (*self._entries, *(name for name in there if name not in self._entries))

    def _known(self, name: str) -> bool:
        """Whether there is a prefix of a name, with what its file now says in its entry."""
        entry = self._entries.get(name)
        if self.folder is None:
            return entry is not None
        if entry is None:
            home: PrefixKV | Path | None = names_in(self.folder).get(name)
        else:
            home = entry.home
        if not isinstance(home, Path):
            return False
        try:
            version = _version(home)
            if entry is not None and entry.version == version:
                return True
            nbytes, shapes = measure(home)
        except FileNotFoundError:
            self._entries.pop(name, None)
            return False
        if entry is None:
            priority, stays = self._read_index().get(name, (0, False))
            entry = _Entry(nbytes, shapes, priority, False, self._tick(), None, home, version)
            self._entries[name] = entry
            entry.pinned = stays and self._fits_pinned(entry)
        else:
            entry.nbytes, entry.shapes, entry.version = nbytes, shapes, version
            entry.resident = None
            entry.pinned = entry.pinned and self._fits_pinned(entry)
        return True

    def _fits_pinned(self, entry: _Entry) -> bool:
        others = sum(e.nbytes for e in self._entries.values() if e.pinned and e is not entry)
        return others + entry.nbytes <= self.max_bytes

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _make_room(self, entry: _Entry) -> list[Eviction] | None:
        """What was evicted for an entry; None, and nothing is, where no room can be made."""
        free = self.max_bytes - self.resident_bytes
        leaving = []
        candidates = [
            (other.priority, other.used, n)
            for n, other in self._entries.items()
            if other.resident and not other.pinned and other is not entry
        ]
        for _, _, other_name in sorted(candidates):
            if free >= entry.nbytes:
                break
            leaving.append(other_name)
            free += self._entries[other_name].nbytes
        if free < entry.nbytes:
            return None
        return [self._evict(other, self._entries[other]) for other in leaving]

    def _evict(self, name: str, entry: _Entry) -> Eviction:
        entry.resident = None
        target = str(entry.home) if isinstance(entry.home, Path) else "cpu"
        eviction = Eviction(name, entry.nbytes, entry.priority, target)
        self.evictions.append(eviction)
        return eviction

    def _open(self, folder: Path) -> None:
        """Finds what an earlier budget put here; files it was still writing are not among it."""
        about = self._read_index()
        remove_leftovers(folder)
        for name, file in names_in(folder).items():
            try:
                version = _version(file)
                nbytes, shapes = measure(file)
            except FileNotFoundError:  # another process removed it just now
                continue
            priority, stays = about.get(name, (0, False))
            entry = _Entry(nbytes, shapes, priority, stays, self._tick(), None, file, version)
            self._entries[name] = entry
        pinned = {name: entry for name, entry in self._entries.items() if entry.pinned}
        needed = sum(entry.nbytes for entry in pinned.values())
        if needed > self.max_bytes:
            raise KVBudgetError(
                f"max_bytes: got {self.max_bytes:,}, but what is pinned in {folder} takes "
                f"{needed:,}: {sorted(pinned)}"
            )
        for name in pinned:
            self.get(name)

    def _read_index(self) -> dict[str, tuple[int, bool]]:
        """Priority, and whether it is pinned, by name."""
        assert self.folder is not None
        return _read_index(self.folder / _INDEX)

    @contextlib.contextmanager
    def _index(self, name: str, told: tuple[int, bool] | None) -> Iterator[None]:
        """Writes a prefix's priority and pin, or that it has none, into the folder's index.

        The block is what goes with it: no other process changes the folder meanwhile, and the
        index is as it was if it raises.
        """
        assert self.folder is not None
        with locked(self.folder / _LOCK):
            index = self._read_index()
            index.pop(name, None)
            there = names_in(self.folder)
            index = {one: entry for one, entry in index.items() if one in there}
            if told is not None:
                index[name] = told
            about = {one: {"priority": p, "pinned": stays} for one, (p, stays) in index.items()}
            with written_whole(self.folder / _INDEX, durable=False) as partial:
                # written first: a disk that is full refuses it before anything has changed
                partial.write_text(json_text(sealed({"prefixes": about})), encoding="utf-8")
                yield

    def _tell(self, name: str, entry: _Entry) -> None:
        """Writes an entry's priority and pin into the folder's index."""
        if self.folder is not None:
            with self._index(name, (entry.priority, entry.pinned)):
                pass


def _version(file: Path) -> _Version:
    told = file.stat()
    return told.st_ino, told.st_mtime_ns, told.st_size


def _copied(kv: PrefixKV, device: torch.device) -> PrefixKV:
    """In memory of its own, by one copy."""
    return kv.map(lambda x: x.detach().to(device, copy=True, memory_format=torch.contiguous_format))


def _read_index(file: Path) -> dict[str, tuple[int, bool]]:
    """Priority, and whether it is pinned, by name; none of either where there is no file."""
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        inside = found.get("prefixes", {})
        if "prefixes" in found and not isinstance(inside.get("priority"), int):
            found = inside  # in files of older versions there is nothing around it
        return {n: (int(e["priority"]), bool(e["pinned"])) for n, e in found.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"folder: {file} does not hold priorities and pins ({error}); without this file all "
            "prefixes have priority 0"
        ) from error


def check_name(name: str) -> None:
    """Whether a prefix can have this name.

    Raises:
        TypeError: not text.
        ValueError: empty, or too long or strange for a file; see :func:`file_name`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, takes text")
    if not name:
        raise ValueError("name: got '', takes text that is not empty")
    file_name(name)


def file_name(name: str) -> str:
    """What the file of a prefix is called, whatever characters its name has.

    Letters and digits of ASCII stay, a byte of anything else (in UTF-8) takes three.

    Raises:
        ValueError: longer than file systems take, 255 bytes, or not to be written in UTF-8.
    """
    try:
        file = quote(name, safe=" ") + _SUFFIX
    except UnicodeEncodeError as error:
        raise ValueError(f"name: {name!r} cannot be written in UTF-8") from error
    if len(file) > 255:
        raise ValueError(f"name: {name!r} makes a file name of {len(file)} bytes, takes 255")
    return file


def names_in(folder: Path) -> dict[str, Path]:
    """The prefixes of a folder: files by name.

    Raises:
        ValueError: two files are of one name, which both can be read as.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        name = unquote(file.name[: -len(_SUFFIX)])
        if name in found:
            raise ValueError(
                f"folder: {folder} has {found[name].name} and {file.name}, both for the prefix "
                f"{name!r}; takes one of them"
            )
        found[name] = file
    return found


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class KVPlan:
    """Bytes that prefixes will take.

    Attributes:
        nbytes: by name.
        expanded: what the same prefixes would take copied for each row of a batch, by name.
    """

    nbytes: dict[str, int]
    expanded: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.nbytes.values())


@refuses_unknown_arguments
def plan_kv_bytes(
    shapes: Sequence[LayerShape],
    num_virtual_tokens: Mapping[str, int],
    dtype: torch.dtype,
    batch_size: int = 1,
) -> KVPlan:
    """What prefixes of given lengths will take, before anything is allocated.

    Args:
        shapes: of the model's layers, e.g. ``fastprefix.hf.patch_of(model).shapes``; a model on the
            meta device does.
        num_virtual_tokens: length by name.
        dtype: of keys and values.
        batch_size: rows, for the comparison with copies.

    Raises:
        ValueError: a length or the batch size is below 0.
    """
    if batch_size < 0 or any(length < 0 for length in num_virtual_tokens.values()):
        raise ValueError(
            f"num_virtual_tokens, batch_size: got {dict(num_virtual_tokens)} and {batch_size}, "
            "takes 0 or more"
        )
    token = sum(shape.width for shape in shapes) * dtype.itemsize
    nbytes = {name: length * token for name, length in num_virtual_tokens.items()}
    return KVPlan(nbytes, {name: n * batch_size for name, n in nbytes.items()})
