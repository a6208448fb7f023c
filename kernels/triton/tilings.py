"""The tile table, by target family and pass, and how a pass chooses its tile and its loops."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .integers import cdiv, next_power_of_2
from .target import Target, Tile

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
PASSES = ("forward", "dq", "dkv", "dprefix", "decode")


class Work(NamedTuple):
    """What the tile of a call depends on, besides its pass and its number of query rows.

    Attributes:
        target: where the kernel runs.
        head_size: the larger one of D and Dv.
        dtype: the operands' dtype.
        heavy: every score needs more registers: for an attention mask, for a bias of each score,
            or for the random words of dropout.
        full_tile: the tile keeps its rows even if the call has fewer. Batch-invariant calls need
            this if their number of rows depends on the batch, because another tile may compile to
            other instructions.
    """

    target: Target
    head_size: int
    dtype: torch.dtype
    heavy: bool = False
    full_tile: bool = False


# The rows of a pass are (largest block of the head size, tile for 16-bit types, tile for fp32). The
# first row whose block holds the head is used. A tile's `rows` are query rows, its `keys` are keys
# of the prefix or of the sequence.
#
# The reasons are static: registers, spills and instructions per matrix FLOP, which `offline` reads
# off the machine code. They have not been confirmed by timings.
# - A larger tile needs fewer instructions per FLOP, until it needs more than 255 registers and
#   spills. 4 warps reuse operands better than 8. With 8 a thread holds half the accumulators, so 8
#   are used where 4 would spill.
# - Two stages are enough for tiles of this size: one tile of products hides the next load. A third
#   stage costs registers (5 to 8 % more instructions) and shared memory (fewer programs).
# - dkv and dprefix keep two fp32 accumulators [keys, D], so their tiles have many keys, few rows.
# - fp32 without TF32 runs on FMA units (on gfx9 on MFMA). A thread holds its rows and keys over all
#   of D. It computes 8 scores at D 64 (4 in the backward), 2 at D 128 and 1 at D 256: this spills
#   16 bytes at most on sm_80 and sm_90. It also keeps the unrolled products short, so that ptxas is
#   quick.
#
# The decode pass has reasons of its own. Its `rows` are the most that a prefix tile has. The
# sequence tiles of the same launch have at least 16 rows, and the same keys, warps and stages.
# - 64 rows: wgmma and tcgen05 need as many. 128 would double the registers of the sequence
#   programs, because they belong to the same kernel. They read most of the bytes, and more of them
#   fit on a multiprocessor if they need fewer registers.
# - 64 keys: a tile of K and V then has 16 to 32 KiB. With two programs per multiprocessor this is
#   enough in flight to hide the memory's latency.
# - 4 warps: 16 rows are the height of one MMA, so more warps would only split the keys.
# - fp32 without TF32 runs on FMA units with all operands in registers, so its tiles are small.
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
    # Three stages cost no registers (cp.async) and hide more latency than two.
    "decode": [
        (64, Tile(64, 64, 4, 3), Tile(32, 32, 4, 2)),
        (128, Tile(64, 64, 4, 2), Tile(16, 32, 4, 2)),
        (256, Tile(32, 32, 4, 2), Tile(16, 16, 4, 2)),
    ],
}
# sm_86, sm_89, sm_12x: the same instructions, 99 KiB. Ampere's tiles fit up to a head block of 128
# (82 KiB at most), because they have two stages. A block of 256 needs one stage and smaller tiles.
AMPERE_SMALL: Passes = {
    name: [
        *rows[:2],
        (256, rows[2][1]._replace(rows=32, keys=32, stages=1), rows[2][2]._replace(stages=1)),
    ]
    for name, rows in AMPERE.items()
}
# On sm_12x ptxas spills at Ampere's dprefix tiles; these are the next smaller ones. Triton 3.9
# spills 8 bytes at Ampere's forward tile for D 64; twice the warps cost 9 % more instructions.
AMPERE_SMALL["forward"][0] = (64, Tile(128, 64, 8, 2), AMPERE["forward"][0][2])
AMPERE_SMALL["dprefix"][:2] = [
    (64, Tile(32, 128, 8, 2), AMPERE["dprefix"][0][2]),
    (128, Tile(64, 64, 8, 2), AMPERE["dprefix"][1][2]),
]
# Decode: with 32 keys from D 128 on, two programs fit on a multiprocessor (37 KiB and 167
# registers). From sm_90 on, ptxas spills at Ampere's fp32 tile for D 128.
AMPERE_SMALL["decode"][:2] = [
    (64, Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)),
    (128, Tile(64, 32, 4, 2), Tile(16, 16, 4, 2)),
]
# sm_90, 227 KiB: wgmma reads operands from shared memory and works on 64 rows per 4 warps. This
# leaves registers for tiles twice as long. The backward at D 256 is an exception: 64 rows spill
# there, so it has 32 rows and keys, which run on mma.sync.
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
        # With 128 rows and 64 keys of D 64 ptxas serialises the tensor cores. At D 128 Triton 3.9
        # spills 64 bytes with the tile for older versions; with the other tile it needs 40 % more
        # instructions.
        (64, Tile(64, 128, 8, 2), AMPERE["dprefix"][0][2]),
        (
            128,
            Tile(32, 128, 8, 2) if TRITON >= (3, 9) else Tile(64, 128, 8, 2),
            AMPERE["dprefix"][1][2],
        ),
        AMPERE["dprefix"][2],
    ],
    # There is room for a third stage at D 128.
    "decode": [
        (64, Tile(64, 64, 4, 3), AMPERE["decode"][0][2]),
        (128, Tile(64, 64, 4, 3), AMPERE_SMALL["decode"][1][2]),
        (256, Tile(64, 32, 4, 2), AMPERE["decode"][2][2]),
    ],
}
# sm_100: accumulators live in tensor memory, so registers do not limit tiles with few keys. The
# tiles are Hopper's, but for its longest forward and dq tiles.
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
# gfx9: waves of 64 and 64 KiB of LDS. Loads go through registers, so there is one stage. Triton's
# options for AMD stay as they are. In the forward at D 64 on gfx942 (207 registers) waves_per_eu 1
# and 2 change nothing, and 3 and 4 spill 116 and 208 bytes. With matrix_instr_nonkdim 16 the loop
# over the prefix needs 12 % more instructions, with kpack 2 0.2 % fewer; 32 is the default.
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
    "decode": [
        (64, Tile(64, 64, 4, 1), Tile(32, 32, 4, 1)),
        (128, Tile(64, 32, 4, 1), Tile(16, 32, 4, 1)),
        (256, Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    ],
}
# gfx10 to gfx12: waves of 32. WMMA keeps each operand twice per wave, so these tiles are the
# smallest of all, and gradients may need two passes (`gradients_in_one_pass`). fp32 products are
# FMA, and the compiler loads all their operands at once. So a thread computes one score up to D
# 128, and half a score where that spills. From D 128 on the backward spills all the same, and so
# does everything at D 256 (0.2 to 2 KiB; larger tiles spill more).
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
    # fp32: a thread computes one score. At D 256 this spills half a KiB all the same.
    "decode": [
        (64, Tile(32, 32, 4, 1), Tile(16, 16, 8, 1)),
        (128, Tile(32, 16, 4, 1), Tile(16, 16, 8, 1)),
        (256, Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
    ],
}
# These are so small that the small problems of tests have whole tiles, partial ones, and several.
INTERPRETER: Passes = {name: [(256, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))] for name in AMPERE}
INTERPRETER["decode"] = [(256, Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))]
TILES: dict[str, Passes] = {
    "ampere": AMPERE,
    "ampere-small": AMPERE_SMALL,
    "hopper": HOPPER,
    "blackwell": BLACKWELL,
    "cdna": CDNA,
    "rdna": RDNA,
    "interpreter": INTERPRETER,
}


def block_size(head_size: int) -> int:
    """The power of two, 16 at least, that holds a head: the shape of a tensor-core operand."""
    return max(16, next_power_of_2(head_size))


def row_name(pass_name: str, largest: int, dtype: torch.dtype) -> str:
    """The name of a tile's place in the table: pass, largest block of the head size, bits."""
    return f"{pass_name} {largest} {32 if dtype == torch.float32 else 16}"


def row(pass_name: str, family: str, head_size: int, dtype: torch.dtype) -> tuple[str, Tile]:
    """The :func:`row_name` of a pass, and the table's tile there.

    Raises:
        ValueError: no row holds the head size.
    """
    for largest, half, single in TILES[family][pass_name]:
        if block_size(head_size) <= largest:
            tile = single if dtype == torch.float32 else half
            return row_name(pass_name, largest, dtype), tile
    raise ValueError(f"head size {head_size} exceeds {MAX_HEAD_SIZE}")


def choose_tile(
    pass_name: str, work: Work, query_rows: int, prefix_length: int | None = None
) -> Tile:
    """The tile for one of PASSES over runs of `query_rows` rows.

    Heavy work gets half of the table's rows. With all of them ptxas spills, and it does not
    compile dprefix with a bias at all. Other work gets the tile that was tuned on the device, if
    there is one. If there are fewer query rows than the tile has, the tile shrinks to the next
    power of two that holds them. With a `prefix_length` it shrinks to that too: see
    :func:`fit_prefix`.
    """
    target = work.target
    name, tile = row(pass_name, target.family, work.head_size, work.dtype)
    if not work.heavy:
        tile = target.tuned.get(name, tile)
    elif target.family != "interpreter":
        tile = tile._replace(rows=max(16, tile.rows // 2))
    if prefix_length is not None:
        tile = fit_prefix(tile, work, prefix_length)
    if work.full_tile:
        return tile
    return tile._replace(rows=min(tile.rows, max(16, next_power_of_2(query_rows))))


def fit_prefix(tile: Tile, work: Work, length: int) -> Tile:
    """A dprefix tile with no more keys than a prefix of this length needs.

    The table's tile has up to 128 keys. A prefix of 20 to 32 tokens needs a quarter of its
    products, and the tile that has 32 keys a third to a half of its instructions (static). It has
    fewer warps, 4 at least (D 256 spills with so few), and up to 64 rows where registers allow it.

    On sm_90 fewer than 64 keys run on mma.sync. There is no tile of 64 keys: at D 64 ptxas
    serialises its products or needs as many instructions as for 128 keys, at D 128 it spills.
    """
    family = work.target.family
    keys = max(16, next_power_of_2(length))
    if keys >= tile.keys or (family == "hopper" and keys > 32):
        return tile
    rows = tile.rows
    if keys * 4 <= tile.keys and not work.heavy and family != "rdna":
        rows = max(rows, min(2 * rows, 64))
    warps = tile.warps
    if block_size(work.head_size) <= 128:
        warps = min(warps, max(4, warps * keys // tile.keys))
    return tile._replace(rows=rows, keys=keys, warps=warps)


def gradients_in_one_pass(
    work: Work, first: Tensor | None, second: Tensor | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The gradients of keys and of values that each pass computes: both in one pass, or two passes.

    From D 128 on RDNA's 256 registers hold one accumulator [keys, D], but not two. A second pass
    computes the scores again; spilling would cost more.
    """
    apart = work.target.family == "rdna" and block_size(work.head_size) >= 128
    if apart and first is not None and second is not None:
        return [(first, None), (None, second)]
    return [(first, second)]


def unmasked_loop(pass_name: str, work: Work) -> bool:
    """Whether tiles that need no test of bounds, causality or window get a loop of their own.

    They get none if FMA units compute the products. These are unrolled, so the tests cost next to
    nothing beside them, and half the loops compile in half the time. They get none either in the
    passes where RDNA would spill around the loops.
    """
    family, dtype = work.target.family, work.dtype
    fma = dtype == torch.float32 and dot_precision(dtype) == "ieee"
    if fma and family not in ("cdna", "interpreter"):
        return False
    return not (family == "rdna" and pass_name in ("dq", "dkv"))


def repeat_last_row(work: Work) -> bool:
    """Whether query rows past the end repeat the last row, so that their loads need no mask.

    On RDNA, Triton 3.6 spills 350 bytes for masked loads of the rows for dK, whatever the tile.
    """
    return work.target.family == "rdna"


def splits(programs: int, row_tiles: int, target: Target) -> int:
    """How many programs share each reduction over `row_tiles`, if there are `programs` reductions.

    Two programs per multiprocessor are enough to fill a device. So there are never more parts than
    ceil(2 * multiprocessors / programs). This bound depends on neither the batch nor the lengths.
    """
    return max(1, min(row_tiles, cdiv(2 * target.multiprocessors, programs)))


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of products: IEEE for fp32 unless the user allows TF32.

    For 16-bit types it has no effect.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"
