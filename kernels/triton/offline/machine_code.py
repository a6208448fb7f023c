"""What each loop of a kernel does, read from the disassembly of its machine code.

Nothing here is a timing. A loop is judged by the warp-instructions that it issues per FLOP of the
matrix units. This figure compares code generation; it does not predict a run time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Matrix-unit instructions of each vendor, and accesses to spilled registers.
MATRIX = re.compile(r"(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b|v_(mfma|wmma|smfmac)_")
SPILL = re.compile(r"(LDL|STL)\b|scratch_(load|store)_")
# A wait for asynchronous matrix instructions (HGMMA, sm_90). If ptxas serialises them (its message
# C7515), there is a wait after each.
WAIT = re.compile(r"WARPGROUP\.DEPBAR\b")

_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;")
_SASS_END = re.compile(r"(EXIT|RET|BRX|BRXU|JMX|KILL)\b")
_SASS_JUMP = re.compile(r"(BRA|JMP)\b")
_AMD_LINE = re.compile(r"^\t([a-z]\w+)(?:\s+([^;]*))?")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a listing.

    Attributes:
        address: its byte address (NVIDIA) or its number (AMD).
        name: opcode with modifiers.
        operands: the rest of the line.
        target: the address that it jumps to, or None.
        ends: whether control never continues with the next instruction.
    """

    address: int
    name: str
    operands: str
    target: int | None = None
    ends: bool = False


@dataclass(frozen=True)
class Loop:
    """An innermost loop with matrix instructions, per iteration of the machine code.

    Attributes:
        start: address of its first instruction.
        instructions: instructions that a warp issues in every iteration. If the matrix
            instructions are conditional, all instructions of the loop (on sm_100 one warp issues
            them for all warps).
        conditional: the other instructions of the loop.
        matrix_instructions: how many of `instructions` feed the matrix units.
        spill_instructions: how many of them move spilled registers.
        matrix_waits: how many of them wait for HGMMA.
        shapes: number of matrix instructions by shape, {"HGMMA.64x128x16": 16}.
        flops: FLOP of the matrix instructions of all warps of the program in one iteration.
        per_kiloflop: warp-instructions per 1000 FLOP.
    """

    start: int
    instructions: int
    conditional: int
    matrix_instructions: int
    spill_instructions: int
    matrix_waits: int
    shapes: dict[str, int]
    flops: int
    per_kiloflop: float


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of the longest function in the output of `cuobjdump -sass`."""
    functions = re.split(r"^\s*Function\s*:", text, flags=re.MULTILINE)
    return max((_parse_sass_function(part) for part in functions), key=len)


def _parse_sass_function(text: str) -> list[Instruction]:
    found = []
    for line in text.splitlines():
        match = _SASS_LINE.match(line)
        if match is None:
            continue
        address, guard, name, operands = match.groups()
        target, ends = None, False
        # A condition is a guard, or an operand: BRA.U UP0, 0x170; BRA !P1, 0x40; BRA.DIV UR4, 0x80.
        always = guard in (None, "PT", "UPT") and re.match(r"!?U?P\d|UR\d", operands) is None
        if _SASS_JUMP.match(name):
            numbers = re.findall(r"\b0x([0-9a-f]+)\b", operands)
            target = int(numbers[-1], 16) if numbers else None
            ends = always
        elif _SASS_END.match(name):
            ends = always
        found.append(Instruction(int(address, 16), name, operands, target, ends))
    return found


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of the first function in AMD assembly text."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        label = _AMD_LABEL.match(line)
        if label is not None:
            labels[label.group(1)] = len(lines)
            continue
        match = _AMD_LINE.match(line)
        if match is not None:
            lines.append((match.group(1), (match.group(2) or "").strip()))
    found = []
    for address, (name, operands) in enumerate(lines):
        jumps = name.startswith(("s_branch", "s_cbranch"))
        found.append(
            Instruction(
                address, name, operands,
                labels.get(operands) if jumps else None,
                name in ("s_branch", "s_endpgm", "s_setpc_b64"),
            )
        )  # fmt: skip
    return found


def hot_loops(code: Sequence[Instruction], warps: int) -> list[Loop]:
    """The innermost loops with matrix instructions, by address.

    Args:
        code: the instructions of a kernel.
        warps: warps of a program.
    """
    blocks, successors = _flow(code)
    matrix = {b for b, (start, end) in enumerate(blocks) if any(map(is_matrix, code[start:end]))}
    dominators = _dominators(successors)
    bodies = _natural_loops(successors, dominators)
    with_matrix = {head: body for head, (body, _) in bodies.items() if body & matrix}
    found = []
    for head, body in with_matrix.items():
        if any(other < body for other in with_matrix.values()):
            continue
        latches = bodies[head][1]
        always = {b for b in body if all(b in dominators[latch] for latch in latches)}
        if not body & matrix <= always:
            always = body
        found.append(_loop(code, blocks, always, _length(blocks, body - always), warps))
    return sorted(found, key=lambda loop: loop.start)


def is_matrix(instruction: Instruction) -> bool:
    """Whether an instruction feeds the matrix units."""
    return MATRIX.match(instruction.name) is not None


def is_spill(instruction: Instruction) -> bool:
    """Whether an instruction moves a spilled register."""
    return SPILL.match(instruction.name) is not None


def matrix_shape(code: Sequence[Instruction], index: int) -> tuple[str, int, float]:
    """The name with the shape, the FLOP, and one warp's share of a matrix instruction.

    The share is 1 if a warp executes the instruction alone, and 1/4 if a group of 4 warps does. It
    is 0 if one warp issues the instruction for the whole program.

    Raises:
        ValueError: a matrix instruction that this function does not know.
    """
    name, operands = code[index].name, code[index].operands
    if match := re.match(r"HMMA\.(\d+)\b", name):
        sizes = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
        if match.group(1) in sizes:
            m, n, k = sizes[match.group(1)]
            return f"HMMA.{match.group(1)}", 2 * m * n * k, 1.0
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, match.groups())
        return f"HGMMA.{m}x{n}x{k}", 2 * m * n * k, 0.25
    if name.startswith("UTCHMMA"):
        # The shape is data: bits 17-22 of the instruction descriptor are N / 8, bits 24-28 M / 16,
        # bits 7-9 the type of A, 2 for TF32 (PTX ISA, tcgen05 instruction descriptor).
        descriptor = _immediate(code, index, re.findall(r"idesc\[(\w+)\]", operands)[0])
        m, n = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
        k = 8 if descriptor >> 7 & 7 == 2 else 16
        return f"UTCHMMA.{m}x{n}x{k}", 2 * m * n * k, 0.0
    if match := re.match(r"v_(mfma|wmma)_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_", name + "_"):
        kind, sizes_text = match.group(1), match.groups()[1:4]
        m, n, k = map(int, sizes_text)
        times = int(match.group(5) or 1)
        return f"{kind}.{m}x{n}x{k}", 2 * m * n * k * times, 1.0
    raise ValueError(f"unknown matrix instruction: {name} {operands}")


def _immediate(code: Sequence[Instruction], index: int, register: str) -> int:
    """The constant that a register holds at an instruction, from the last move before it."""
    for i in range(index - 1, -1, -1):
        if re.match(rf"{register}\b", code[i].operands):
            value = re.fullmatch(rf"{register}, 0x([0-9a-f]+)", code[i].operands)
            if value is not None and "MOV" in code[i].name:
                return int(value.group(1), 16)
            break
    raise ValueError(f"no constant in {register} at {code[index].address:#x}")


def _length(blocks: Sequence[tuple[int, int]], chosen: set[int]) -> int:
    """How many instructions the chosen blocks have."""
    return sum(blocks[b][1] - blocks[b][0] for b in chosen)


def _loop(
    code: Sequence[Instruction],
    blocks: Sequence[tuple[int, int]],
    always: set[int],
    conditional: int,
    warps: int,
) -> Loop:
    """The figures of the blocks that run in every iteration."""
    shapes: dict[str, int] = {}
    flops = 0.0
    spilled = waits = 0
    for start, end in (blocks[b] for b in sorted(always)):
        for i in range(start, end):
            spilled += is_spill(code[i])
            waits += WAIT.match(code[i].name) is not None
            if is_matrix(code[i]):
                name, work, share = matrix_shape(code, i)
                shapes[name] = shapes.get(name, 0) + 1
                flops += work * share * warps if share else work
    instructions = _length(blocks, always)
    return Loop(
        start=code[min(blocks[b][0] for b in always)].address,
        instructions=instructions,
        conditional=conditional,
        matrix_instructions=sum(shapes.values()),
        spill_instructions=spilled,
        matrix_waits=waits,
        shapes=shapes,
        flops=round(flops),
        per_kiloflop=instructions * warps * 1000 / flops,
    )


def _flow(code: Sequence[Instruction]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The basic blocks as ranges of indices, and the successors of each block."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.target in index:
            leaders |= {index[instruction.target], i + 1}
        elif instruction.ends:
            leaders.add(i + 1)
    starts = sorted(i for i in leaders if i < len(code))
    blocks = list(zip(starts, [*starts[1:], len(code)], strict=True))
    block_at = {start: b for b, (start, _) in enumerate(blocks)}
    successors = []
    for b, (_, end) in enumerate(blocks):
        last = code[end - 1]
        following = [] if last.ends or b + 1 == len(blocks) else [b + 1]
        if last.target in index:
            following.append(block_at[index[last.target]])
        successors.append(following)
    return blocks, successors


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """For each block, the blocks that lie on every path to it from the first."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for b, following in enumerate(successors):
        for s in following:
            predecessors[s].append(b)
    everything = set(range(len(successors)))
    found = [{0}, *(everything for _ in successors[1:])]
    changed = True
    while changed:
        changed = False
        for b in range(1, len(successors)):
            above = [found[p] for p in predecessors[b]]
            new = (set.intersection(*above) if above else set()) | {b}
            if new != found[b]:
                found[b], changed = new, True
    return found


def _natural_loops(
    successors: list[list[int]], dominators: list[set[int]]
) -> dict[int, tuple[set[int], set[int]]]:
    """The loops as {head: (blocks, latches)}.

    A loop has an edge from each latch back to its head, which dominates the latch. The order of the
    blocks in memory does not matter. A block that the compiler moved out of a loop's range still
    belongs to the loop, and a jump backwards from such a block makes no loop.
    """
    predecessors: list[list[int]] = [[] for _ in successors]
    for b, following in enumerate(successors):
        for s in following:
            predecessors[s].append(b)
    loops: dict[int, tuple[set[int], set[int]]] = {}
    for b, following in enumerate(successors):
        for head in following:
            if head not in dominators[b]:
                continue
            body, latches = loops.setdefault(head, ({head}, set()))
            latches.add(b)
            pending = [b]
            while pending:
                inside = pending.pop()
                if inside not in body:
                    body.add(inside)
                    pending += predecessors[inside]
    return loops
