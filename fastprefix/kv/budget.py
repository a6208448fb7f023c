"""A limit on the memory that prefixes take on a device; the others wait on disk or on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastprefix.arguments import (
    as_device,
    as_path,
    check_flag,
    check_type,
    check_whole,
    methods_refuse_unknown_arguments,
)
from fastprefix.files import remove_leftovers
from fastprefix.kv.prefix import PrefixKV
from fastprefix.kv.prefix_file import measure
from fastprefix.kv.prefix_folder import (
    FileVersion,
    IndexEntry,
    changed_index,
    check_name,
    file_name,
    file_version,
    names_in,
    read_index,
)
from fastprefix.kv.shapes import LayerShape

# The index entry of a prefix that the index does not have.
_DEFAULTS = IndexEntry(priority=0, pinned=False)


class KVBudgetError(RuntimeError):
    """A prefix does not fit, even if all others are evicted. Nothing was changed."""


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class Eviction:
    """A prefix that left the device to make room.

    Attributes:
        name: the prefix's name.
        nbytes: the bytes that it took on the device.
        priority: its priority.
        target: "cpu", or the file that holds the prefix.
    """

    name: str
    nbytes: int
    priority: int
    target: str


@dataclass
class _Entry:
    """What the budget knows about one prefix.

    Attributes:
        nbytes: the bytes that it takes on the device.
        shapes: the shapes of its layers.
        priority: prefixes of the lowest priority are evicted first.
        pinned: whether it is never evicted.
        last_used: the counter's value at the last :meth:`KVBudget.put` or :meth:`KVBudget.get`.
        resident: the prefix on the device; None while it is evicted.
        home: the copy that stays: a prefix on the CPU, or a file.
        version: the version of the file that the other fields describe.
    """

    nbytes: int
    shapes: tuple[LayerShape, ...]
    priority: int
    pinned: bool
    last_used: int
    resident: PrefixKV | None
    home: PrefixKV | Path
    version: FileVersion | None = None


@methods_refuse_unknown_arguments
class KVBudget:
    """Prefixes by name, of which at most a given number of bytes lie on a device.

    Prefixes that do not fit are evicted, those of the lowest priority first. Among equals it is the
    one that was not used for the longest time. An evicted prefix comes back when it is asked for.
    Every prefix has a home, which is a file or the CPU's memory. :meth:`put` writes it there before
    it returns, so eviction only drops a copy. With a folder, a process that is killed at any moment
    loses nothing that it had put, and a new KVBudget on the folder finds it. Only a loss of power
    can lose what was put in the seconds before. If it leaves a part of a file, that file is refused
    by name. Threads may share a budget.

    Room is made before a prefix comes to the device, so the budget's own copies never take more
    than max_bytes there, not even for a moment. A prefix that a caller still holds is not freed by
    its eviction. Only the copies of the budget itself are counted.

    Several processes may use one folder. Each has its own limit and its own evictions. When a
    process asks for a prefix, it sees what others have put, replaced and removed: if the file has
    changed, the prefix is loaded again. If two processes put the same name, the last one wins, with
    its priority and pin. A process reads the priorities and pins of others only when it opens the
    folder or first meets a prefix. Processes write one after the other (but not on Windows).

    Args:
        max_bytes: the bytes that all prefixes on the device may take together.
        folder: the home of the prefixes, created if it does not exist; None for the CPU's memory.
        device: the device.

    Attributes:
        evictions: all evictions so far, the oldest first.

    Raises:
        NotADirectoryError: the folder is a file.
        OSError: the folder cannot be created.
        TypeError: max_bytes is no whole number, folder no path, or device no device.
        ValueError: max_bytes is below 0; there is no such device; the device is "cpu" and there is
            no folder; a file in the folder is not whole; or two belong to the same prefix.
        KVBudgetError: the pinned prefixes in the folder do not fit.
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
        self._count = 0
        self._lock = threading.RLock()
        if self.folder is not None:
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(f"folder: got {folder}, which is a file, takes a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(self.folder)

    @property
    def resident_bytes(self) -> int:
        """The bytes on the device now; never more than max_bytes."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values() if entry.resident)

    @property
    def resident_names(self) -> tuple[str, ...]:
        """The names of the prefixes on the device now."""
        with self._lock:
            return tuple(name for name, entry in self._entries.items() if entry.resident)

    def put(
        self, name: str, kv: PrefixKV, *, priority: int = 0, pinned: bool = False
    ) -> list[Eviction]:
        """Adds a prefix, or replaces the one of this name.

        Args:
            name: any text that is not empty, and not too long for the name of a file; see
                :func:`fastprefix.kv.prefix_folder.file_name`.
            kv: a finished prefix, which does not require gradients.
            priority: prefixes of the lowest priority are evicted first.
            pinned: whether the prefix is never evicted.

        Returns:
            What was evicted to make room. A prefix that is larger than the budget, and not pinned,
            is only in its home.

        Raises:
            TypeError: name is not text, kv no PrefixKV, priority no whole number, or pinned neither
                True nor False.
            ValueError: the name is empty or too long; kv requires gradients; or, with a folder, kv
                has a number that is not finite, or the folder's index is damaged.
            KVBudgetError: the prefix is pinned, and does not fit beside the other pinned ones.
            OSError: the file cannot be written; a former file of this name stays.
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
                self._refresh(name)
                before = self._entries.get(name)
                home = before.home if before is not None else self.folder / file_name(name)
                assert isinstance(home, Path)
                with changed_index(self.folder, name, IndexEntry(priority, pinned)):
                    kv.save(home, durable=False)
                    version = file_version(home)
            self._entries.pop(name, None)
            entry = _Entry(
                kv.nbytes, kv.shapes, priority, pinned, self._next_count(), None, home, version
            )
            self._entries[name] = entry
            evicted = self._make_room(entry)
            if evicted is None:
                return []
            # a copy: the caller may change its own tensors later
            entry.resident = _copied(kv, self.device)
            return evicted

    def get(self, name: str) -> PrefixKV:
        """Returns a prefix on the device. If it was evicted, it is loaded again.

        If pinned prefixes leave too little room for it, only the caller gets it, and the budget
        keeps no copy on the device.

        Raises:
            KeyError: there is no prefix of this name.
            ValueError: its file is not whole any more.
        """
        with self._lock:
            entry = self._entry(name)
            entry.last_used = self._next_count()
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
        """Returns the shapes of a prefix's layers, and loads nothing.

        Raises:
            KeyError: there is no prefix of this name.
        """
        with self._lock:
            return self._entry(name).shapes

    def remove(self, name: str) -> None:
        """Removes a prefix and its file.

        Raises:
            KeyError: there is no prefix of this name.
        """
        with self._lock:
            entry = self._entry(name)
            if isinstance(entry.home, Path):
                with changed_index(entry.home.parent, name, None):
                    entry.home.unlink(missing_ok=True)
            del self._entries[name]

    def evict(self, name: str) -> Eviction | None:
        """Evicts a prefix now. Returns None if it was not on the device.

        Raises:
            KeyError: there is no prefix of this name.
            ValueError: the prefix is pinned.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.pinned:
                raise ValueError(
                    f"name: got {name!r}, which is pinned, takes one that is not; unpin it first"
                )
            return self._evict(name, entry) if entry.resident else None

    def set_priority(self, name: str, priority: int) -> None:
        """Sets a prefix's priority: those of the lowest priority are evicted first.

        Raises:
            KeyError: there is no prefix of this name.
        """
        with self._lock:
            entry = self._entry(name)
            entry.priority = priority
            self._save_to_index(name, entry)

    def pin(self, name: str) -> None:
        """Brings a prefix to the device and keeps it there.

        Raises:
            KeyError: there is no prefix of this name.
            KVBudgetError: the prefix does not fit beside the other pinned ones.
        """
        with self._lock:
            entry = self._entry(name)
            others = self._pinned_bytes(entry)
            if others + entry.nbytes > self.max_bytes:
                raise KVBudgetError(
                    f"name: {name!r} takes {entry.nbytes:,} bytes, others that are pinned "
                    f"{others:,} of {self.max_bytes:,}"
                )
            self.get(name)
            entry.pinned = True
            self._save_to_index(name, entry)

    def unpin(self, name: str) -> None:
        """Allows a prefix to be evicted again.

        Raises:
            KeyError: there is no prefix of this name.
        """
        with self._lock:
            entry = self._entry(name)
            entry.pinned = False
            self._save_to_index(name, entry)

    def __contains__(self, name: object) -> bool:
        """Whether there is a prefix of this name."""
        with self._lock:
            return isinstance(name, str) and self._refresh(name)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names of all prefixes, on the device or not."""
        with self._lock:
            return iter(self._names())

    def __len__(self) -> int:
        """The number of prefixes, on the device or not."""
        with self._lock:
            return len(self._names())

    def _entry(self, name: str) -> _Entry:
        if not self._refresh(name):
            raise KeyError(f"no prefix {name!r}; there are {sorted(self._names())}")
        return self._entries[name]

    def _names(self) -> tuple[str, ...]:
        """The names of all prefixes. Those that this budget met first come first."""
        if self.folder is None:
            return tuple(self._entries)
        existing = names_in(self.folder)
        for name in [name for name in self._entries if name not in existing]:
            del self._entries[name]
        return (*self._entries, *(name for name in existing if name not in self._entries))

    def _refresh(self, name: str) -> bool:
        """Updates an entry if its file has changed. Returns whether there is such a prefix."""
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
            version = file_version(home)
            if entry is not None and entry.version == version:
                return True
            nbytes, shapes = measure(home)
        except FileNotFoundError:
            self._entries.pop(name, None)
            return False
        if entry is None:
            priority, pinned = read_index(self.folder).get(name, _DEFAULTS)
            entry = _Entry(nbytes, shapes, priority, False, self._next_count(), None, home, version)
            self._entries[name] = entry
        else:
            entry.nbytes, entry.shapes, entry.version = nbytes, shapes, version
            entry.resident = None
            pinned = entry.pinned
        entry.pinned = pinned and self._pinned_bytes(entry) + nbytes <= self.max_bytes
        return True

    def _pinned_bytes(self, without: _Entry) -> int:
        """The bytes of all pinned prefixes but one."""
        return sum(e.nbytes for e in self._entries.values() if e.pinned and e is not without)

    def _next_count(self) -> int:
        self._count += 1
        return self._count

    def _make_room(self, entry: _Entry) -> list[Eviction] | None:
        """Evicts what stands in the way of an entry. If it cannot fit, nothing is evicted.

        Returns:
            The evictions; None if the entry cannot fit.
        """
        free = self.max_bytes - self.resident_bytes
        chosen = []
        candidates = [
            (other.priority, other.last_used, name)
            for name, other in self._entries.items()
            if other.resident and not other.pinned and other is not entry
        ]
        for _, _, name in sorted(candidates):
            if free >= entry.nbytes:
                break
            chosen.append(name)
            free += self._entries[name].nbytes
        if free < entry.nbytes:
            return None
        return [self._evict(name, self._entries[name]) for name in chosen]

    def _evict(self, name: str, entry: _Entry) -> Eviction:
        entry.resident = None
        target = str(entry.home) if isinstance(entry.home, Path) else "cpu"
        eviction = Eviction(name, entry.nbytes, entry.priority, target)
        self.evictions.append(eviction)
        return eviction

    def _open(self, folder: Path) -> None:
        """Finds the prefixes that a folder holds. Files that were not written whole are removed."""
        index = read_index(folder)
        remove_leftovers(folder)
        for name, file in names_in(folder).items():
            try:
                version = file_version(file)
                nbytes, shapes = measure(file)
            except FileNotFoundError:  # another process removed it just now
                continue
            priority, is_pinned = index.get(name, _DEFAULTS)
            count = self._next_count()
            entry = _Entry(nbytes, shapes, priority, is_pinned, count, None, file, version)
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

    def _save_to_index(self, name: str, entry: _Entry) -> None:
        """Writes an entry's priority and pin into the folder's index."""
        if self.folder is not None:
            with changed_index(self.folder, name, IndexEntry(entry.priority, entry.pinned)):
                pass


def _copied(kv: PrefixKV, device: torch.device) -> PrefixKV:
    """A copy in memory of its own, on a device."""
    return kv.map(lambda x: x.detach().to(device, copy=True, memory_format=torch.contiguous_format))
