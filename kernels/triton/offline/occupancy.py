"""How many programs of a kernel fit on one multiprocessor, and which resource is the limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (NVIDIA), compute unit (CDNA) or workgroup processor (RDNA) holds.

    Attributes:
        name: the unit's name.
        blocks: resident programs.
        schedulers: partitions with a register file each; a warp belongs to one.
        warps: resident warps per scheduler.
        registers: registers per lane and scheduler.
        register_unit: a warp gets registers in multiples of this.
        shared: bytes of shared memory.
        shared_reserved: bytes that the system needs per program.
        shared_unit: a program gets shared memory in multiples of this.
        tensor_columns: columns of tensor memory, 0 if there is none.
    """

    name: str
    blocks: int
    schedulers: int
    warps: int
    registers: int
    register_unit: int
    shared: int
    shared_reserved: int
    shared_unit: int
    tensor_columns: int = 0


def _nvidia(blocks: int, warps: int, shared: int, tensor_columns: int = 0) -> Limits:
    # Since compute capability 8.0 there are 64 Ki registers in four partitions, given out in units
    # of 256 per warp, and 1 KiB of shared memory is reserved per block.
    return Limits(
        "multiprocessor", blocks, 4, warps // 4, 512, 8, shared << 10, 1 << 10, 128, tensor_columns
    )


# NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"
# (blocks, warps and shared memory per multiprocessor); tensor memory: PTX ISA, "Tensor Memory"
# (512 columns). AMD: LLVM's AMDGPU backend (AMDGPUBaseInfo.cpp: waves per EU, VGPR granules).
# Triton compiles in WGP mode, so a workgroup processor has the LDS of its two compute units.
LIMITS: dict[str, Limits] = {
    "cuda:80": _nvidia(32, 64, 164),
    "cuda:86": _nvidia(16, 48, 100),
    "cuda:89": _nvidia(24, 48, 100),
    "cuda:90": _nvidia(32, 64, 228),
    "cuda:100": _nvidia(32, 64, 228, tensor_columns=512),
    "cuda:120": _nvidia(24, 48, 100),
    "hip:gfx942": Limits("compute unit", 16, 4, 8, 512, 8, 64 << 10, 0, 512),
    "hip:gfx1100": Limits("workgroup processor", 32, 4, 16, 1536, 24, 128 << 10, 0, 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Programs per multiprocessor.

    Attributes:
        unit: the vendor's name for a multiprocessor.
        blocks: programs that are resident at once.
        bound_by: the resources that allow no more programs, separated by commas.
        by_limit: how many programs each resource would allow; resources that are not used are
            absent.
        warps: resident warps, as a share of those that the multiprocessor could hold.
    """

    unit: str
    blocks: int
    bound_by: str
    by_limit: dict[str, int]
    warps: float


def occupancy(
    limits: Limits, *, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0
) -> Occupancy:
    """The occupancy of a kernel.

    Args:
        limits: limits of the device.
        registers: registers per lane, as the compiler reports them.
        shared_bytes: shared memory per program.
        warps: warps per program.
        tensor_columns: columns of tensor memory per program.
    """
    per_warp = _round_up(max(registers, 1), limits.register_unit)
    by_limit = {
        "programs": limits.blocks,
        "warps": limits.schedulers * limits.warps // warps,
        "registers": limits.registers // per_warp * limits.schedulers // warps,
    }
    shared = shared_bytes + limits.shared_reserved
    if shared:
        by_limit["shared memory"] = limits.shared // _round_up(shared, limits.shared_unit)
    if tensor_columns:
        by_limit["tensor memory"] = limits.tensor_columns // tensor_columns
    blocks = min(by_limit.values())
    return Occupancy(
        unit=limits.name,
        blocks=blocks,
        bound_by=", ".join(name for name, most in by_limit.items() if most == blocks),
        by_limit=by_limit,
        warps=blocks * warps / (limits.schedulers * limits.warps),
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
