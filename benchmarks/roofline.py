"""When can an un-expanded prefix win? A roofline MODEL: nothing in here was measured.

    python benchmarks/roofline.py --output benchmarks/results

Counts the bytes and the FLOP of one attention layer, ours and with the prefix's keys and values
expanded per row, and divides them by peak bandwidth and peak bf16 rate of some devices. A launch
costs a constant. Real kernels reach neither peak; the model says where the crossover cannot lie,
and what there is to gain, not what a run takes.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NOTE = "MODEL: peak rates and counted bytes; nothing was run, nothing is a timing."

# Assumed, not measured: what a further kernel in the stream costs, launch and drain, in us.
LAUNCH_US = 3.0
BYTES = 2  # of a bf16 number
PARTIAL_BYTES = 4  # partial results are kept in fp32
MATRIX_ROWS = 16  # a matrix instruction works on this many rows, filled or not


@dataclass(frozen=True)
class Device:
    """Peak rates from the vendor's data sheet, dense, fp32 accumulation."""

    name: str
    arch: str
    gigabytes_per_s: float
    bf16_teraflops: float
    multiprocessors: int
    source: str


DEVICES = (
    Device("A100 80GB SXM", "sm_80", 2039, 312, 108, "NVIDIA A100 data sheet"),
    Device("RTX 3090", "sm_86", 936, 71, 82, "NVIDIA GA102 whitepaper"),
    Device("H100 SXM", "sm_90", 3350, 989, 132, "NVIDIA H100 data sheet"),
    Device("H200 SXM", "sm_90", 4800, 989, 132, "NVIDIA H200 data sheet"),
    Device("B200", "sm_100", 8000, 2250, 148, "NVIDIA HGX B200 data sheet"),
    Device("RTX 5090", "sm_120", 1792, 209, 170, "NVIDIA RTX Blackwell whitepaper"),
    Device("MI300X", "gfx942", 5300, 1307, 304, "AMD MI300X data sheet"),
    Device("RX 7900 XTX", "gfx1100", 960, 122, 96, "AMD RX 7900 XTX product page"),
)


@dataclass(frozen=True)
class Shape:
    """One attention layer: a decoding step, or forward and backward of a training step."""

    work: str  # decode or train
    B: int
    Hq: int
    Hkv: int
    P: int
    L: int  # text: in the cache for decode, in the step for train
    D: int = 128


SHAPES = (
    Shape("decode", 1, 32, 8, 1024, 256),
    Shape("decode", 8, 32, 8, 1024, 256),
    Shape("decode", 32, 32, 8, 64, 256),
    Shape("decode", 32, 32, 8, 1024, 256),
    Shape("decode", 128, 32, 8, 8192, 256),
    Shape("train", 8, 32, 8, 32, 512),
    Shape("train", 8, 32, 8, 1024, 512),
    Shape("train", 32, 32, 8, 4096, 256),
)
BATCHES = tuple(2**i for i in range(10))
PREFIXES = tuple(2**i for i in range(4, 15))


@dataclass(frozen=True)
class Phase:
    """Kernels that run one after the other, with what they move and compute together."""

    name: str
    bytes: int
    flops: int = 0
    launches: int = 1


def expanded(s: Shape, device: Device) -> list[Phase]:
    """Attention over keys and values that hold the prefix once per row.

    Decoding finds them in the cache, and is counted as one launch: the best case. Training
    concatenates them first, and sums the rows' prefix gradients afterwards.
    """
    row, total = 2 * s.Hkv * s.D * BYTES, s.P + s.L
    copies = s.B * total * row
    if s.work == "decode":
        queries = 2 * s.B * s.Hq * s.D * BYTES  # query and output
        rows = s.Hkv * s.B * _padded(s.Hq // s.Hkv)
        return [Phase("attention", copies + queries, 4 * rows * total * s.D)]
    pairs, queries = _pairs(s), s.B * s.Hq * s.L * s.D * BYTES
    return [
        Phase("concatenate", (s.P + s.B * s.L) * row + copies, launches=2),
        Phase("forward", copies + 2 * queries, 4 * pairs * s.D),
        Phase("backward", 2 * copies + 5 * queries, 14 * pairs * s.D, launches=3),
        Phase("sum prefix gradients", (s.B + 1) * s.P * row, launches=2),
    ]


def ours(s: Shape, device: Device) -> list[Phase]:
    """One copy of the prefix; partial results where the prefix is a phase of its own."""
    row = 2 * s.Hkv * s.D * BYTES
    once = (s.P + s.B * s.L) * row
    if s.work == "decode":
        group = s.Hq // s.Hkv
        tiles = math.ceil(s.B * group / 128)
        parts = min(
            math.ceil(2 * device.multiprocessors / (s.Hkv * tiles)), max(1, math.ceil(s.P / 64))
        )
        # the parts of the prefix and the sequence write them, the merge reads them
        partials = (parts + 1) * s.B * s.Hq * (s.D + 1) * PARTIAL_BYTES
        query = s.B * s.Hq * s.D * BYTES
        rows = s.Hkv * (_padded(s.B * group) * s.P + s.B * _padded(group) * s.L)
        return [
            Phase("attention", once + 2 * query + partials, 4 * rows * s.D),
            Phase("merge", partials + query),
        ]
    pairs, queries = _pairs(s), s.B * s.Hq * s.L * s.D * BYTES
    return [
        Phase("forward", once + 2 * queries, 4 * pairs * s.D),
        Phase("backward", 2 * once + 5 * queries, 14 * pairs * s.D, launches=5),
    ]


def _padded(rows: int) -> int:
    return math.ceil(rows / MATRIX_ROWS) * MATRIX_ROWS


def _pairs(s: Shape) -> int:
    """Scores of a causal training step; two products each forward, seven backward."""
    return s.B * s.Hq * s.L * (s.P + s.L // 2)


def microseconds(phases: list[Phase], device: Device) -> float:
    """The roofline's time: of each phase the slower of memory and arithmetic, and the launches."""
    total = 0.0
    for phase in phases:
        memory = phase.bytes / (device.gigabytes_per_s * 1e3)
        arithmetic = phase.flops / (device.bf16_teraflops * 1e6)
        total += max(memory, arithmetic) + phase.launches * LAUNCH_US
    return total


def compare(s: Shape, device: Device) -> dict[str, Any]:
    """Both sides of one shape on one device."""
    found: dict[str, Any] = {"shape": asdict(s), "device": device.name}
    for name, side in (("ours", ours), ("expanded", expanded)):
        phases = side(s, device)
        found[name] = {
            "bytes": sum(phase.bytes for phase in phases),
            "flops": sum(phase.flops for phase in phases),
            "launches": sum(phase.launches for phase in phases),
            "us": microseconds(phases, device),
        }
    return found


def ratio(row: dict[str, Any]) -> float:
    """How many times faster un-expanded is."""
    return row["expanded"]["us"] / row["ours"]["us"]


def crossover(P: int, device: Device) -> int | None:
    """The smallest batch of BATCHES from which on un-expanded decoding is faster, or None."""
    wins = [ratio(compare(Shape("decode", B, 32, 8, P, 256), device)) > 1 for B in BATCHES]
    for i, B in enumerate(BATCHES):
        if all(wins[i:]):
            return B
    return None


def plot(crossovers: dict[str, list[int | None]], file: Path) -> None:
    """The crossover batch by prefix length, one line a device."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    for name, batches in crossovers.items():
        points = [(P, B) for P, B in zip(PREFIXES, batches, strict=True) if B is not None]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(PREFIXES, [str(P) for P in PREFIXES])
    axes.set_yticks(BATCHES, [str(B) for B in BATCHES])
    axes.set_xlabel("prefix length")
    axes.set_ylabel("batch")
    axes.set_title(
        "MODEL, not measured: from this batch on one copy of the prefix wins\n"
        f"decode, Hq 32, Hkv 8, D 128, text 256, bf16, {LAUNCH_US:g} us for the merge's launch",
        fontsize=10,
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=140)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Prints the model, writes JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON and plot")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    rows = [compare(s, device) for s in SHAPES for device in DEVICES]
    crossovers = {d.name: [crossover(P, d) for P in PREFIXES] for d in DEVICES}

    table = Table(title=f"{NOTE} Expanded / ours, us a layer and ratio")
    table.add_column("shape")
    for device in DEVICES:
        table.add_column(device.name, justify="right")
    for i, s in enumerate(SHAPES):
        cells = [
            f"{r['expanded']['us']:.0f} / {r['ours']['us']:.0f}\n{ratio(r):.2f}x"
            for r in rows[i * len(DEVICES) : (i + 1) * len(DEVICES)]
        ]
        table.add_row(f"{s.work} B{s.B} P{s.P}\ntext {s.L}", *cells)
    Console(width=120).print(table)

    about = {
        "note": NOTE, "launch_us": LAUNCH_US, "devices": [asdict(d) for d in DEVICES],
        "crossover": "decode, Hq 32, Hkv 8, D 128, text 256: smallest batch that wins, by prefix",
        "prefixes": PREFIXES,
    }  # fmt: skip
    (output / "roofline.json").write_text(
        json.dumps({"about": about, "rows": rows, "crossover": crossovers}, indent=1) + "\n"
    )
    plot(crossovers, output / "roofline.png")


if __name__ == "__main__":
    main()
