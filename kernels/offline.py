"""Compile the kernels for GPUs that are not there, and report what the machine code costs.

    TRITON_INTERPRET=0 python -m fastprefix.kernels.offline --target sm_90 --head-size 64 128
    TRITON_INTERPRET=0 python -m fastprefix.kernels.offline --full --jobs 2

The launchers run as they are, on tensors without storage, and their launches are collected instead
of enqueued: what is compiled here is what runs there. Nothing in the report is a timing.

Triton keeps compiled kernels on disk, keyed by their source, specialisation, target and its own
version (TRITON_CACHE_DIR). What is read off their machine code lies beside them, keyed by the
kernel's hash and by `inspect_code.py`: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

from . import inspect_code, inspect_device, inspect_traffic, launch
from .backward import prefix_attention_backward
from .forward import prefix_attention_forward
from .problem import Problem

TARGETS = (
    "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100"
)  # fmt: skip
HEAD_SIZES = (16, 32, 64, 72, 80, 96, 112, 128, 192, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
    **{dtype: f"*{name}" for name, dtype in DTYPES.items()},
}  # fmt: skip
# Multiprocessors assumed for every target; they decide into how many parts reductions are cut.
MULTIPROCESSORS = 108

# Loops of a kernel in the order of its source, each with the features that bring it (none: it is
# always there). Where the compiler leaves another number of loops they are numbered.
SWEEPS = (
    ("prefix, window's edge", ("prefix_in_window",)),
    ("prefix", ()),
    ("prefix tail", ()),
    ("sequence, window's edge", ("sliding_window", "prefix_in_window")),
    ("sequence", ()),
    ("sequence, masked", ()),
)
LOOPS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "prefix_attn_fwd_kernel": SWEEPS,
    "prefix_attn_bwd_dq_kernel": SWEEPS,
    "prefix_attn_bwd_dkv_kernel": (("rows, masked", ()), ("rows", ())),
    "prefix_attn_bwd_dprefix_kernel": (("rows", ()),),
}
# Products per tile of scores, as (over the key's head size, over the value's).
PRODUCTS = {
    "prefix_attn_fwd_kernel": (1, 1),
    "prefix_attn_bwd_dq_kernel": (2, 1),
    "prefix_attn_bwd_dkv_kernel": (2, 2),
    "prefix_attn_bwd_dprefix_kernel": (2, 2),
}


@dataclass(frozen=True)
class Case:
    """One problem to compile all the passes for.

    Attributes:
        target: one of TARGETS.
        head_size: D.
        dtype: one of DTYPES.
        features: names out of FEATURES.
        value_head_size: Dv, D if None.
        is_causal: of the sequence part.
        batch, kv_heads, group, query_length, length, prefix: B, Hkv, Hq / Hkv, Lq, Lk, P. With
            "cu_seqlens", `batch` sequences share the `length` tokens.
    """

    target: str
    head_size: int = 64
    dtype: str = "bf16"
    features: tuple[str, ...] = ()
    value_head_size: int | None = None
    is_causal: bool = True
    batch: int = 8
    kv_heads: int = 8
    group: int = 4
    query_length: int = 2048
    length: int = 2048
    prefix: int = 512


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


# Keyword arguments that a feature adds to both launchers. To compile a new feature, add its line.
FEATURES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "padding": lambda c: {"key_padding_mask": _empty(c.batch, c.length, dtype=torch.bool)},
    "attn_mask": lambda c: {"attn_mask": _empty(c.batch, 1, c.query_length, c.length)},
    "bool_mask": lambda c: {
        "attn_mask": _empty(c.batch, 1, c.query_length, c.length, dtype=torch.bool)
    },
    "sliding_window": lambda c: {"sliding_window": 256},
    "prefix_in_window": lambda c: {"sliding_window": 256, "prefix_in_window": True},
    "softcap": lambda c: {"softcap": 30.0},
    "sinks": lambda c: {"sinks": _empty(c.kv_heads * c.group)},
    "prefix_bias": lambda c: {"prefix_bias": _empty(c.kv_heads * c.group)},
    "prefix_bias_columns": lambda c: {
        "prefix_bias": _empty(c.kv_heads * c.group, c.query_length, c.prefix)
    },
    "dropout": lambda c: {"dropout_p": 0.1, "dropout_seed": _empty(1, dtype=torch.int64)},
    "packed": lambda c: {
        "prefix_lengths": _empty(4, dtype=torch.int32),
        "prefix_index": _empty(c.batch, dtype=torch.int32),
    },
    "cu_seqlens": lambda c: {"cu_seqlens": _empty(c.batch + 1, dtype=torch.int32)},
    "negative_scale": lambda c: {"scale": -0.125},
}


@dataclass(frozen=True)
class NamedLoop(inspect_code.Loop):
    """A hot loop, what it sweeps, and its work against that of one iteration in the source.

    Attributes:
        name: what it sweeps.
        iterations: FLOP over those of one tile; 1 unless the compiler unrolled the loop, or warps
            do the same work twice.
    """

    name: str = ""
    iterations: float | None = None


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs. Bytes are per program, spills and registers per thread."""

    case: Case
    kernel: str
    tile: launch.Tile
    programs: int
    registers: int
    spill_bytes: int
    spill_instructions: int
    shared_bytes: int
    shared_limit: int
    tensor_core_instructions: int
    instructions: int
    loops: tuple[NamedLoop, ...]
    occupancy: inspect_device.Occupancy
    traffic: inspect_traffic.Traffic | None


@dataclass(frozen=True)
class Failure:
    """A kernel that the compiler refused."""

    case: Case
    kernel: str
    error: str


def parse_target(name: str) -> str:
    """The entry of TARGETS for "sm_90", "gfx942" or itself.

    Raises:
        ValueError: an architecture that is not in TARGETS.
    """
    known = {target.replace("cuda:", "sm_").replace("hip:", ""): target for target in TARGETS}
    if name in TARGETS:
        return name
    if name not in known:
        raise ValueError(f"arch: got {name!r}, takes one of {', '.join(known)}")
    return known[name]


def check_case(case: Case) -> None:
    """Raise ValueError, naming the field, for a case that no launcher takes."""
    for name, known in (("target", TARGETS), ("dtype", DTYPES)):
        if getattr(case, name) not in known:
            raise ValueError(
                f"{name}: got {getattr(case, name)!r}, takes one of {', '.join(known)}"
            )
    for name in ("head_size", "value_head_size"):
        size = getattr(case, name)
        if size is not None and not 1 <= size <= launch.MAX_HEAD_SIZE:
            raise ValueError(f"{name}: got {size}, takes 1 to {launch.MAX_HEAD_SIZE}")
    taken = {field.name for field in dataclasses.fields(Problem)}
    for name in case.features:
        if name not in FEATURES:
            raise ValueError(f"features: got {name!r}, takes {', '.join(FEATURES)}")
        missing = FEATURES[name](case).keys() - taken
        if missing:
            raise ValueError(f"features: the kernels have no {', '.join(sorted(missing))}")


def gpu_target(name: str) -> GPUTarget:
    """Triton's target for "cuda:90" or "hip:gfx942"."""
    backend, arch = name.split(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def launch_target(name: str) -> launch.Target:
    """The entry of the launch table for the same name."""
    backend, arch = name.split(":")
    if backend == "cuda":
        return launch.Target(launch.family_of_capability(*divmod(int(arch), 10)), MULTIPROCESSORS)
    return launch.Target(launch.family_of_amd(arch), MULTIPROCESSORS)


@contextlib.contextmanager
def collected(target: launch.Target) -> Iterator[list[launch.Launch]]:
    """Inside, every device is `target`, and launches are listed instead of enqueued."""
    steps: list[launch.Launch] = []
    run, target_of = launch.Launch.run, launch.target_of
    launch.Launch.run = lambda self: steps.append(self)  # type: ignore[method-assign]
    launch.target_of = lambda device: target  # type: ignore[assignment]
    try:
        yield steps
    finally:
        launch.Launch.run = run  # type: ignore[method-assign]
        launch.target_of = target_of


def launches(case: Case) -> list[launch.Launch]:
    """Every launch of a forward and a backward of the case, in order."""
    check_case(case)
    c, dtype = case, DTYPES[case.dtype]
    D, Dv = c.head_size, c.value_head_size or c.head_size
    B, Lq, Lk = c.batch, c.query_length, c.length
    if "cu_seqlens" in c.features:
        B, Lq = 1, Lk
    Hq = c.kv_heads * c.group
    inputs = (
        _empty(B, Hq, Lq, D, dtype=dtype),
        _empty(B, c.kv_heads, Lk, D, dtype=dtype),
        _empty(B, c.kv_heads, Lk, Dv, dtype=dtype),
        _empty(c.kv_heads, c.prefix, D, dtype=dtype),
        _empty(c.kv_heads, c.prefix, Dv, dtype=dtype),
    )
    options: dict[str, Any] = {"scale": 0.125, "is_causal": c.is_causal, "key_padding_mask": None}
    for name in c.features:
        options |= FEATURES[name](c)
    bias = options.get("prefix_bias")
    needs = (True,) * len(inputs) + ("sinks" in options, bias is not None and bias.dim() == 1)
    with collected(launch_target(c.target)) as steps:
        out, lse = prefix_attention_forward(*inputs, **options)
        grad_out = _empty(B, Hq, Lq, Dv, dtype=dtype)
        prefix_attention_backward(grad_out, *inputs, out=out, lse=lse, **options, needs=needs)
    return steps


def source(step: launch.Launch, target: GPUTarget) -> ASTSource:
    """The specialisation that Triton's own launcher would derive from these arguments."""
    backend = make_backend(target)
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(step.kernel.arg_names):
        value = step.constants.get(name, step.arguments.get(name))
        one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        if name in step.constants or value is None or one:
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            special = backend.get_tensor_specialization(value, align=True)
            attributes[(position,)] = backend.parse_attr(special)
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            special = backend.get_int_specialization(value, align=True)
            attributes[(position,)] = backend.parse_attr(special)
        else:
            signature[name] = "fp32"
    return ASTSource(step.kernel, signature, constants, attributes)


def compile_launch(step: launch.Launch, target: str) -> Any:
    """Triton's compiled kernel for a launch."""
    chosen = gpu_target(target)
    options = {"num_warps": step.tile.warps, "num_stages": step.tile.stages}
    return triton.compile(source(step, chosen), target=chosen, options=options)


def nvidia_costs(binary: bytes, warps: int) -> dict[str, Any]:
    """Registers, stack, instruction counts and hot loops of a cubin."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()

        def dump(option: str) -> str:
            command = [tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        code = inspect_code.parse_sass(dump("-sass"))
    return {
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "spill_instructions": sum(map(inspect_code.is_spill, code)),
        **_code_costs(code, warps),
    }


def amd_costs(text: str, warps: int) -> dict[str, Any]:
    """The same from the assembly text of an AMD kernel."""

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    # Not the metadata's spill counts: scalar registers kept in lanes of vector registers, which
    # never see memory, are among them.
    code = inspect_code.parse_amdgcn(text)
    return {
        "registers": field("vgpr_count"),
        "spill_bytes": field("private_segment_fixed_size"),
        "spill_instructions": sum(map(inspect_code.is_spill, code)),
        **_code_costs(code, warps),
    }


def _code_costs(code: list[inspect_code.Instruction], warps: int) -> dict[str, Any]:
    return {
        "tensor_core_instructions": sum(map(inspect_code.is_matrix, code)),
        "instructions": len(code),
        "loops": [dataclasses.asdict(loop) for loop in inspect_code.hot_loops(code, warps)],
    }


@functools.cache
def _analysis() -> str:
    """A digest of the code that reads machine code: figures read by other code do not count."""
    files = (Path(__file__), Path(inspect_code.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def costs(compiled: Any, warps: int) -> dict[str, Any]:
    """`nvidia_costs` or `amd_costs` of a compiled kernel, from the cache if they lie there."""
    key = hashlib.sha256(f"{compiled.hash} {_analysis()}".encode()).hexdigest()
    cache = get_cache_manager(key)
    known = cache.get_file("costs.json")
    if known is not None:
        return json.loads(Path(known).read_text())
    asm = compiled.asm
    nvidia = "cubin" in asm
    found = nvidia_costs(asm["cubin"], warps) if nvidia else amd_costs(asm["amdgcn"], warps)
    cache.put(json.dumps(found), "costs.json", binary=False)  # atomic: a rename
    return found


def loop_names(kernel: str, features: tuple[str, ...], count: int) -> list[str]:
    """What the `count` loops of a kernel sweep."""
    names = [
        name
        for name, brought_by in LOOPS.get(kernel, ())
        if not brought_by or set(brought_by) & set(features)
    ]
    return names if len(names) == count else [f"{i} of {count}" for i in range(1, count + 1)]


def named_loops(
    case: Case, step: launch.Launch, loops: list[dict[str, Any]]
) -> tuple[NamedLoop, ...]:
    """The loops of a kernel with what they sweep and their share of the source's work."""
    kernel, constants = step.kernel.__name__, step.constants
    names = loop_names(kernel, case.features, len(loops))
    work = None
    if kernel in PRODUCTS:
        over_key, over_value = PRODUCTS[kernel]
        width = constants["BLOCK_D"]
        width = over_key * width + over_value * constants.get("BLOCK_DV", width)
        work = 2 * constants["BLOCK_M"] * constants["BLOCK_N"] * width
    return tuple(
        NamedLoop(**loop, name=name, iterations=work and loop["flops"] / work)
        for name, loop in zip(names, loops, strict=True)
    )


def report(case: Case, step: launch.Launch, save: Path | None = None) -> Report:
    """Compile one launch and measure its code; `save` keeps the binary and its metadata."""
    compiled = compile_launch(step, case.target)
    found = costs(compiled, step.tile.warps)
    loops = named_loops(case, step, found.pop("loops"))
    metadata, kernel = compiled.metadata, step.kernel.__name__
    if save is not None:
        stem = f"{case.target.replace(':', '')}-{case.dtype}-{case.head_size}-{kernel}"
        if "cubin" in compiled.asm:
            (save / f"{stem}.cubin").write_bytes(compiled.asm["cubin"])
        else:
            (save / f"{stem}.s").write_text(compiled.asm["amdgcn"])
        meta = {"shared": metadata.shared, "num_warps": step.tile.warps}
        (save / f"{stem}.json").write_text(json.dumps(meta))
    return Report(
        case=case,
        kernel=kernel,
        tile=step.tile,
        programs=math.prod(step.grid),
        shared_bytes=metadata.shared,
        shared_limit=launch.SHARED_MEMORY[launch_target(case.target).family],
        loops=loops,
        occupancy=inspect_device.occupancy(
            inspect_device.LIMITS[case.target],
            registers=found["registers"],
            shared_bytes=metadata.shared,
            warps=step.tile.warps,
            tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        ),
        traffic=inspect_traffic.traffic(step),
        **found,
    )


def reports(case: Case, kernel: str = "", save: Path | None = None) -> list[Report | Failure]:
    """Compile every launch of the case whose kernel's name contains `kernel`."""
    found: list[Report | Failure] = []
    for step in launches(case):
        name = step.kernel.__name__
        if kernel not in name:
            continue
        try:
            found.append(report(case, step, save))
        except Exception as error:  # compilers fail in many ways; the others still get compiled
            found.append(Failure(case, name, f"{type(error).__name__}: {error}"))
    return found


def violations(r: Report | Failure) -> list[str]:
    """What a kernel must not do and does: not compile, overflow shared memory; on the main path
    (bf16, D 64 or 128) spill, or compute without the matrix units.
    """
    if isinstance(r, Failure):
        return [f"does not compile: {r.error.splitlines()[0]}"]
    found = []
    case = r.case
    if r.shared_bytes > r.shared_limit:
        found.append(f"{r.shared_bytes} bytes of shared memory, {r.shared_limit} exist")
    main = case.dtype == "bf16" and case.head_size in (64, 128)
    if main and r.spill_bytes + r.spill_instructions:
        found.append(f"spills {r.spill_bytes} bytes, {r.spill_instructions} instructions")
    if main and r.kernel in PRODUCTS and not r.tensor_core_instructions:
        found.append("does not use the matrix units")
    return found


def label(r: Report | Failure) -> str:
    """The case and kernel of a report, in words."""
    c = r.case
    extras = [*c.features, *([] if c.is_causal else ["bidirectional"])]
    if c.value_head_size not in (None, c.head_size):
        extras.append(f"Dv {c.value_head_size}")
    named = f" {'+'.join(extras)}" if extras else ""
    return f"{c.target:11} {c.dtype} D{c.head_size:<4}{r.kernel}{named}"


def run(
    cases: list[Case], jobs: int = 1, kernel: str = "", save: Path | None = None
) -> list[Report | Failure]:
    """The reports of the cases in their order, with a progress bar on standard error."""
    results: dict[int, list[Report | Failure]] = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling", total=len(cases))
        if jobs == 1:
            for i, case in enumerate(cases):
                results[i] = reports(case, kernel, save)
                progress.advance(bar)
        else:
            with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
                pending = {
                    pool.submit(reports, case, kernel, save): i for i, case in enumerate(cases)
                }
                for done in as_completed(pending):
                    results[pending[done]] = done.result()
                    progress.advance(bar)
    return [r for i in range(len(cases)) for r in results[i]]


def main(arguments: list[str] | None = None) -> int:
    """Command line: one line per kernel, or JSON. The exit status counts violations as failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", nargs="+", default=TARGETS, help=", ".join(TARGETS))
    parser.add_argument("--head-size", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--value-head-size", type=int)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--features", nargs="*", default=[], help=", ".join(FEATURES))
    parser.add_argument("--bidirectional", action="store_true", help="not causal")
    for name in ("batch", "kv_heads", "group", "query_length", "length", "prefix"):
        default = Case.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--full", action="store_true",
        help="every target, head size and dtype; prints violations and a summary only",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, help="folder for the binaries")
    chosen = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("Triton's interpreter is on; set TRITON_INTERPRET=0")
    sizes = {
        name: getattr(chosen, name)
        for name in ("value_head_size", "batch", "kv_heads", "group", "query_length", "length")
    } | {"prefix": chosen.prefix}
    axes = (
        (TARGETS, HEAD_SIZES, list(DTYPES))
        if chosen.full
        else (chosen.target, chosen.head_size, chosen.dtype)
    )
    try:
        cases = [
            Case(
                parse_target(target), head_size, dtype, tuple(chosen.features),
                is_causal=not chosen.bidirectional, **sizes,
            )
            for target, head_size, dtype in itertools.product(*axes)
        ]  # fmt: skip
        for case in cases:
            check_case(case)
    except ValueError as error:
        parser.error(str(error))
    if chosen.save:
        chosen.save.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = run(cases, chosen.jobs, chosen.kernel, chosen.save)
    if chosen.json:
        print(json.dumps([dataclasses.asdict(r) for r in results if isinstance(r, Report)]))
    elif not chosen.full:
        print("\n".join(_line(r) for r in results if isinstance(r, Report)))
    wrong = [f"{label(r)}: {text}" for r in results for text in violations(r)]
    spilling = sum(isinstance(r, Report) and r.spill_bytes > 0 for r in results)
    summary = (
        f"Triton {triton.__version__}: {len(results)} kernels for {len(cases)} cases, "
        f"{spilling} spill, {len(wrong)} violations, {time.monotonic() - started:.0f} s"
    )
    print("\n".join([*wrong, summary]), file=sys.stdout if chosen.full else sys.stderr)
    return 1 if wrong else 0


def _line(r: Report) -> str:
    return (
        f"{label(r):70}{r.tile.rows:4}x{r.tile.keys}/{r.tile.warps}w/{r.tile.stages}s"
        f"  {r.registers:3} registers  {r.spill_bytes:4} B spilled"
        f"  {r.shared_bytes:6} B shared  {r.tensor_core_instructions:4} matrix"
        f"  i/kF {', '.join(f'{loop.per_kiloflop:.2f}' for loop in r.loops)}"
    )


if __name__ == "__main__":
    sys.exit(main())
