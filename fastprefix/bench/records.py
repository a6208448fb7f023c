"""Records of measured cases: a line of JSON each, added to a file that is never overwritten."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastprefix.bench.case import Case

FILE = "bench.jsonl"  # in the folder of results
COMMIT = "FASTPREFIX_COMMIT"  # environment: names the commit of a copy without a repository
PACKAGES = ("fastprefix", "torch", "triton", "transformers", "peft", "flashinfer-python",
            "flash-attn")  # fmt: skip


def about(device: torch.device) -> dict[str, Any]:
    """What figures depend on beside the case: machine, versions, commit and date."""
    found: dict[str, Any] = {
        "device": device.type,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        **source(Path(__file__).parents[2]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return found


def machine(device: torch.device) -> str:
    """The name of the GPU, or of the processor with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


def source(root: Path) -> dict[str, Any]:
    """The commit, and whether files differ from it.

    Args:
        root: the folder of the repository. An installed package has none around it: then, or
            without Git, the environment's COMMIT names the commit.
    """
    git = ("git", "-c", f"safe.directory={root}", "-C", str(root))
    # a virtual environment may lie in somebody else's repository
    top = output(*git, "rev-parse", "--show-toplevel")
    ours = top is not None and Path(top).resolve() == root.resolve()
    commit = output(*git, "rev-parse", "HEAD") if ours else None
    changed = output(*git, "status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "commit": commit or os.environ.get(COMMIT),
        "changed": None if changed is None else bool(changed),
    }


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def output(*command: str) -> str | None:
    """What a command prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def record(case: Case, measured: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """One line: the case, its figures without the single samples, and :func:`about`."""
    providers = {
        name: {key: value for key, value in found.items() if key != "samples"}
        for name, found in measured["providers"].items()
    }
    return {
        "suite": case.suite, "case": case.label, "fields": case.fields(),
        "figures": case.figures, "bound": case.bound, "tokens": case.tokens(),
        "providers": providers, "left_out": measured["left_out"], "about": facts,
    }  # fmt: skip


def append(file: Path, line: dict[str, Any]) -> None:
    """Adds a record to a file, which is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as records:
        records.write(json.dumps(line) + "\n")


def newest(file: Path) -> list[dict[str, Any]]:
    """The last record of every case on the machine that wrote last, in the order of the file.

    Raises:
        ValueError: there are no records.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (json.loads(text) for text in lines):
        found.pop((line["suite"], line["case"]), None)
        found[line["suite"], line["case"]] = line
    if not found:
        raise ValueError(f"{file}: got no records; `fastprefix bench` writes them")
    last = list(found.values())[-1]["about"]["machine"]
    return [line for line in found.values() if line["about"]["machine"] == last]
