"""What was tuned on a device, kept in Triton's cache on disk (TRITON_CACHE_DIR).

These are tiles and splittings, a file for each kind. Their key holds the device's name, Triton's
version and the source of this package. After an update of Triton or of this package, the tiles of
:mod:`~fastprefix.kernels.tilings` are used until the device is tuned again, and the default
splitting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import triton
from triton.runtime.cache import get_cache_manager

from ..target import Splitting, Tile

Tuned = TypeVar("Tuned", bound=Tile | Splitting)
KINDS = {
    Tile: ("tiles", "rows, keys, warps and stages of each"),
    Splitting: ("splittings", "waves, shortest and launch_bytes of each"),
}


def _file(kind: type) -> str:
    return f"fastprefix-{KINDS[kind][0]}.json"


def _cache(device: str) -> Any:
    digest = hashlib.sha256(f"{device}\n{triton.__version__}\n".encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return get_cache_manager(digest.hexdigest())


def load(device: str, kind: type[Tuned]) -> dict[str, Tuned]:
    """What was tuned on a device, by :func:`~fastprefix.kernels.tilings.row_name`.

    Args:
        device: the name that its driver gives it.
        kind: Tile or Splitting.

    Returns:
        An empty dict if the device was never tuned.

    Raises:
        ValueError: the file holds none, or others than were saved.
    """
    title, fields = KINDS[kind]
    try:
        file = _cache(device).get_file(_file(kind))
    except OSError:  # there is no such folder and none can be made, so nothing was kept
        file = None
    if file is None:
        return {}
    try:
        text = json.loads(Path(file).read_text())
        found = {str(name): kind(*numbers) for name, numbers in text[title].items()}
        sound = all(map(_sound, found.values())) and _digest(found) == text["sha256"]
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"{file}: no {title} ({fields}) in it, or damaged ones; delete it and tune again"
        )
    return found


def _sound(tuned: Tile | Splitting) -> bool:
    powers = all(isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in tuned[:3])
    if isinstance(tuned, Splitting):
        return powers
    return powers and min(tuned.rows, tuned.keys) >= 16 and isinstance(tuned.stages, int)


def _digest(tuned: Mapping[str, Tuned]) -> str:
    return hashlib.sha256(json.dumps(tuned, sort_keys=True).encode()).hexdigest()


def save(device: str, name: str, tuned: Tuned) -> Path:
    """Keeps a tile or a splitting for a device, beside those kept before under other names.

    Args:
        device: the name that its driver gives it.
        name: its :func:`~fastprefix.kernels.tilings.row_name`.
        tuned: what was tuned.

    Returns:
        The file that holds it.

    Raises:
        ValueError: the file that is there is damaged.
    """
    kind = type(tuned)
    kept = load(device, kind) | {name: tuned}
    text = json.dumps({KINDS[kind][0]: kept, "sha256": _digest(kept)}, indent=1)
    return Path(_cache(device).put(text, _file(kind), binary=False))
