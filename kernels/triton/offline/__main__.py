"""Compile the kernels for GPUs that are not there, and report what the machine code costs.

    TRITON_INTERPRET=0 python -m fastprefix.kernels.offline --target sm_90 --head-size 64 128
    TRITON_INTERPRET=0 python -m fastprefix.kernels.offline --full --jobs 2

A second run takes seconds, because Triton keeps compiled kernels on disk and the reports lie beside
them. Nothing in a report is a timing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import Progress

from .cases import (
    DTYPES,
    FEATURES,
    TARGETS,
    Case,
    Job,
    full_jobs,
    main_jobs,
    parse_target,
    table_jobs,
)
from .report import Failure, Report, label, reports, violations

# Fields of a case, each an option of its own.
SIZES = ("batch", "kv_heads", "group", "query_length", "length", "prefix")


def run(jobs: list[Job], processes: int = 1, save: Path | None = None) -> list[Report | Failure]:
    """The reports of the jobs in their order, with a progress bar on standard error."""
    results: dict[int, list[Report | Failure]] = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling", total=len(jobs))
        if processes == 1:
            for i, job in enumerate(jobs):
                results[i] = reports(job, save)
                progress.advance(bar)
        else:
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                pending = {pool.submit(reports, job, save): i for i, job in enumerate(jobs)}
                for done in as_completed(pending):
                    results[pending[done]] = done.result()
                    progress.advance(bar)
    return [r for i in range(len(jobs)) for r in results[i]]


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each kernel, or JSON. Returns the exit status: 1 if there are violations."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("Triton's interpreter is on; set TRITON_INTERPRET=0")
    if chosen.save:
        chosen.save.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        jobs = _jobs(chosen)
        results = run(jobs, chosen.jobs, chosen.save)
    except ValueError as error:  # a case that no launcher accepts
        parser.error(str(error))
    if chosen.json:
        print(json.dumps([dataclasses.asdict(r) for r in results if isinstance(r, Report)]))
    elif not chosen.full:
        print("\n".join(_line(r) for r in results if isinstance(r, Report)))
    wrong = [f"{label(r)}: {text}" for r in results for text in violations(r)]
    spilling = sum(isinstance(r, Report) and r.spill_bytes > 0 for r in results)
    summary = (
        f"Triton {triton.__version__}: {len(results)} kernels for {len(jobs)} cases, "
        f"{spilling} spill, {len(wrong)} violations, {time.monotonic() - started:.0f} s"
    )
    print("\n".join([*wrong, summary]), file=sys.stdout if chosen.full else sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", nargs="+", default=TARGETS, help=", ".join(TARGETS))
    parser.add_argument("--head-size", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--value-head-size", type=int)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--features", nargs="*", default=[], help=", ".join(FEATURES))
    parser.add_argument("--bidirectional", action="store_true", help="not causal")
    for name in SIZES:
        default = Case.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--table", action="store_true",
        help="every row of the tile table that the targets can pick, and every feature",
    )  # fmt: skip
    parser.add_argument(
        "--main", action="store_true", help="of that, bf16 at head sizes 64 and 128, no features"
    )
    parser.add_argument(
        "--full", action="store_true",
        help="every target, head size, dtype and feature; prints violations and a summary only",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, help="folder for the binaries")
    return parser


def _jobs(chosen: argparse.Namespace) -> list[Job]:
    """The jobs that the options ask for.

    Raises:
        ValueError: an unknown target.
    """
    targets = [parse_target(target) for target in chosen.target]
    if chosen.full:
        return full_jobs()
    if chosen.table or chosen.main:
        jobs_of = main_jobs if chosen.main else table_jobs
        return [job for target in targets for job in jobs_of(target)]
    sizes = {name: getattr(chosen, name) for name in ("value_head_size", *SIZES)}
    features, causal = tuple(chosen.features), not chosen.bidirectional
    cases = (
        Case(target, head_size, dtype, features, is_causal=causal, **sizes)
        for target, head_size, dtype in itertools.product(targets, chosen.head_size, chosen.dtype)
    )
    return [Job(case, chosen.kernel) for case in cases]


def _line(r: Report) -> str:
    """A report on one line."""
    return (
        f"{label(r):70}{r.tile.rows:4}x{r.tile.keys}/{r.tile.warps}w/{r.tile.stages}s"
        f"  {r.registers:3} registers  {r.spill_bytes:4} B spilled"
        f"  {r.shared_bytes:6} B shared  {r.tensor_core_instructions:4} matrix"
        f"  i/kF {', '.join(f'{loop.per_kiloflop:.2f}' for loop in r.loops)}"
    )


if __name__ == "__main__":
    sys.exit(main())
