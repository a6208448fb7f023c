"""Tile shapes: the tables by target family and pass, and how a pass chooses from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

if TYPE_CHECKING:
    from .problem import Problem

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256


class Tile(NamedTuple):
    """Rows and keys per tile, warps per program, pipeline stages of the loops."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Target:
    """What the table needs to know of a device."""

    family: str  # a key of TABLE
    multiprocessors: int
    # by `row_name`: what :mod:`.tuning` found faster on this device than the table's tiles
    tuned: Mapping[str, Tile] = field(default_factory=dict, compare=False)


# Passes of a family: [(largest block of the head size, tile for 16-bit types, tile for fp32)], the
# first row that fits is taken. `rows` are query rows, `keys` prefix or sequence keys.
#
# The reasons, all static (registers, spills and instructions per MMA FLOP from `offline`; no
# timing stands behind them yet):
# - the larger the tile, the fewer instructions per FLOP, until 255 registers spill. 4 warps reuse
#   operands better than 8; 8 halve the accumulators per thread where 4 would spill.
# - two stages: with tiles of this size the next load hides behind one tile of products; a third
#   stage costs registers (5 to 8 % more instructions) and shared memory (fewer programs).
# - dkv and dprefix keep two fp32 accumulators [keys, D], so keys are long and rows short.
# - fp32 without TF32 runs on FMA units (on MFMA on gfx9), and a thread holds its rows and its keys
#   whole, over all of D: 8 scores a thread at D 64 (4 in the backward), 2 at D 128 and 1 at D 256
#   spill 16 bytes at most on sm_80 and sm_90 and keep the unrolled products short, hence ptxas
#   quick.
Row = tuple[int, Tile, Tile]
Passes = dict[str, list[Row]]

# sm_80, 164 KiB: mma.sync with operands in registers.
AMPERE: Passes = {
    "forward": [
        (64, Tile(128, 64, 4, 2), Tile(32, 32, 4, 2)),
        (128, Tile(128, 64, 8, 2), Tile(32, 16, 8, 2)),
        (256, Tile(64, 32, 8, 2), Tile(16, 16, 8, 2)),
    ],
    "dq": [
        (64, Tile(128, 32, 4, 2), Tile(32, 32, 8, 2)),
        (128, Tile(128, 32, 8, 2), Tile(32, 16, 8, 2)),
        (256, Tile(64, 32, 8, 1), Tile(16, 16, 8, 1)),
    ],
    "dkv": [
        (64, Tile(32, 128, 8, 2), Tile(16, 32, 4, 2)),
        (128, Tile(64, 64, 8, 2), Tile(16, 32, 8, 2)),
        (256, Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
    ],
    "dprefix": [
        (64, Tile(64, 128, 8, 2), Tile(16, 32, 4, 2)),
        (128, Tile(32, 128, 8, 2), Tile(16, 32, 8, 2)),
        (256, Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
    ],
}
# sm_86, sm_89, sm_12x: the same instructions, 99 KiB. Ampere's tiles fit up to a head block of 128
# (82 KiB at most) because two stages are enough; 256 takes one stage and shorter tiles.
AMPERE_SMALL: Passes = {
    step: [
        *rows[:2],
        (256, rows[2][1]._replace(rows=32, keys=32, stages=1), rows[2][2]._replace(stages=1)),
    ]
    for step, rows in AMPERE.items()
}
# Ptxas for sm_12x spills at Ampere's dprefix tiles; these are the next smaller. Triton 3.9 spills 8
# bytes at its forward tile for D 64; twice the warps cost 9 % more instructions.
AMPERE_SMALL["forward"][0] = (64, Tile(128, 64, 8, 2), AMPERE["forward"][0][2])
AMPERE_SMALL["dprefix"][:2] = [
    (64, Tile(32, 128, 8, 2), AMPERE["dprefix"][0][2]),
    (128, Tile(64, 64, 8, 2), AMPERE["dprefix"][1][2]),
]
# sm_90, 227 KiB: wgmma reads operands from shared memory and works on 64 rows per 4 warps, which
# leaves registers for tiles twice as long. Not in the backward at D 256, where 64 rows spill: 32
# rows and keys run on mma.sync.
HOPPER: Passes = {
    "forward": [
        (64, Tile(128, 128, 8, 2), AMPERE["forward"][0][2]),
        (128, Tile(128, 128, 8, 3), AMPERE["forward"][1][2]),
        (256, Tile(128, 64, 8, 2), AMPERE["forward"][2][2]),
    ],
    "dq": [
        (64, Tile(128, 64, 8, 2), AMPERE["dq"][0][2]),
        (128, Tile(128, 64, 8, 2), AMPERE["dq"][1][2]),
        (256, Tile(32, 32, 8, 1), AMPERE["dq"][2][2]),
    ],
    "dkv": [
        (64, Tile(64, 64, 4, 2), AMPERE["dkv"][0][2]),
        (128, Tile(32, 128, 8, 2), AMPERE["dkv"][1][2]),
        AMPERE["dkv"][2],
    ],
    "dprefix": [
        # At 128 rows and 64 keys of D 64 ptxas serialises the tensor cores; at D 128 Triton 3.9
        # spills 64 bytes with this tile, and what it does not spill costs 40 % more instructions.
        (64, Tile(64, 128, 8, 2), AMPERE["dprefix"][0][2]),
        (
            128,
            Tile(32, 128, 8, 2) if TRITON >= (3, 9) else Tile(64, 128, 8, 2),
            AMPERE["dprefix"][1][2],
        ),
        AMPERE["dprefix"][2],
    ],
}
# sm_100: accumulators live in tensor memory, so registers are no limit for short keys; the tiles
# are Hopper's without its longest forward and dq tiles.
BLACKWELL: Passes = {
    **HOPPER,
    "forward": [
        (64, Tile(128, 128, 8, 2), AMPERE["forward"][0][2]),
        (128, Tile(128, 64, 8, 2), AMPERE["forward"][1][2]),
        (256, Tile(64, 32, 8, 2), AMPERE["forward"][2][2]),
    ],
    "dq": [
        HOPPER["dq"][0],
        (128, Tile(128, 32, 8, 2), AMPERE["dq"][1][2]),
        (256, Tile(64, 32, 8, 1), AMPERE["dq"][2][2]),
    ],
    "dkv": [*HOPPER["dkv"][:2], (256, Tile(32, 64, 8, 1), AMPERE["dkv"][2][2])],
    "dprefix": [
        HOPPER["dprefix"][0],
        (128, Tile(64, 128, 8, 2), AMPERE["dprefix"][1][2]),
        (256, Tile(32, 64, 8, 1), AMPERE["dprefix"][2][2]),
    ],
}
# gfx9: waves of 64 and 64 KiB of LDS; loads go through registers, so one stage.
CDNA: Passes = {
    "forward": [
        (64, Tile(128, 64, 4, 1), Tile(64, 32, 4, 1)),
        (128, Tile(128, 32, 8, 1), Tile(32, 32, 4, 1)),
        (256, Tile(64, 32, 8, 1), Tile(32, 16, 4, 1)),
    ],
    "dq": [
        (64, Tile(128, 32, 4, 1), Tile(64, 32, 4, 1)),
        (128, Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        (256, Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),  # 409 of 512 registers; 8 warps spill
    ],
    "dkv": [
        (64, Tile(32, 128, 8, 1), Tile(32, 32, 4, 1)),
        (128, Tile(16, 64, 4, 1), Tile(16, 32, 4, 1)),
        (256, Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    ],
    "dprefix": [
        (64, Tile(32, 128, 8, 1), Tile(32, 32, 4, 1)),
        (128, Tile(16, 64, 4, 1), Tile(16, 32, 4, 1)),
        (256, Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    ],
}
# gfx10 to gfx12: waves of 32, and WMMA keeps each operand twice per wave, hence the shortest tiles
# of all, and `gradients_in_one_pass`. fp32 products are FMA whose operands the compiler loads all
# at once: one score a thread up to D 128, half of one where that spills. From D 128 on the
# backward, and at D 256 everything, spills all the same (0.2 to 2 KiB, with larger tiles more).
RDNA: Passes = {
    "forward": [
        (64, Tile(64, 64, 8, 1), Tile(16, 16, 8, 1)),
        (128, Tile(64, 16, 8, 1), Tile(16, 16, 8, 1)),
        (256, Tile(32, 16, 8, 1), Tile(16, 16, 16, 1)),
    ],
    "dq": [
        (64, Tile(64, 32, 8, 1), Tile(16, 16, 8, 1)),
        (128, Tile(16, 16, 8, 1), Tile(16, 16, 16, 1)),
        (256, Tile(32, 16, 8, 1), Tile(16, 16, 16, 1)),
    ],
    "dkv": [
        (64, Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        (128, Tile(16, 32, 8, 1), Tile(16, 16, 16, 1)),
        (256, Tile(16, 16, 8, 1), Tile(16, 16, 16, 1)),
    ],
    "dprefix": [
        (64, Tile(16, 64, 8, 1), Tile(16, 16, 8, 1)),
        (128, Tile(16, 32, 8, 1), Tile(16, 16, 16, 1)),
        (256, Tile(16, 16, 8, 1), Tile(16, 16, 16, 1)),
    ],
}
# Small enough that small problems have whole, partial and several tiles.
INTERPRETER: Passes = {step: [(256, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))] for step in AMPERE}
TABLE: dict[str, Passes] = {
    "ampere": AMPERE,
    "ampere-small": AMPERE_SMALL,
    "hopper": HOPPER,
    "blackwell": BLACKWELL,
    "cdna": CDNA,
    "rdna": RDNA,
    "interpreter": INTERPRETER,
}

# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {
    "ampere": 166_912,
    "ampere-small": 101_376,
    "hopper": 232_448,
    "blackwell": 232_448,
    "cdna": 65_536,
    "rdna": 65_536,
    "interpreter": 1 << 31,
}


def family_of_capability(major: int, minor: int) -> str:
    """The family of an NVIDIA device."""
    if major == 9:
        return "hopper"
    if major == 10:
        return "blackwell"
    # sm_80 and sm_87 have 164 KiB of shared memory; Turing, sm_86, sm_89 and sm_12x 100 or less.
    return "ampere" if (major, minor) in ((8, 0), (8, 7)) else "ampere-small"


def family_of_amd(arch: str) -> str:
    """The family of an AMD device: gfx9 has MFMA and waves of 64, the others WMMA and 32."""
    return "cdna" if arch.startswith("gfx9") else "rdna"


def block_size(head_size: int) -> int:
    """The power of two, 16 at least, that holds a head: the shape of a tensor-core operand."""
    return max(16, triton.next_power_of_2(head_size))


def row_name(step: str, largest: int, dtype: torch.dtype) -> str:
    """A tile's place in the tables: pass, largest block of the head size, 16 or 32 bits."""
    return f"{step} {largest} {32 if dtype == torch.float32 else 16}"


def row(step: str, family: str, head_size: int, dtype: torch.dtype) -> tuple[str, Tile]:
    """The tables' tile for a pass, and its :func:`row_name`.

    Raises:
        ValueError: no row holds the head size.
    """
    for largest, half, single in TABLE[family][step]:
        if block_size(head_size) <= largest:
            tile = single if dtype == torch.float32 else half
            return row_name(step, largest, dtype), tile
    raise ValueError(f"head size {head_size} exceeds {MAX_HEAD_SIZE}")


def choose(step: str, problem: Problem, rows: int) -> Tile:
    """The tile for a pass ("forward", "dq", "dkv", "dprefix") over runs of `rows` query rows.

    Few rows (decode) shrink the tile to the next power of two that holds them; not where `rows`
    counts the whole batch and it must not matter (another tile may compile to other instructions).
    What needs registers of its own in every score (an additive tile, dropout's random words) takes
    half the table's rows: with all of them ptxas spills, and gives up on dprefix with a bias
    altogether. Everything else takes the tile that was tuned on the device, if one was.
    """
    bias, family = problem.options.prefix_bias, problem.target.family
    heavy = bool(
        problem.options.attn_mask is not None
        or problem.options.dropout_p
        or (bias is not None and bias.dim() == 3)
    )
    head_size = max(problem.query.shape[-1], problem.value.shape[-1])
    name, tile = row(step, family, head_size, problem.query.dtype)
    if not heavy:
        tile = problem.target.tuned.get(name, tile)
    elif family != "interpreter":
        tile = tile._replace(rows=max(16, tile.rows // 2))
    if problem.options.batch_invariant and problem.options.cu_seqlens is not None:
        return tile
    return tile._replace(rows=min(tile.rows, max(16, triton.next_power_of_2(rows))))


def gradients_in_one_pass(
    problem: Problem, first: Tensor | None, second: Tensor | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Gradients of keys and of values, in one pass or in two.

    RDNA's 256 registers hold one accumulator [keys, D] from D 128 on, not two. A second pass costs
    the scores again, spilling costs more.
    """
    block = block_size(max(problem.query.shape[-1], problem.value.shape[-1]))
    apart = problem.target.family == "rdna" and block >= 128
    if apart and first is not None and second is not None:
        return [(first, None), (None, second)]
    return [(first, second)]


def unmasked_loop(step: str, problem: Problem) -> bool:
    """Whether tiles that need no test of bounds, causality or window get a loop of their own.

    Not where FMA units do the products: they are unrolled, the tests cost next to nothing beside
    them, and half the loops compile in half the time. Not where RDNA spills around the loops.
    """
    family, dtype = problem.target.family, problem.query.dtype
    fma = dtype == torch.float32 and dot_precision(dtype) == "ieee"
    if fma and family not in ("cdna", "interpreter"):
        return False
    return not (family == "rdna" and step in ("dq", "dkv"))


def repeat_last_row(problem: Problem) -> bool:
    """Whether query rows past the end repeat the last one, so that loads need no mask.

    With Triton 3.6 masked loads of dK's rows spill 350 bytes on RDNA, whatever the tile.
    """
    return problem.target.family == "rdna"


def splits(step_tiles: int, row_tiles: int, target: Target) -> int:
    """Into how many parts a reduction over `row_tiles` is cut when `step_tiles` programs exist.

    Two programs per multiprocessor are enough to fill a device, so the parts never exceed
    ceil(2 * multiprocessors / step_tiles): a bound that knows neither the batch nor the lengths.
    """
    return max(1, min(row_tiles, triton.cdiv(2 * target.multiprocessors, step_tiles)))


def dot_precision(dtype: torch.dtype) -> str:
    """IEEE products for fp32 unless the user allows TF32; irrelevant to 16-bit types."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"
