"""The cache of launch plans: bounded, the least recently used ones forgotten."""

from __future__ import annotations

from typing import Any

# A generation adds a plan with every token by which its cache grows; all layers of a step share it.
SIZE = 512


class PlanCache:
    """Values by key: the last `SIZE` that were used, and at most `SIZE` older ones. Thread-safe.

    It has two dictionaries. When the recent one is full it becomes the older one, and what the
    older one held is forgotten. So a look-up moves nothing that another thread may be reading, and
    no lock is needed.
    """

    def __init__(self) -> None:
        """An empty cache."""
        self._recent: dict[Any, Any] = {}
        self._older: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """What was kept under a key, or None."""
        value = self._recent.get(key)
        if value is None:
            value = self._older.get(key)
            if value is not None:
                self.keep(key, value)
        return value

    def keep(self, key: Any, value: Any) -> None:
        """Remembers a value, which is not None."""
        if len(self._recent) >= SIZE:
            self._older, self._recent = self._recent, {}
        self._recent[key] = value

    def clear(self) -> None:
        """Forgets everything."""
        self._recent, self._older = {}, {}

    def __len__(self) -> int:
        """How many keys are remembered."""
        return len(self._recent.keys() | self._older.keys())


PLANS = PlanCache()
