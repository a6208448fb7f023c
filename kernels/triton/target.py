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


class Splitting(NamedTuple):
    """How decode cuts its keys, and what it counts the second launch for.

    Attributes:
        waves: how many programs per multiprocessor each phase has at most, if splits can give it
            more. Two, as in `tilings.splits`.
        shortest: the fewest keys that a split may have. A program of s keys and r rows reads
            s * (D + Dv) * 2 bytes and writes r * (4 * Dv + 4), which the merge reads again. With
            64 keys and 64 rows that is twice what it reads: pure loss where the device is full
            anyway, but not where most multiprocessors would have nothing to do.
        launch_bytes: the cost of one more launch, in bytes that a multiprocessor could read
            meanwhile. A launch takes about 3 us, and on an A100 or H100 one multiprocessor's share
            of the memory bandwidth is about 20 bytes per nanosecond.
    """

    waves: int = 2
    shortest: int = 64
    launch_bytes: int = 64 * 1024


@dataclass(frozen=True)
class Target:
    """What the choice of a tile needs to know about a device.

    Attributes:
        family: a key of SHARED_MEMORY and of the tile table.
        multiprocessors: how many there are.
        tuned: tiles that :mod:`.tuning` found to be faster on this device than those of the tile
            table, by :func:`~fastprefix.kernels.tilings.row_name`.
        splittings: as `tuned`, by the name of a row of decode.
        overlaps: whether a launch can begin while the one before it ends (on NVIDIA "programmatic
            dependent launch").
    """

    family: str
    multiprocessors: int
    # no part of the hash, because a dict has none
    tuned: Mapping[str, Tile] = field(default_factory=dict, hash=False)
    splittings: Mapping[str, Splitting] = field(default_factory=dict, hash=False)
    overlaps: bool = False


def family_of_capability(major: int, minor: int) -> str:
    """The family of an NVIDIA device."""
    if major == 9:
        return "hopper"
    if major == 10:
        return "blackwell"
    # sm_80 and sm_87 have 164 KiB of shared memory; Turing, sm_86, sm_89 and sm_12x 100 or less.
    return "ampere" if (major, minor) in ((8, 0), (8, 7)) else "ampere-small"


def target_of_capability(major: int, minor: int, multiprocessors: int) -> Target:
    """The target for an NVIDIA device on which nothing was tuned."""
    return Target(family_of_capability(major, minor), multiprocessors, overlaps=major >= 9)


def family_of_amd(arch: str) -> str:
    """The family of an AMD device. gfx9 has MFMA and waves of 64; the others have WMMA and 32."""
    return "cdna" if arch.startswith("gfx9") else "rdna"
