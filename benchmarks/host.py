"""Host time of a call: what Python and Triton do before a kernel starts.

    TRITON_INTERPRET=0 python benchmarks/host.py --output benchmarks/results

On a GPU this time is paid once for each layer, and small steps wait for it. No GPU is needed: see
:mod:`simulated_gpu` for what is real and what is missing. For comparison the same run times
``F.scaled_dot_product_attention`` on tensors so small that little more than its dispatch is left.

Figures are medians of the thread's CPU time. A round makes every call once, in random order, and
times each alone: as in a model, a call comes after other work and finds little of itself in the
processor's caches. (In a loop over one call all are faster, and SDPA, which runs little code, by
more.) ``grows`` is a decoding step whose cache is one token longer in every call, so that no call
has a plan.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import simulated_gpu
from fastprefix import prefix_attention

Call = Callable[[], Any]
Row = tuple[Call, bool]  # and whether it is called with gradients


def zeros(*shape: int, grad: bool = False) -> Tensor:
    """Operands in bfloat16. Nothing reads their values."""
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=grad)


def operands(B: int, Lq: int, Lk: int, P: int, *, grad: bool = False) -> tuple[Tensor, ...]:
    """Query, key, value and the prefix of a layer with Hq 8, Hkv 2 and D 16.

    So small that copies, which PyTorch makes for real, take no time.
    """
    text = (zeros(B, 2, Lk, 16, grad=grad) for _ in "kv")
    prefix = (zeros(2, P, 16, grad=grad) for _ in "kv")
    return (zeros(B, 8, Lq, 16, grad=grad), *text, *prefix)


def backward_of(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Call:
    """The backward of one forward, again and again."""
    out = forward()
    grad_out = torch.zeros_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def growing() -> Call:
    """A decoding step whose cache is longer by one token in every call, as `torch.cat` makes it."""
    query, _, _, *prefix = operands(8, 1, 1, 4096)
    longest = 4096  # so many that no plan is left when a length comes again
    keys, pads = zeros(8 * 2 * longest * 16), torch.ones(8 * longest, dtype=torch.bool)
    caches = [
        (keys[: 8 * 2 * Lk * 16].view(8, 2, Lk, 16), pads[: 8 * Lk].view(8, Lk))
        for Lk in range(256, longest)
    ]
    steps = itertools.cycle(caches)

    def step() -> Tensor:
        key, mask = next(steps)
        return prefix_attention(
            query, key, key, *prefix, is_causal=True, key_padding_mask=mask, backend="triton"
        )

    return step


def calls() -> dict[str, Row]:
    """What is timed, by the name of its row."""
    step = operands(8, 1, 256, 4096)
    mask = torch.ones(8, 256, dtype=torch.bool)
    train = operands(2, 16, 16, 64, grad=True)
    tiny = tuple(zeros(1, 2, 16, 16, grad=True) for _ in "qkv")

    def decode() -> Tensor:
        return prefix_attention(*step, is_causal=True, key_padding_mask=mask, backend="triton")

    def forward() -> Tensor:
        return prefix_attention(*train, is_causal=True, backend="triton")

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(*tiny, is_causal=True)

    return {
        "SDPA, decode": (sdpa, False),
        "SDPA, forward": (sdpa, True),
        "SDPA, backward": (backward_of(sdpa, tiny), True),
        "fastprefix, decode": (decode, False),
        "fastprefix, decode, grows": (growing(), False),
        "fastprefix, forward": (forward, True),
        "fastprefix, backward": (backward_of(forward, train), True),
    }


def timed(row: Row) -> float:
    """Microseconds of the thread's CPU time in one call."""
    call, gradients = row
    with torch.set_grad_enabled(gradients):
        start = time.thread_time_ns()
        result = call()
        end = time.thread_time_ns()
    del result  # after the clock has stopped
    return (end - start) / 1e3


def measure(rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call in each round."""
    rows = calls()
    for _ in range(3):
        for row in rows.values():
            timed(row)
    found: dict[str, list[float]] = {name: [] for name in rows}
    order, chosen = list(rows), random.Random(0)
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
        chosen.shuffle(order)
        for name in order:
            found[name].append(timed(rows[name]))
    return found


def table_of(median: dict[str, float]) -> Table:
    """Times, and how many times SDPA's dispatch they are."""
    table = Table("call", "us", "times SDPA", box=box.MARKDOWN)
    for name, us in median.items():
        side, work = name.split(", ")[:2]
        ratio = "" if side == "SDPA" else f"{us / median[f'SDPA, {work}']:.1f}"
        table.add_row(name, f"{us:.0f}", ratio)
    return table


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed, as CUDA's allocator does; where it can be told."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(threshold, 1 << 30)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="folder for host.json")
    parser.add_argument(
        "--no-compile", action="store_true", help="quicker the first time, with the same figures"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    simulated_gpu.install(compiled=not given.no_compile)
    times = measure(given.rounds)
    median = {name: statistics.median(each) for name, each in times.items()}
    Console(width=100).print(table_of(median))
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        record = {
            "microseconds": {name: round(us, 1) for name, us in median.items()},
            "rounds": given.rounds,
            "simulated": True,
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        (given.output / "host.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
