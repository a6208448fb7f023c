"""A simulated device that compiles what is launched, by the operator and by whole models."""

from __future__ import annotations

import re
from typing import Any

import simulated_gpu
from fastprefix.attention import selection

from .kernels import build_launchers, remember_keys


def capability_of(arch: str) -> tuple[int, int]:
    """The compute capability of an architecture, (9, 0) of sm_90.

    Raises:
        ValueError: not an architecture of NVIDIA.
    """
    found = re.fullmatch(r"sm_(\d+)(\d)", arch)
    if found is None:
        raise ValueError(f"arch: got {arch!r}, takes an NVIDIA architecture such as sm_90")
    return int(found[1]), int(found[2])


def simulate(arch: str) -> Any:
    """Takes the CPU for a GPU of this architecture, for the rest of the process.

    Kernels are compiled into Triton's cache folder, with what :func:`device.kernels.settle` needs.
    """
    driver = simulated_gpu.install(capability=capability_of(arch))
    selection.AUTO["cpu"] = ("triton",)
    remember_keys()
    build_launchers(driver)
    return driver
