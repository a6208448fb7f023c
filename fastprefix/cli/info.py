"""``fastprefix info``."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.table import Table

from fastprefix import __version__
from fastprefix.attention.selection import (
    AUTO,
    BACKENDS,
    FEATURES,
    Backend,
    choose_backend,
    columns,
    refusal,
)
from fastprefix.cli.console import console

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def show_info(backends: bool = False) -> None:
    """Prints versions, the device and the backend that runs; or the table of all backends.

    Args:
        backends: print what each backend can do, feature by feature, and nothing else.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backends:
        console.print(_features())
        return
    table = Table(title=f"fastprefix {__version__}", show_header=False)
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "transformers", "peft", "safetensors"):
        table.add_row(package, _version(package))
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    table.add_row("device", f"{device} ({name}, {torch.get_num_threads()} threads)")
    try:
        chosen, reason = choose_backend("auto", device, torch.float32, frozenset(), 64)
        table.add_row("backend", f"[bold]{chosen}[/]: {reason}")
    except RuntimeError as error:
        table.add_row("backend", f"[red]none[/]: {error}")
    console.print(table)

    runs = Table(title=f"Backends on {device}", caption="features: fastprefix info --backends")
    for column in ("backend", "runs here", "dtypes", "head sizes"):
        runs.add_column(column)
    for name in BACKENDS:
        why_not = refusal(name, device, torch.float32, frozenset(), 64)
        order = AUTO.get(device, ()).index(name) + 1 if name in AUTO.get(device, ()) else None
        runs.add_row(
            name + (f" (auto {order})" if order else ""),
            "yes" if why_not is None else f"no: {why_not}",
            _dtypes(BACKENDS[name].at(device)),
            _head_sizes(BACKENDS[name].at(device)),
        )
    console.print(runs)


def _features() -> Table:
    """The feature table of :mod:`fastprefix.attention.selection`."""
    table = Table(title="Backends", caption=_auto())
    table.add_column("", no_wrap=True)
    backends = columns()
    for name in backends:
        table.add_column(name)
    table.add_row("devices", *map(_devices, backends.values()))
    table.add_row("dtypes", *map(_dtypes, backends.values()))
    table.add_row("head sizes", *map(_head_sizes, backends.values()), end_section=True)
    for feature in FEATURES:
        cells = ("yes" if feature in backend.features else "-" for backend in backends.values())
        table.add_row(feature.replace("[", r"\["), *cells)
    return table


def _auto() -> str:
    tried = (f"{device}: {', then '.join(names)}" for device, names in AUTO.items())
    return "auto takes the first that can do all that a call needs: " + "; ".join(tried)


def _devices(backend: Backend) -> str:
    return "any" if backend.devices is None else ", ".join(sorted(backend.devices))


def _dtypes(backend: Backend) -> str:
    known = (dtype for dtype in (torch.float64, *_DTYPES) if dtype in backend.dtypes)
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in known)


def _head_sizes(backend: Backend) -> str:
    limit = backend.max_head_size
    return "any" if limit is None else f"up to {limit}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
