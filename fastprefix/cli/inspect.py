"""``fastprefix inspect``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rich.table import Table
from rich.text import Text

from fastprefix.cli.console import console, working

STATIC = (
    "STATIC: read off machine code that was compiled here and modelled from the grid. "
    "Nothing was run, nothing is a timing."
)


def run_inspection(
    arch: str,
    head_dim: int,
    dtype: str,
    kernel: str,
    features: list[str],
    bidirectional: bool,
    problem: dict[str, int | None],
    as_json: bool,
) -> None:
    """Compiles kernels in a process without Triton's interpreter, and prints tables or JSON.

    Args:
        arch: the GPU's architecture, for example "sm_90" or "gfx942".
        head_dim: D.
        dtype: "bf16", "fp16" or "fp32".
        kernel: only kernels whose name contains this.
        features: names out of `FEATURES` in :mod:`fastprefix.kernels.offline.cases`.
        bidirectional: whether the sequence part is not causal.
        problem: sizes of the problem by their names in the command; None for the default.
        as_json: print JSON instead of tables.

    Raises:
        ValueError: the kernels do not support the architecture, dtype, feature or size.
        RuntimeError: a kernel does not compile.
    """
    options = ["--target", arch, "--head-size", str(head_dim), "--dtype", dtype]
    options += ["--kernel", kernel, "--features", *features]
    options += ["--bidirectional"] if bidirectional else []
    for name, value in problem.items():
        options += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    with working(f"compiling for {arch}"):
        done = subprocess.run(
            [sys.executable, "-m", "fastprefix.kernels.offline", "--json", *options],
            env=os.environ | {"TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1) or not done.stdout.strip():
        complaint = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"
        message = complaint.rpartition("error: ")[2]
        raise ValueError(message) if done.returncode == 2 else RuntimeError(message)
    found = json.loads(done.stdout)
    complaints = done.stderr.strip().splitlines()[:-1] if done.returncode == 1 else []
    if as_json:
        print(json.dumps({"note": STATIC, "violations": complaints, "kernels": found}, indent=1))
        return
    if not found and not complaints:
        raise ValueError(f"kernel: no kernel's name contains {kernel!r}")
    if found:
        console.print(_kernels(found, arch, head_dim, dtype))
        console.print(_occupancy(found))
        console.print(_loops(found))
        console.print(_bytes(found))
    for complaint in complaints:
        console.print(Text(complaint, style="bold red"))
    console.print(Text(STATIC, style="bold"))


def _short(kernel: str) -> str:
    """The name of a kernel without what all of them share."""
    return kernel.removeprefix("prefix_attn_").removesuffix("_kernel")


def _columns(table: Table, *names: str) -> Table:
    """Adds columns: words to the left, numbers to the right."""
    for name in names:
        words = name in ("kernel", "loop")
        table.add_column(name, justify="left" if words else "right", no_wrap=words)
    return table


def _kernels(found: list[dict[str, Any]], arch: str, head_dim: int, dtype: str) -> Table:
    """The tile, registers, spills and shared memory of each kernel."""
    table = Table(title=f"{arch}, head size {head_dim}, {dtype}: machine code per kernel")
    _columns(table, "kernel", "tile", "warps", "stages", "regs", "spilled", "shared", "matrix")
    for r in found:
        rows, keys, warps, stages = r["tile"]
        table.add_row(
            _short(r["kernel"]),
            f"{rows}x{keys}",
            str(warps),
            str(stages),
            str(r["registers"]),
            f"{r['spill_bytes']} B, {r['spill_instructions']}" if r["spill_bytes"] else "-",
            f"{r['shared_bytes'] / 1024:.1f} KiB",
            f"{r['tensor_core_instructions']} of {r['instructions']}",
        )
    table.caption = (
        "spilled: bytes of stack per thread, and instructions that access it; "
        "matrix: tensor-core instructions, of all instructions"
    )
    return table


def _occupancy(found: list[dict[str, Any]]) -> Table:
    """How many programs of each kernel a multiprocessor holds, and why not more."""
    unit = found[0]["occupancy"]["unit"]
    table = Table(title=f"Occupancy: programs resident on a {unit}")
    names = list(dict.fromkeys(name for r in found for name in r["occupancy"]["by_limit"]))
    _columns(table, "kernel", "resident", "of its warps", *(f"by {name}" for name in names))
    for r in found:
        occupancy = r["occupancy"]
        limits = occupancy["by_limit"]
        cells = [
            Text(str(limits.get(name, "-")), "bold" * (limits.get(name) == occupancy["blocks"]))
            for name in names
        ]
        table.add_row(
            _short(r["kernel"]), str(occupancy["blocks"]), f"{occupancy['warps']:.0%}", *cells
        )
    table.caption = "bold: the resource that allows no more"
    return table


def _loops(found: list[dict[str, Any]]) -> Table:
    """What an iteration of each hot loop costs."""
    table = Table(title="Hot loops: per iteration of the machine code")
    spilling = any(loop["spill_instructions"] for r in found for loop in r["loops"])
    _columns(table, "kernel", "loop", "instr", "cond", *["spills"] * spilling)
    table.add_column("matrix", no_wrap=True)
    _columns(table, "tiles", "i/kF")
    for r in found:
        for loop in r["loops"]:
            tiles = loop["iterations"]
            table.add_row(
                _short(r["kernel"]),
                loop["name"],
                str(loop["instructions"]),
                str(loop["conditional"]),
                *[str(loop["spill_instructions"])] * spilling,
                "\n".join(f"{count} {name}" for name, count in loop["shapes"].items()),
                "?" if tiles is None else f"{tiles:g}",
                f"{loop['per_kiloflop']:.2f}",
            )
    table.caption = (
        "instr: instructions that every iteration issues; cond: conditional ones; tiles: tiles of "
        "the source that an iteration computes; i/kF: warp-instructions per 1000 matrix FLOP, "
        "lower is better"
    )
    return table


def _bytes(found: list[dict[str, Any]]) -> Table:
    """The bytes that each launch requests, against the least possible."""
    case = found[0]["case"]
    sizes = ", ".join(
        f"{name.replace('_', ' ')} {case[name]}"
        for name in ("batch", "kv_heads", "group", "query_length", "length", "prefix")
    )
    table = Table(title=f"Bytes asked of the memory system (a model; {sizes})")
    _columns(table, "kernel", "programs", "requested", "least", "ratio")
    table.add_column("most repeated operands")
    for r in found:
        model = r["traffic"]
        if model is None:
            table.add_row(_short(r["kernel"]), str(r["programs"]), "no model", "", "", "")
            continue
        repeats = sorted(
            ((a / b, name) for name, (a, b) in model["operands"].items() if b and a > b),
            reverse=True,
        )
        table.add_row(
            _short(r["kernel"]),
            str(r["programs"]),
            f"{model['requested'] / 1e6:.1f} MB",
            f"{model['least'] / 1e6:.1f} MB",
            f"{model['requested'] / model['least']:.1f}",
            ", ".join(f"{name} {times:.0f}x" for times, name in repeats[:4]),
        )
    table.caption = "least: each operand once; the L2 cache serves a part of the rest"
    return table
