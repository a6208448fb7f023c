"""Loops and matrix FLOP from snippets of machine code, occupancy and bytes from small sums."""

from __future__ import annotations

import pytest
import torch

from fastprefix.kernels import launch, launch_forward, tilings
from fastprefix.kernels.offline import machine_code, occupancy, traffic
from fastprefix.options import Options


def sass(*lines: str) -> list[machine_code.Instruction]:
    """Instructions 16 bytes apart, as cuobjdump prints them."""
    text = ["\tFunction : kernel", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, line in enumerate(lines):
        text.append(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x000078e000ff */")
        text.append("                                                     /* 0x000fe200078e00ff */")
    return machine_code.parse_sass("\n".join(text))


HMMA = "HMMA.16816.F32.BF16 R4, R8.reuse, R12, R4"


def test_a_loop_and_its_cost():
    code = sass(
        "MOV R1, c[0x0][0x28]",
        "@P0 BRA 0x70",
        HMMA,  # 0x20: the loop
        HMMA,
        "LDL R3, [R1+0x8]",
        "ISETP.GE.AND P0, PT, R0, R2, PT",
        "@!P0 BRA 0x20",
        "EXIT",
    )
    (loop,) = machine_code.hot_loops(code, warps=4)
    assert (loop.start, loop.instructions, loop.conditional) == (0x20, 5, 0)
    assert loop.shapes == {"HMMA.16816": 2}
    assert (loop.matrix_instructions, loop.spill_instructions) == (2, 1)
    assert loop.flops == 4 * 2 * 2 * 16 * 8 * 16
    assert loop.per_kiloflop == pytest.approx(4 * 5 * 1000 / loop.flops)


def test_waits_for_asynchronous_products_are_counted():
    HGMMA = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
    code = sass(
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        HGMMA,  # 0x10: the loop
        HGMMA,
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "@P0 BRA 0x10",
        "EXIT",
    )
    (loop,) = machine_code.hot_loops(code, warps=4)
    assert (loop.matrix_instructions, loop.matrix_waits) == (2, 1)


def test_only_innermost_loops_with_matrix_instructions_count():
    code = sass(
        "NOP",  # 0x00: outer loop
        HMMA,  # 0x10: inner loop
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3",  # 0x20: waits for a barrier
        "@!P1 BRA 0x20",
        "@P0 BRA 0x10",
        "@P2 BRA 0x0",
        "FADD R0, R0, R1",  # 0x60: a loop without any
        "@P3 BRA 0x60",
        "EXIT",
    )
    (loop,) = machine_code.hot_loops(code, warps=1)
    assert (loop.start, loop.instructions) == (0x10, 4)


def test_code_moved_out_of_a_loop_belongs_to_it_and_makes_no_loop():
    code = sass(
        "NOP",
        HMMA,  # 0x10: the loop
        "@P1 BRA 0x60",  # rarely
        "FADD R0, R0, R1",  # 0x30
        "@P0 BRA 0x10",
        "EXIT",
        "FMUL R0, R0, R1",  # 0x60: comes back by a jump backwards
        "BRA 0x30",
    )
    (loop,) = machine_code.hot_loops(code, warps=1)
    assert (loop.start, loop.instructions, loop.conditional) == (0x10, 4, 2)


def test_matrix_instructions_of_one_warp_for_all_make_the_whole_loop_count():
    code = sass(
        "UMOV UR49, 0x8100490",
        "BRA.U UP0, 0x40",  # 0x10: the loop; all warps but one skip
        "UMOV UR25, 0x8210490",
        "UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR13], tmem[UR24], idesc[UR25], !UPT",
        "@P0 BRA 0x10",
        "EXIT",
    )
    (loop,) = machine_code.hot_loops(code, warps=8)
    assert loop.shapes == {"UTCHMMA.128x128x16": 1}
    assert loop.flops == 2 * 128 * 128 * 16
    assert (loop.instructions, loop.conditional) == (4, 0)


def test_a_warp_group_shares_its_instructions():
    code = sass(
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT, gsb0",
        "@P0 BRA 0x0",
        "EXIT",
    )
    (loop,) = machine_code.hot_loops(code, warps=8)
    assert loop.flops == 2 * (2 * 64 * 128 * 16)


def test_amd_labels_and_branches():
    code = machine_code.parse_amdgcn(
        "kernel:\n"
        "\ts_load_dwordx4 s[0:3], s[4:5], 0x0\n"
        ".LBB0_1:                                ; =>This Inner Loop Header: Depth=1\n"
        "\t.loc\t1 30 32\n"
        "\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15] ; comment\n"
        "\tv_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]\n"
        "\tscratch_load_b32 v1, off, off\n"
        "\ts_cbranch_scc1 .LBB0_1\n"
        "; %bb.2:\n"
        "\ts_endpgm\n"
        ".Lfunc_end0:\n"
        "\tv_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]\n"
    )
    assert len(code) == 6
    (loop,) = machine_code.hot_loops(code, warps=2)
    assert loop.shapes == {"mfma.32x32x8": 1, "wmma.16x16x16": 1}
    assert loop.flops == 2 * (2 * 32 * 32 * 8 + 2 * 16 * 16 * 16)
    assert (loop.instructions, loop.spill_instructions) == (4, 1)


def test_an_unknown_matrix_instruction_is_an_error():
    code = sass("HMMA.99999.F32 R4, R8, R12, R4", "@P0 BRA 0x0", "EXIT")
    with pytest.raises(ValueError, match=r"unknown matrix instruction: HMMA\.99999"):
        machine_code.hot_loops(code, warps=1)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks", "bound"),
    [
        ("cuda:80", 255, 0, 4, 2, "registers"),  # 256 x 128 of 65,536 registers each
        ("cuda:80", 128, 49_152, 4, 3, "shared memory"),  # 164 KiB in parts of 49 KiB
        ("cuda:80", 32, 0, 32, 2, "warps, registers"),
        ("cuda:86", 16, 0, 1, 16, "programs"),
        ("cuda:90", 168, 0, 8, 1, "registers"),
        ("hip:gfx942", 128, 65_536, 4, 1, "shared memory"),
        ("hip:gfx942", 129, 0, 4, 3, "registers"),
        ("hip:gfx1100", 256, 0, 8, 2, "registers"),
    ],
)
def test_occupancy(target, registers, shared, warps, blocks, bound):
    found = occupancy.occupancy(
        occupancy.LIMITS[target], registers=registers, shared_bytes=shared, warps=warps
    )
    assert (found.blocks, found.bound_by) == (blocks, bound)


def test_tensor_memory_bounds_occupancy():
    found = occupancy.occupancy(
        occupancy.LIMITS["cuda:100"],
        registers=64, shared_bytes=0, warps=4, tensor_columns=256,
    )  # fmt: skip
    assert (found.blocks, found.bound_by) == (2, "tensor memory")


class Kernel:
    """Stands for a Triton kernel: the model looks at nothing but its name."""

    def __init__(self, name: str) -> None:
        self.__name__ = name


def step(name, grid, tile, causal, **shapes):
    tensors = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()}
    return launch.Launch(Kernel(name), grid, tensors, {"CAUSAL": causal}, tile)


def test_bytes_of_a_forward():
    # 2 sequences, 2 KV heads with 2 query heads each: 64 packed rows in 2 tiles of 32.
    shapes = {"q": (2, 4, 32, 16), "k": (2, 2, 32, 16), "pk": (2, 8, 16), "out": (2, 4, 32, 16)}
    forward = step("prefix_attn_fwd_kernel", (8,), tilings.Tile(32, 16, 4, 1), True, **shapes)
    found = traffic.traffic(forward)
    assert found.operands["q"] == (8192, 8192)
    assert found.operands["pk"] == (4 * 512, 512)  # 4 programs read each head's prefix
    assert found.operands["k"] == (2 * 4096, 4096)  # each tile is one head: it sees all keys
    assert (found.requested, found.least) == (8192 * 2 + 2048 + 8192, 8192 * 2 + 512 + 4096)


def test_causal_tiles_read_fewer_keys():
    shapes = {"q": (1, 1, 64, 16), "k": (1, 1, 64, 16), "pk": (1, 0, 16)}
    forward = step("prefix_attn_fwd_kernel", (2,), tilings.Tile(32, 16, 4, 1), True, **shapes)
    # 32 keys for the first tile and 64 for the second.
    assert traffic.traffic(forward).operands["k"] == (96 * 32, 64 * 32)


def test_partial_sums_are_no_operand():
    shapes = {"q": (1, 1, 64, 16), "pk": (1, 32, 16), "dpk": (3, 1, 32, 16)}
    sums = step("prefix_attn_bwd_dprefix_kernel", (6,), tilings.Tile(16, 16, 4, 1), False, **shapes)
    found = traffic.traffic(sums)
    assert found.operands["dpk"] == (3 * 1024, 0)
    assert found.operands["q"] == (2 * 2048, 2048)  # two tiles of prefix positions
    assert found.operands["pk"] == (3 * 1024, 1024)


def test_packed_prefixes_and_sequences_are_read_in_part():
    shapes = {
        "q": (1, 1, 64, 16),
        "k": (1, 1, 64, 16),
        "pk": (1, 32, 16),
        "cu": (5,),
        "starts": (3,),
    }
    forward = step("prefix_attn_fwd_kernel", (8,), tilings.Tile(8, 16, 4, 1), True, **shapes)
    found = traffic.traffic(forward)
    assert found.operands["pk"] == (8 // 2 * 1024, 1024)
    assert found.operands["k"] == (8 // 4 * 2048, 2048)


def decoding(**options):
    """Both launches of a step of 8 sequences, 2 KV heads of 4 query heads each."""
    q, k = (torch.empty(8, heads, 1 if heads == 8 else 1024, 64, device="meta") for heads in (8, 2))
    p = torch.empty(2, 2048, 64, device="meta")
    with launch.collected(tilings.Target("hopper", 132)) as launches:
        launch_forward(
            *(x.bfloat16() for x in (q, k, k, p, p)), Options(is_causal=True, scale=1.0, **options)
        )
    if "prefix_lengths" in options:
        assert launches.pop(0).kernel.__name__ == "prefix_attn_tables_kernel"
    assert [step.kernel.__name__[12:] for step in launches] == [
        "decode_kernel",
        "decode_merge_kernel",
    ]
    return [traffic.traffic(step) for step in launches]


def test_decoding_reads_the_prefix_once_for_all_sequences():
    attend, merge = decoding()
    for name in ("pk", "pv"):
        assert attend.operands[name] == (2 * 2048 * 64 * 2,) * 2  # 32 rows of a KV head: one tile
    for name in ("k", "v"):
        assert attend.operands[name] == (8 * 2 * 1024 * 64 * 2,) * 2
    requested, least = attend.operands["q"]
    assert least == 8 * 8 * 64 * 2
    assert requested % least == 0 < requested - least  # once for each split
    # what one launch leaves is what the other takes, and no operand of the problem
    assert attend.operands["part_out"] == merge.operands["part_out"]
    assert merge.operands["part_out"][1] == 0 < merge.operands["part_out"][0]
    assert merge.operands["out"] == (8 * 8 * 64 * 2,) * 2


def test_a_window_and_padding_of_decoding():
    padding = torch.ones(8, 1024, dtype=torch.bool, device="meta")
    attend, _ = decoding(sliding_window=256, key_padding_mask=padding)
    assert attend.operands["k"][0] == attend.operands["k"][1] // 4
    assert attend.operands["pad"] == (2 * 2 * 8 * 256, 8 * 1024)


def test_decoding_of_packed_prefixes_has_no_model():
    index = torch.zeros(8, dtype=torch.int32, device="meta")
    lengths = torch.zeros(2, dtype=torch.int32, device="meta")
    assert decoding(prefix_index=index, prefix_lengths=lengths) == [None, None]


def test_a_kernel_without_a_model_has_no_bytes():
    assert traffic.traffic(step("other", (1,), tilings.Tile(1, 1, 1, 1), False)) is None
