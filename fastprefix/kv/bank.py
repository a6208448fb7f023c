"""Named prefixes for one model."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from fastprefix.arguments import (
    as_path,
    check_names,
    check_type,
    methods_refuse_unknown_arguments,
)
from fastprefix.kv.arithmetic import Method, concatenate, interpolate
from fastprefix.kv.budget import KVBudget
from fastprefix.kv.prefix import PrefixKV
from fastprefix.kv.prefix_folder import check_name, file_name, names_in


@methods_refuse_unknown_arguments
class PrefixBank(MutableMapping[str, PrefixKV]):
    """Prefixes by name, all for one model: a dict that checks, combines and saves them.

    Threads may share a bank. To switch tasks, call ``use_prefix(model, bank["name"])``.

    Args:
        budget: keeps the prefixes within its limit. Without a budget all stay where they are.

    Example:
        >>> bank = PrefixBank(KVBudget(2**30, folder="prefixes"))
        >>> bank.add("formal", kv, priority=1)
        >>> with use_prefix(model, bank.interpolate({"formal": 0.3, "casual": 0.7})):
        ...     model.generate(**batch)
    """

    def __init__(self, budget: KVBudget | None = None) -> None:
        if budget is not None:
            check_type("budget", budget, KVBudget, "a KVBudget, or None")
        self.budget = budget
        self._held: dict[str, PrefixKV] = {}
        self._lock = threading.RLock()

    def add(self, name: str, kv: PrefixKV, *, priority: int = 0, pinned: bool = False) -> None:
        """Adds a prefix, or replaces the one of this name.

        Args:
            name: any text that is not empty, and not too long for the name of a file; see
                :func:`fastprefix.kv.prefix_folder.file_name`.
            kv: a prefix with the layer shapes of the others. If the bank has a budget, kv must not
                require gradients.
            priority: see :meth:`KVBudget.put`.
            pinned: see :meth:`KVBudget.put`.

        Raises:
            TypeError: kv is not a PrefixKV, or name not text.
            ValueError: the name is empty or too long; the bank has other layer shapes; or priority
                or pinned is given and the bank has no budget.
            KVBudgetError: see :meth:`KVBudget.put`.
        """
        if not isinstance(kv, PrefixKV):
            raise TypeError(f"kv: got {type(kv).__name__}, takes a PrefixKV")
        check_name(name)
        with self._lock:
            self._check(name, kv)
            if self.budget is not None:
                self.budget.put(name, kv, priority=priority, pinned=pinned)
            elif priority or pinned:
                raise ValueError(
                    f"priority, pinned: got {priority} and {pinned}, takes 0 and False in a bank "
                    "that has no budget, which would heed them"
                )
            else:
                self._held[name] = kv

    def select(self, rows: Iterable[str | None]) -> Mapping[str, PrefixKV]:
        """Returns the prefixes that the rows of a batch name, each once.

        If no row names a prefix, the result has any one of them.

        Raises:
            TypeError: rows are no names.
            ValueError: the bank has no prefix of a name.
        """
        check_names("rows", rows, "a name, or None, for each row")
        names = [name for name in dict.fromkeys(rows) if name is not None]
        for name in names:
            if name not in self:
                raise ValueError(f"rows: got {name!r}, takes one of {sorted(self)}, or None")
        return {name: self[name] for name in names or [*self][:1]}

    def interpolate(self, weights: Mapping[str, float], method: Method = "linear") -> PrefixKV:
        """Returns a weighted mean of prefixes; see :func:`fastprefix.kv.interpolate`.

        Raises:
            KeyError: the bank has no prefix of a name.
            TypeError: weights are not numbers by name.
            ValueError: see :func:`fastprefix.kv.interpolate`.
        """
        check_type("weights", weights, Mapping, "a dict of numbers by name")
        return interpolate([self[name] for name in weights], list(weights.values()), method)

    def concatenate(self, names: Sequence[str]) -> PrefixKV:
        """Joins prefixes end to end, for example one that tasks share and a task's own.

        Raises:
            KeyError: the bank has no prefix of a name.
            TypeError: names are no names.
            ValueError: see :func:`fastprefix.kv.concatenate`.
        """
        check_names("names", names, "a list of names")
        return concatenate([self[name] for name in names])

    def save(self, folder: str | Path) -> None:
        """Writes one file for each prefix. :meth:`load` and a KVBudget read them.

        Files of other prefixes stay in the folder.
        """
        folder = as_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self:
            self[name].save(folder / file_name(name))

    @classmethod
    def load(cls, folder: str | Path) -> PrefixBank:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such folder, or no prefix in it.
            ValueError: a file is not whole, or its prefix has other layer shapes than the others.
        """
        files = names_in(as_path("folder", folder))
        if not files:
            raise FileNotFoundError(
                f"folder: got {folder}, which holds no prefixes, takes one of PrefixBank.save()"
            )
        bank = cls()
        for name, file in files.items():
            bank.add(name, PrefixKV.load(file))
        return bank

    def __getitem__(self, name: str) -> PrefixKV:
        """Returns the prefix of this name; the KeyError lists all names."""
        with self._lock:
            if self.budget is not None:
                kv = self.budget.get(name)
                self._check(name, kv)
                return kv
            if name not in self._held:
                raise KeyError(f"no prefix {name!r}; there are {sorted(self._held)}")
            return self._held[name]

    def __setitem__(self, name: str, kv: PrefixKV) -> None:
        """Adds a prefix as :meth:`add` does, with its defaults."""
        self.add(name, kv)

    def __delitem__(self, name: str) -> None:
        """Removes a prefix."""
        with self._lock:
            if self.budget is not None:
                self.budget.remove(name)
            elif name not in self._held:
                raise KeyError(f"no prefix {name!r}; there are {sorted(self._held)}")
            else:
                del self._held[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a prefix of this name. Nothing is loaded."""
        with self._lock:
            return name in (self._held if self.budget is None else self.budget)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names that the bank has now."""
        with self._lock:
            return iter(tuple(self._held if self.budget is None else self.budget))

    def __len__(self) -> int:
        """The number of prefixes."""
        with self._lock:
            return len(self._held if self.budget is None else self.budget)

    def _check(self, name: str, kv: PrefixKV) -> None:
        for other in self:
            if other == name:
                continue
            try:
                shapes = (
                    self._held[other].shapes if self.budget is None else self.budget.shapes(other)
                )
                break
            except (KeyError, ValueError):  # removed just now, or damaged: its own use will raise
                continue
        else:
            return
        if kv.shapes != shapes:
            raise ValueError(
                f"kv: {name!r} has layers {list(kv.shapes)}, takes {list(shapes)} as {other!r}"
            )
