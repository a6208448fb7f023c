"""``fastprefix tune``."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

from fastprefix.cli.console import console, progress


def run_tuning(
    head_sizes: list[int],
    dtypes: list[str],
    sizes: dict[str, int],
    device: torch.device | None = None,
) -> None:
    """Tunes every pass for each head size and dtype, then how decode cuts its keys.

    What is found is kept and printed.

    Args:
        head_sizes: D, each from 1 to 256.
        dtypes: "bf16", "fp16" or "fp32".
        sizes: the other fields of :class:`fastprefix.kernels.tuning.tune.TimedProblem`.
        device: the device to tune for; the current GPU if None.

    Raises:
        ValueError: there is no GPU, the kernels do not support a head size or dtype, or two
            requests share their tiles, so that only the last one would be kept.
    """
    if device is None:
        if not torch.cuda.is_available():
            raise ValueError("device: no GPU here, and tiles are tuned on the one they are for")
        device = torch.device("cuda", torch.cuda.current_device())
    from fastprefix.kernels import launch, tilings
    from fastprefix.kernels.offline.cases import DTYPES
    from fastprefix.kernels.tuning import splitting, store, tune

    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, takes one of {', '.join(DTYPES)}")
    for size in head_sizes:
        if not 1 <= size <= tilings.MAX_HEAD_SIZE:
            raise ValueError(f"head_dim: got {size}, takes 1 to {tilings.MAX_HEAD_SIZE}")
    _no_tiles_shared(head_sizes, dtypes, device)
    name_of_device = launch.device_name(device)
    names = (*tilings.PASSES, "splits")
    jobs = [(D, dtype, name) for D in head_sizes for dtype in dtypes for name in names]
    table = Table(title=name_of_device)
    table.add_column("pass, head size, bits", no_wrap=True)
    for title in ("before", "ms", "now", "ms", "tried"):
        table.add_column(title)
    with progress("tuning", len(jobs)) as show:
        for done, (D, dtype, name) in enumerate(jobs, start=1):
            timed = tune.TimedProblem(D, DTYPES[dtype], **sizes)
            found: tune.Choice[Any]
            if name == "splits":
                launch.forget_devices()  # they are timed with the tile that was found for decode
                found = splitting.tune_splitting(timed, device)
            else:
                found = tune.tune(timed, name, device)
            # Each is saved at once, so that an interruption does not lose it.
            file = store.save(name_of_device, found.name, found.best)
            table.add_row(
                found.name.replace("decode", name),
                str(tuple(found.table)), f"{found.table_ms:.3f}",
                str(tuple(found.best)), f"{found.best_ms:.3f}", str(found.tried),
            )  # fmt: skip
            show(done, f"{name} {D} {dtype}")
    launch.forget_devices()
    console.print(table)
    console.print(
        "tiles: rows, keys, warps, stages; splits: programs per multiprocessor, fewest keys, bytes "
        f"that a launch costs; kept in {file.parent}",
        soft_wrap=True,
    )


def _no_tiles_shared(head_sizes: list[int], dtypes: list[str], device: torch.device) -> None:
    """Refuses head sizes and dtypes that share a row of the tile table."""
    from fastprefix.kernels import launch, tilings
    from fastprefix.kernels.offline.cases import DTYPES

    family = launch.target_of(device).family
    first: dict[str, str] = {}
    for size in head_sizes:
        for dtype in dtypes:
            name, _ = tilings.row("forward", family, size, DTYPES[dtype])
            now = f"{size} {dtype}"
            if name in first:
                raise ValueError(
                    f"head_dim, dtype: {first[name]} and {now} share their tiles; name one"
                )
            first[name] = now
