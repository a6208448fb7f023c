"""What the machine code of a launch costs: registers, spills, shared memory, hot loops.

Triton keeps compiled kernels on disk (TRITON_CACHE_DIR). Their key holds the source, the
specialisation, the target and Triton's version. The figures read off the machine code lie beside
them. Their key holds the kernel's hash and the source of the code that reads them. Nothing here is
a timing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

from .. import launch
from ..target import SHARED_MEMORY, Tile
from ..tilings import TRITON
from . import machine_code
from .cases import DTYPES, Case, Job, gpu_target, is_main, launch_target, launches
from .occupancy import LIMITS, Occupancy, occupancy
from .traffic import Traffic, traffic

# Whether spills and waits of the main path count against this Triton.
HELD = TRITON >= (3, 7)
POINTERS = {
    torch.bool: "*u1", torch.int32: "*i32", torch.int64: "*i64",
    **{dtype: f"*{name}" for name, dtype in DTYPES.items()},
}  # fmt: skip

# Matrix instructions in PTX. Each stands for one or several instructions of the machine code.
PTX_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")

# The loops of a kernel in the order of its source, with the features that add each. A loop without
# features is always there. If the compiler leaves another number of loops, they are numbered.
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
# The same where tiles that need no test have no loop of their own: see `tilings.unmasked_loop`.
ONE_LOOP = {
    "prefix_attn_fwd_kernel": ("prefix", "sequence"),
    "prefix_attn_bwd_dq_kernel": ("prefix", "sequence"),
    "prefix_attn_bwd_dkv_kernel": ("rows",),
}
# Products per tile of scores: how many sum over the key's head size, and over the value's.
PRODUCTS = {
    "prefix_attn_fwd_kernel": (1, 1),
    "prefix_attn_bwd_dq_kernel": (2, 1),
    "prefix_attn_bwd_dkv_kernel": (2, 2),
    "prefix_attn_bwd_dprefix_kernel": (2, 2),
}


@dataclass(frozen=True)
class NamedLoop(machine_code.Loop):
    """A hot loop with its name, and its work compared with one iteration of the source.

    Attributes:
        name: what the loop goes through.
        iterations: its FLOP divided by those of one tile. This is 1 unless the compiler unrolled
            the loop, or warps do the same work twice.
    """

    name: str = ""
    iterations: float | None = None


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs.

    Shared memory is per program; registers and spilled bytes are per thread.

    Without a disassembly `spill_instructions` and `instructions` are None, and `loops` is empty.
    """

    case: Case
    kernel: str
    tile: Tile
    programs: int
    registers: int
    spill_bytes: int
    spill_instructions: int | None
    shared_bytes: int
    shared_limit: int
    tensor_core_instructions: int
    instructions: int | None
    loops: tuple[NamedLoop, ...]
    occupancy: Occupancy
    traffic: Traffic | None


@dataclass(frozen=True)
class Failure:
    """A kernel that the compiler refused."""

    case: Case
    kernel: str
    error: str


def source(step: launch.Launch, target: GPUTarget) -> ASTSource:
    """The specialisation that Triton's own launcher would derive from these arguments.

    An argument of `do_not_specialize` is neither a constant where it equals 1 nor known to be a
    multiple of 16; one of `do_not_specialize_on_alignment` may be a constant. Fields of a group
    are always specialised.
    """
    backend = make_backend(target)
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def specialised(path: tuple[int, ...], value: Any, constant: bool, align: bool) -> Any:
        if isinstance(value, tuple):
            fields = (specialised((*path, i), v, True, True) for i, v in enumerate(value))
            return type(value)(*fields)
        if value is None or (constant and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            special = backend.get_tensor_specialization(value, align=align)
            attributes[path] = backend.parse_attr(special)
            return POINTERS[value.dtype]
        if isinstance(value, bool):
            return "u1"
        if isinstance(value, int):
            special = backend.get_int_specialization(value, align=align)
            attributes[path] = backend.parse_attr(special)
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    signature = {}
    for position, parameter in enumerate(step.kernel.params):
        name = parameter.name
        if name in step.constants:
            signature[name], constants[(position,)] = "constexpr", step.constants[name]
            continue
        constant = not parameter.do_not_specialize
        align = constant and not parameter.do_not_specialize_on_alignment
        signature[name] = specialised((position,), step.arguments.get(name), constant, align)
    return ASTSource(step.kernel, signature, constants, attributes)


def compile_launch(step: launch.Launch, target: str) -> Any:
    """Compile a launch, without line numbers: they would take a tenth of the time."""
    chosen = gpu_target(target)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(source(step, chosen), target=chosen, options=step.options)


def nvidia_costs(asm: dict[str, Any], warps: int, code: bool) -> dict[str, Any]:
    """Registers, stack and matrix instructions of a cubin; with `code` also its loops."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        sass = machine_code.parse_sass(dump("-sass")) if code else None
    return {
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "tensor_core_instructions": len(PTX_MATRIX.findall(asm["ptx"])),
        **_code_costs(sass, warps),
    }


def amd_costs(asm: dict[str, Any], warps: int, code: bool) -> dict[str, Any]:
    """The same from the assembly text of an AMD kernel."""
    text = asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    # The spill counts of the metadata include scalar registers that are kept in lanes of vector
    # registers. Those never reach memory, so we read the size of the stack instead.
    return {
        "registers": field("vgpr_count"),
        "spill_bytes": field("private_segment_fixed_size"),
        "tensor_core_instructions": len(re.findall(r"^\tv_(?:mfma|wmma)_", text, re.MULTILINE)),
        **_code_costs(machine_code.parse_amdgcn(text) if code else None, warps),
    }


def _code_costs(code: list[machine_code.Instruction] | None, warps: int) -> dict[str, Any]:
    """The figures that need the instructions; None and no loops if there are none."""
    if code is None:
        return {"spill_instructions": None, "instructions": None, "loops": []}
    return {
        "spill_instructions": sum(map(machine_code.is_spill, code)),
        "tensor_core_instructions": sum(map(machine_code.is_matrix, code)),
        "instructions": len(code),
        "loops": [dataclasses.asdict(loop) for loop in machine_code.hot_loops(code, warps)],
    }


@functools.cache
def _analysis() -> str:
    """A digest of the code that reads machine code. Figures from other code are not reused."""
    files = (Path(__file__), Path(machine_code.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def costs(compiled: Any, warps: int, code: bool = True) -> dict[str, Any]:
    """`nvidia_costs` or `amd_costs` of a compiled kernel, from the cache if they are there."""
    key = hashlib.sha256(f"{compiled.hash} {_analysis()} {code}".encode()).hexdigest()
    cache = get_cache_manager(key)
    known = cache.get_file("costs.json")
    if known is not None:
        with contextlib.suppress(ValueError, LookupError, TypeError):  # damaged, so made again
            kept = json.loads(Path(known).read_text())
            if figures_digest(kept["figures"]) == kept["sha256"]:
                return kept["figures"]
    read = nvidia_costs if "cubin" in compiled.asm else amd_costs
    found = read(compiled.asm, warps, code)
    kept = {"figures": found, "sha256": figures_digest(found)}
    cache.put(json.dumps(kept), "costs.json", binary=False)  # atomic: a rename
    return found


def figures_digest(figures: dict[str, Any]) -> str:
    """A digest that tells whether figures on disk are as they were written."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def loop_names(
    kernel: str, features: tuple[str, ...], count: int, unmasked_loop: bool = True
) -> list[str]:
    """What the `count` loops of a kernel sweep; `unmasked_loop` as `tilings.unmasked_loop`."""
    names = [
        name
        for name, brought_by in LOOPS.get(kernel, ())
        if not brought_by or set(brought_by) & set(features)
    ]
    if not unmasked_loop:
        names = list(ONE_LOOP[kernel])
    return names if len(names) == count else [f"{i} of {count}" for i in range(1, count + 1)]


def named_loops(
    case: Case, step: launch.Launch, loops: list[dict[str, Any]]
) -> tuple[NamedLoop, ...]:
    """The loops of a kernel with what they sweep and their share of the source's work."""
    kernel, constants = step.kernel.__name__, step.constants
    names = loop_names(kernel, case.features, len(loops), constants.get("UNMASKED_LOOP", True))
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


def report(case: Case, step: launch.Launch, code: bool = True, save: Path | None = None) -> Report:
    """Compile one launch and measure its code; `save` keeps the binary and its metadata."""
    compiled = compile_launch(step, case.target)
    found = costs(compiled, step.tile.warps, code)
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
        shared_limit=SHARED_MEMORY[launch_target(case.target).family],
        loops=loops,
        occupancy=occupancy(
            LIMITS[case.target],
            registers=found["registers"],
            shared_bytes=metadata.shared,
            warps=step.tile.warps,
            tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        ),
        traffic=traffic(step),
        **found,
    )


def reports(job: Job, save: Path | None = None) -> list[Report | Failure]:
    """Compile the launches of a job."""
    found: list[Report | Failure] = []
    for step in launches(job.case):
        name = step.kernel.__name__
        if job.kernel not in name:
            continue
        try:
            found.append(report(job.case, step, job.code, save))
        except Exception as error:  # compilers fail in many ways; the other kernels still compile
            found.append(Failure(job.case, name, f"{type(error).__name__}: {error}"))
    return found


def violations(r: Report | Failure) -> list[str]:
    """What a kernel does although it must not.

    - No kernel may fail to compile or need more shared memory than there is.
    - On the main path (bf16, D 64 or 128, no features) kernels may not spill, and their products
      must run on the matrix units.
    - On sm_90 a loop may wait for every fourth product at most. With more waits nothing runs beside
      the tensor cores.

    Spills and waits are held against it from Triton 3.7 on; kernels/README.md says what 3.6 does.
    """
    if isinstance(r, Failure):
        return [f"does not compile: {r.error.splitlines()[0]}"]
    found = []
    case = r.case
    if r.shared_bytes > r.shared_limit:
        found.append(f"{r.shared_bytes} bytes of shared memory, {r.shared_limit} exist")
    main = is_main(case)
    if HELD and main and r.spill_bytes + (r.spill_instructions or 0):
        found.append(f"spills {r.spill_bytes} bytes, {r.spill_instructions} instructions")
    if main and r.kernel in PRODUCTS and not r.tensor_core_instructions:
        found.append("does not use the matrix units")
    for loop in r.loops:
        if HELD and loop.matrix_waits * 4 > loop.matrix_instructions:
            found.append(
                f"serialises the tensor cores: {loop.matrix_waits} waits for "
                f"{loop.matrix_instructions} products in the loop over {loop.name}"
            )
    return found


def label(r: Report | Failure) -> str:
    """The case and kernel of a report, in words."""
    c = r.case
    extras = [*c.features, *([] if c.is_causal else ["bidirectional"])]
    if c.value_head_size not in (None, c.head_size):
        extras.append(f"Dv {c.value_head_size}")
    named = f" {'+'.join(extras)}" if extras else ""
    return f"{c.target:11} {c.dtype} D{c.head_size:<4}{r.kernel}{named}"
