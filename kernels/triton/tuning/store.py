"""Tiles that were tuned on a device, kept in Triton's cache on disk (TRITON_CACHE_DIR).

Their key holds the device's name, Triton's version and the source of this package. After an update
of Triton or of this package, the tiles of :mod:`~fastprefix.kernels.tilings` are used until the
device is tuned again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from ..target import Tile

_FILE = "fastprefix-tiles.json"


def _cache(device: str) -> Any:
    digest = hashlib.sha256(f"{device}\n{triton.__version__}\n".encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return get_cache_manager(digest.hexdigest())


def load(device: str) -> dict[str, Tile]:
    """The tuned tiles of a device, by :func:`~fastprefix.kernels.tilings.row_name`.

    Args:
        device: the name that its driver gives it.

    Returns:
        An empty dict if the device was never tuned.

    Raises:
        ValueError: the file holds no tiles, or other tiles than were saved.
    """
    try:
        file = _cache(device).get_file(_FILE)
    except OSError:  # there is no such folder and none can be made, so nothing was kept
        file = None
    if file is None:
        return {}
    try:
        found = json.loads(Path(file).read_text())
        tiles = {str(name): Tile(*numbers) for name, numbers in found["tiles"].items()}
        sound = all(_sound(tile) for tile in tiles.values()) and _digest(tiles) == found["sha256"]
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"{file}: no tiles (rows, keys, warps and stages of each) in it, or damaged ones; "
            "delete it and tune again"
        )
    return tiles


def _sound(tile: Tile) -> bool:
    powers = all(isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in tile[:3])
    return powers and min(tile.rows, tile.keys) >= 16 and isinstance(tile.stages, int)


def _digest(tiles: Mapping[str, Tile]) -> str:
    return hashlib.sha256(json.dumps(tiles, sort_keys=True).encode()).hexdigest()


def save(device: str, tiles: Mapping[str, Tile]) -> Path:
    """Keeps tiles for a device, beside those kept before under other names.

    Args:
        device: the name that its driver gives it.
        tiles: the tiles by :func:`~fastprefix.kernels.tilings.row_name`.

    Returns:
        The file that holds them.

    Raises:
        ValueError: the file that is there is damaged.
    """
    kept = load(device) | dict(tiles)
    text = json.dumps({"tiles": kept, "sha256": _digest(kept)}, indent=1)
    return Path(_cache(device).put(text, _FILE, binary=False))
