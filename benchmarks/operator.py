"""The operator against SDPA on expanded keys and values, on this machine.

    python benchmarks/operator.py --output benchmarks/results

The peer's keys and values are expanded and concatenated before the clock starts where decoding is
timed (a cache holds them that way), and inside it where training is timed (they must be made in
every step). Both sides run in turn, forwards and backwards; medians. A shape is timed only after
both gave the same result.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fastprefix import prefix_attention


@dataclass(frozen=True)
class Shape:
    """One row: what is computed, and on what."""

    work: str  # decode, or train: forward and backward of a causal sequence
    B: int
    Hq: int
    Hkv: int
    P: int
    L: int  # text: in the cache for decode, in the step for train
    D: int = 64
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"Hq{self.Hq} Hkv{self.Hkv}"
        return f"{self.work} B{self.B} {heads} P{self.P} text {self.L} {self.dtype}"


# The last decode rows are small on purpose: there an un-expanded prefix saves little.
SHAPES = (
    Shape("decode", 32, 32, 8, 1024, 64),
    Shape("decode", 32, 32, 8, 4096, 64),
    Shape("decode", 16, 9, 3, 512, 64),
    Shape("decode", 16, 9, 3, 2048, 64),
    Shape("decode", 32, 12, 12, 512, 64, dtype="float32"),
    Shape("decode", 8, 12, 12, 20, 64, dtype="float32"),
    Shape("decode", 1, 9, 3, 512, 64),
    Shape("train", 8, 9, 3, 512, 128),
    Shape("train", 8, 12, 12, 32, 128, dtype="float32"),
)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def pair(shape: Shape) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """The work as fastprefix does it and as SDPA does it on expanded keys and values."""
    s, dtype = shape, getattr(torch, shape.dtype)
    torch.manual_seed(0)
    Lq = 1 if s.work == "decode" else s.L
    grad = s.work == "train"
    query = torch.randn(s.B, s.Hq, Lq, s.D).to(dtype).requires_grad_(grad)
    key, value = (torch.randn(s.B, s.Hkv, s.L, s.D).to(dtype).requires_grad_(grad) for _ in "kv")
    prefix = [torch.randn(s.Hkv, s.P, s.D).to(dtype).requires_grad_(grad) for _ in "kv"]
    inputs = [query, key, value, *prefix]
    grad_out = torch.randn(s.B, s.Hq, Lq, s.D).to(dtype)

    def expand(part: Tensor, text: Tensor) -> Tensor:
        return torch.cat([part[None].expand(s.B, -1, -1, -1), text], dim=2)

    if s.work == "decode":
        full = expand(prefix[0], key), expand(prefix[1], value)

        def ours() -> list[Tensor]:
            return [prefix_attention(query, key, value, *prefix)]

        def peer() -> list[Tensor]:
            # one query a head: the group's heads become rows, as transformers does it
            rows = query.reshape(s.B, s.Hkv, s.Hq // s.Hkv, s.D)
            return [F.scaled_dot_product_attention(rows, *full).reshape(query.shape)]

    else:
        seen = torch.ones(s.L, s.P + s.L, dtype=torch.bool).tril(s.P)

        def ours() -> list[Tensor]:
            out = prefix_attention(query, key, value, *prefix, is_causal=True)
            return [out, *torch.autograd.grad(out, inputs, grad_out)]

        def peer() -> list[Tensor]:
            g = s.Hq // s.Hkv
            k = expand(prefix[0], key).repeat_interleave(g, dim=1)
            v = expand(prefix[1], value).repeat_interleave(g, dim=1)
            out = F.scaled_dot_product_attention(query, k, v, attn_mask=seen)
            return [out, *torch.autograd.grad(out, inputs, grad_out)]

    return ours, peer


def check(ours: Callable[[], list[Tensor]], peer: Callable[[], list[Tensor]]) -> None:
    """Raises if the two sides do not compute the same."""
    for got, want in zip(ours(), peer(), strict=True):
        error = (got.float() - want.float()).norm() / want.float().norm()
        if not error < (1e-4 if got.dtype is torch.float32 else 2e-2):
            raise RuntimeError(f"the two sides differ: relative error {error:.2e}")


def medians(sides: tuple[Callable[[], object], ...], seconds: float = 0.6) -> list[float]:
    """Median milliseconds of each side, in turn, for about this long a side."""
    start = time.perf_counter()
    for side in sides:
        side()
    rounds = max(5, int(seconds * len(sides) / (time.perf_counter() - start + 1e-9)))
    times: list[list[float]] = [[] for _ in sides]
    for i in range(min(rounds, 200)):
        order = range(len(sides)) if i % 2 == 0 else reversed(range(len(sides)))
        for j in order:
            begin = time.perf_counter()
            sides[j]()
            times[j].append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(side) for side in times]


def measure(shape: Shape) -> dict[str, object]:
    """One row of results."""
    sides = pair(shape)
    check(*sides)
    ours, peer = medians(sides)
    return {**asdict(shape), "label": shape.label, "fastprefix_ms": ours, "expanded_ms": peer}


def plot(rows: list[dict], file: Path) -> None:
    """Decode time by batch, both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    batches = [row["B"] for row in rows]
    axes.plot(batches, [row["expanded_ms"] for row in rows], "o-", label="SDPA, expanded prefix")
    axes.plot(batches, [row["fastprefix_ms"] for row in rows], "o-", label="fastprefix, one copy")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("ms a call")
    first = rows[0]
    axes.set_title(
        f"One decoding step's attention: Hq {first['Hq']}, Hkv {first['Hkv']}, D {first['D']}, "
        f"prefix {first['P']}, {first['dtype']}",
        fontsize=10,
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=140)


def main() -> None:
    """Measures, prints, writes JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON and plot")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    rows = [measure(shape) for shape in track(SHAPES, "shapes")]
    sweep = [measure(Shape("decode", B, 32, 8, 1024, 64)) for B in track(BATCHES, "batches")]
    table = Table(title=f"torch {torch.__version__}, {torch.get_num_threads()} threads, median ms")
    for column in ("", "fastprefix", "expanded", "speed-up"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        ours, peer = row["fastprefix_ms"], row["expanded_ms"]
        table.add_row(str(row["label"]), f"{ours:.3f}", f"{peer:.3f}", f"{peer / ours:.2f}x")
    Console(width=100).print(table)
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    (output / "operator.json").write_text(
        json.dumps({"about": about, "shapes": rows, "by_batch": sweep}, indent=1) + "\n"
    )
    plot(sweep, output / "decode_by_batch.png")


if __name__ == "__main__":
    main()
