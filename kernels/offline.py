"""Compile the kernels for GPUs that are not there, and report what the machine code costs.

    TRITON_INTERPRET=0 python -m fastprefix.kernels.offline --target cuda:90 --head-size 64 128

Every launch comes from the functions that launch for real, called on tensors without storage, so
what is compiled here is what runs there. Nothing in the report is a timing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from . import launch
from .backward import delta_launch
from .backward_dkv import dkv_launch
from .backward_dprefix import dprefix_launches
from .backward_dq import dq_launch
from .forward import forward_launch
from .problem import Problem

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
    **{dtype: f"*{name}" for name, dtype in DTYPES.items()},
}

# Tensor-core instructions in the disassembly of each vendor.
NVIDIA_MMA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")
AMD_MMA = re.compile(r"\bv_(mfma|wmma|smfmac)_\w+")


@dataclass(frozen=True)
class Case:
    """One problem to compile all the passes for."""

    target: str
    head_size: int = 64
    dtype: str = "bf16"
    is_causal: bool = True
    padding: bool = False
    group: int = 4
    query_length: int = 2048


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs. Bytes are per program, spills and registers per thread."""

    case: Case
    kernel: str
    tile: launch.Tile
    registers: int
    spill_bytes: int
    spill_instructions: int
    shared_bytes: int
    shared_limit: int
    tensor_core_instructions: int
    instructions: int


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
        return launch.Target(launch.family_of_capability(*divmod(int(arch), 10)), 108)
    return launch.Target(launch.family_of_amd(arch), 108)


def launches(case: Case) -> list[launch.Launch]:
    """Every launch of a forward and a backward of the case."""
    dtype, target = DTYPES[case.dtype], launch_target(case.target)
    B, Hkv, Lk, P, D = 8, 8, 2048, 512, case.head_size
    Hq, Lq = Hkv * case.group, case.query_length

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, out, do, dq = (empty(B, Hq, Lq, D) for _ in range(4))
    k, v, dk, dv = (empty(B, Hkv, Lk, D) for _ in range(4))
    pk, pv, dpk, dpv = (empty(Hkv, P, D) for _ in range(4))
    lse, delta = (empty(B, Hq, Lq, dtype=torch.float32) for _ in range(2))
    mask = empty(B, Lk, dtype=torch.bool) if case.padding else None
    problem = Problem(
        q, k, v, pk, pv,
        is_causal=case.is_causal, scale=0.125, target=target, key_padding_mask=mask,
    )  # fmt: skip
    return [
        forward_launch(problem, out, lse),
        delta_launch(out, do, delta),
        dq_launch(problem, do, lse, delta, dq),
        dkv_launch(problem, do, lse, delta, dk, dv),
        *dprefix_launches(problem, do, lse, delta, dpk, dpv),
    ]


def source(step: launch.Launch, target: GPUTarget) -> ASTSource:
    """The specialisation that Triton's own launcher would derive from these arguments."""
    backend = make_backend(target)
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(step.kernel.arg_names):
        value = step.constants.get(name, step.arguments.get(name))
        if name in step.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            special = backend.get_tensor_specialization(value, align=True)
            attributes[(position,)] = backend.parse_attr(special)
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


def nvidia_costs(binary: bytes) -> dict[str, int]:
    """Registers, stack and instruction counts of a cubin."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()

        def dump(option: str) -> str:
            command = [tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?);", dump("-sass"), re.MULTILINE)
    return {
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "spill_instructions": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in code),
        "tensor_core_instructions": sum(bool(NVIDIA_MMA.search(line)) for line in code),
        "instructions": len(code),
    }


def amd_costs(text: str) -> dict[str, int]:
    """The same from the assembly text of an AMD kernel."""

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    code = re.findall(r"^\t([a-z]\w+)\b", text, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        "spill_bytes": field("private_segment_fixed_size"),
        "spill_instructions": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "tensor_core_instructions": sum(bool(AMD_MMA.match(name)) for name in code),
        "instructions": len(code),
    }


def report(case: Case, step: launch.Launch, save: Path | None = None) -> Report:
    """Compile one launch and measure its code; `save` keeps the binary and its metadata."""
    compiled = compile_launch(step, case.target)
    nvidia = "cubin" in compiled.asm
    costs = nvidia_costs(compiled.asm["cubin"]) if nvidia else amd_costs(compiled.asm["amdgcn"])
    if save is not None:
        stem = (
            f"{case.target.replace(':', '')}-{case.dtype}-{case.head_size}-{step.kernel.__name__}"
        )
        if nvidia:
            (save / f"{stem}.cubin").write_bytes(compiled.asm["cubin"])
        else:
            (save / f"{stem}.s").write_text(compiled.asm["amdgcn"])
        meta = {"shared": compiled.metadata.shared, "num_warps": step.tile.warps}
        (save / f"{stem}.json").write_text(json.dumps(meta))
    return Report(
        case=case,
        kernel=step.kernel.__name__,
        tile=step.tile,
        shared_bytes=compiled.metadata.shared,
        shared_limit=launch.SHARED_MEMORY[launch_target(case.target).family],
        **costs,
    )


def reports(case: Case, save: Path | None = None) -> list[Report]:
    """Compile every launch of the case."""
    return [report(case, step, save) for step in launches(case)]


def main(arguments: list[str] | None = None) -> None:
    """Command line: one line per kernel, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", nargs="+", default=TARGETS, help=", ".join(TARGETS))
    parser.add_argument("--head-size", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--bidirectional", action="store_true", help="not causal")
    parser.add_argument("--padding", action="store_true", help="with a key padding mask")
    parser.add_argument("--query-length", type=int, default=2048)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, help="folder for the binaries")
    chosen = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("Triton's interpreter is on; set TRITON_INTERPRET=0")
    cases = [
        Case(
            target, head_size, dtype, not chosen.bidirectional, chosen.padding,
            query_length=chosen.query_length,
        )
        for target in chosen.target
        for head_size in chosen.head_size
        for dtype in chosen.dtype
    ]  # fmt: skip
    if chosen.save:
        chosen.save.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        results = [
            r for found in pool.map(reports, cases, [chosen.save] * len(cases)) for r in found
        ]
    if chosen.json:
        print(json.dumps([dataclasses.asdict(r) for r in results]))
        return
    for r in results:
        print(
            f"{r.case.target:11} {r.case.dtype} D{r.case.head_size:<4}{r.kernel:40}"
            f"{r.tile.rows:4}x{r.tile.keys}/{r.tile.warps}w/{r.tile.stages}s"
            f"  {r.registers:3} registers  {r.spill_bytes:4} B spilled"
            f"  {r.shared_bytes:6} B shared  {r.tensor_core_instructions:4} tensor-core"
        )


if __name__ == "__main__":
    main()
