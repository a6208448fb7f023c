"""On what a run was made: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

_LIBRARIES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """Machine, versions and the library's commit (None outside a repository)."""
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {"fastprefix": _version("fastprefix")} | {n: _version(n) for n in _LIBRARIES},
        "commit": commit(),
    }


def processes() -> PartialState:
    """The processes that train together, which ``torchrun`` or ``accelerate launch`` started."""
    # without a GPU it must be told, or each process believes that it is alone
    return PartialState(cpu=not torch.accelerator.is_available())


def machine() -> str:
    """The processor or the GPU, in a few words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores, {_processor()}"


def commit() -> str | None:
    """The commit of the repository that this file is in, "+" behind it if files have changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
