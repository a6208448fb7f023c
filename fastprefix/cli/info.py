"""``fastprefix info``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.table import Table

from fastprefix import __version__
from fastprefix.attention.selection import AUTO, BACKENDS, choose, refusal
from fastprefix.cli.console import console

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def show_info() -> None:
    """Prints versions, the device, and what each backend can do on it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table(title=f"fastprefix {__version__}", show_header=False)
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "transformers", "peft", "safetensors"):
        table.add_row(package, _version(package))
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    table.add_row("device", f"{device} ({name}, {torch.get_num_threads()} threads)")
    try:
        chosen, reason = choose("auto", device, torch.float32, frozenset(), 64)
        table.add_row("backend", f"[bold]{chosen}[/]: {reason}")
    except RuntimeError as error:
        table.add_row("backend", f"[red]none[/]: {error}")
    console.print(table)

    backends = Table(title=f"Backends on {device}")
    for column in ("backend", "runs here", "dtypes", "features", "head sizes"):
        backends.add_column(column)
    for name, backend in BACKENDS.items():
        why_not = refusal(name, device, torch.float32, frozenset(), 64)
        dtypes = ", ".join(
            str(d).removeprefix("torch.") for d in (torch.float64, *_DTYPES) if d in backend.dtypes
        )
        limit = backend.max_head_size
        backends.add_row(
            name + (" (auto)" if AUTO.get(device) == name else ""),
            "yes" if why_not is None else f"no: {why_not}",
            dtypes,
            ", ".join(sorted(backend.features)) or "-",
            "any" if limit is None else f"up to {limit}",
        )
    console.print(backends)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
