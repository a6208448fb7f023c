"""Families of GPUs, the target of a launch, and tiles: where kernels run, and in what pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {
    "ampere": 166_912,
    "ampere-small": 101_376,
    "hopper": 232_448,
    "blackwell": 232_448,
    "cdna": 65_536,
    "rdna": 65_536,
    "interpreter": 1 << 31,
}


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, and pipeline stages of its loops."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Target:
    """What the choice of a tile needs to know about a device.

    Attributes:
        family: a key of SHARED_MEMORY and of the tile table.
        multiprocessors: how many there are.
        tuned: tiles that :mod:`.tuning` found to be faster on this device than those of the tile
            table, by :func:`~fastprefix.kernels.tilings.row_name`.
        overlaps: whether a launch can begin while the one before it ends (on NVIDIA "programmatic
            dependent launch").
    """

    family: str
    multiprocessors: int
    # no part of the hash, because a dict has none
    tuned: Mapping[str, Tile] = field(default_factory=dict, hash=False)
    overlaps: bool = False


def family_of_capability(major: int, minor: int) -> str:
    """The family of an NVIDIA device."""
    if major == 9:
        return "hopper"
    if major == 10:
        return "blackwell"
    # sm_80 and sm_87 have 164 KiB of shared memory; Turing, sm_86, sm_89 and sm_12x 100 or less.
    return "ampere" if (major, minor) in ((8, 0), (8, 7)) else "ampere-small"


def target_of_capability(
    major: int, minor: int, multiprocessors: int, tuned: Mapping[str, Tile] | None = None
) -> Target:
    """The target for an NVIDIA device."""
    family = family_of_capability(major, minor)
    return Target(family, multiprocessors, tuned or {}, overlaps=major >= 9)


def family_of_amd(arch: str) -> str:
    """The family of an AMD device. gfx9 has MFMA and waves of 64; the others have WMMA and 32."""
    return "cdna" if arch.startswith("gfx9") else "rdna"
