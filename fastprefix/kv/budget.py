"""A limit on the memory that prefixes take, with the rest of them on disk or on the CPU."""

from __future__ import annotations

import json
import shutil
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
from fastprefix.kv.prefix import PARTIAL, LayerShape, PrefixKV, measure, written_apart

_SUFFIX = ".safetensors"
_INDEX = "index.json"


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
    """

    nbytes: int
    shapes: tuple[LayerShape, ...]
    priority: int
    pinned: bool
    used: int
    resident: PrefixKV | None
    home: PrefixKV | Path


@methods_refuse_unknown_arguments
class KVBudget:
    """Named prefixes, of which as many bytes as allowed lie on a device.

    Whatever does not fit is evicted, lowest priority first and among equals the one that was not
    used for longest, and comes back when it is asked for. A prefix is in its home (a file, or the
    CPU's memory) before :meth:`put` returns, so that eviction only drops a copy: with a folder, a
    process that is killed at any moment loses nothing that it had put, and a new KVBudget on the
    folder finds it. One process at a time may use a folder; its threads may share a budget.

    A prefix that a caller still holds is not freed by its eviction; only copies that the budget
    itself keeps are counted.

    Args:
        max_bytes: that resident prefixes may take together.
        folder: home of the prefixes, made if need be; None for the CPU's memory.
        device: where resident prefixes lie.

    Attributes:
        evictions: all of them so far, oldest first.

    Raises:
        NotADirectoryError: the folder is a file.
        TypeError: max_bytes is no whole number, folder no path, or device no device.
        ValueError: max_bytes is below 0, no such device, no folder for device "cpu", or a file in
            the folder is not whole.
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
                all finite.
            KVBudgetError: pinned, and it does not fit beside the other pinned ones.
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
            if self.folder is None:
                home = kv.to("cpu").detach()
            else:
                home = self.folder / file_name(name)
                kv.save(home)
            self._entries.pop(name, None)
            entry = _Entry(kv.nbytes, kv.shapes, priority, pinned, self._tick(), None, home)
            self._entries[name] = entry
            self._write_index()
            # a copy: what a caller does to his must not change what was put
            return self._admit(name, entry, kv.to(self.device).detach())

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
                home = entry.home
                if isinstance(home, Path):
                    kv = PrefixKV.load(home, self.device)
                else:
                    kv = home.to(self.device)
                self._admit(name, entry, kv)
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
                entry.home.unlink(missing_ok=True)
            del self._entries[name]
            self._write_index()

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
            self._entry(name).priority = priority
            self._write_index()

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
            self._write_index()

    def unpin(self, name: str) -> None:
        """Lets a prefix be evicted again.

        Raises:
            KeyError: no prefix of this name.
        """
        with self._lock:
            self._entry(name).pinned = False
            self._write_index()

    def __contains__(self, name: object) -> bool:
        """Whether a prefix of this name was put."""
        with self._lock:
            return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """All names, wherever the prefixes are."""
        with self._lock:
            return iter(tuple(self._entries))

    def __len__(self) -> int:
        """Number of prefixes, wherever they are."""
        with self._lock:
            return len(self._entries)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise KeyError(f"no prefix {name!r}; there are {sorted(self._entries)}")
        return self._entries[name]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _admit(self, name: str, entry: _Entry, kv: PrefixKV) -> list[Eviction]:
        """Makes room and keeps a prefix; leaves everything where no room can be made."""
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
            return []
        evicted = [self._evict(other, self._entries[other]) for other in leaving]
        entry.resident = kv
        return evicted

    def _evict(self, name: str, entry: _Entry) -> Eviction:
        entry.resident = None
        target = str(entry.home) if isinstance(entry.home, Path) else "cpu"
        eviction = Eviction(name, entry.nbytes, entry.priority, target)
        self.evictions.append(eviction)
        return eviction

    def _open(self, folder: Path) -> None:
        """Finds what an earlier budget put here; files it was still writing are not among it."""
        index = folder / _INDEX
        about = _read_index(index) if index.is_file() else {}
        for leftover in folder.glob("*".join(PARTIAL)):
            shutil.rmtree(leftover)
        for name, file in names_in(folder).items():
            nbytes, shapes = measure(file)
            priority, stays = about.get(name, (0, False))
            entry = _Entry(nbytes, shapes, priority, stays, self._tick(), None, file)
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

    def _write_index(self) -> None:
        if self.folder is None:
            return
        about = {n: {"priority": e.priority, "pinned": e.pinned} for n, e in self._entries.items()}
        text = json.dumps(about, indent=2, sort_keys=True) + "\n"
        with written_apart(self.folder / _INDEX) as partial:
            partial.write_text(text, encoding="utf-8")


def _read_index(file: Path) -> dict[str, tuple[int, bool]]:
    """Priority, and whether it is pinned, by name."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {n: (int(e["priority"]), bool(e["pinned"])) for n, e in found.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"folder: {file} does not hold priorities and pins ({error!r}); without this file all "
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
    """The prefixes of a folder: files by name."""
    files = sorted(folder.glob(f"*{_SUFFIX}"))
    return {unquote(file.name[: -len(_SUFFIX)]): file for file in files}


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
        shapes: of the model's layers, e.g. :func:`fastprefix.hf.layer_shapes`; a model on the
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
