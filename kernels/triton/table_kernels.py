"""The kernel that builds the tables of a batch: one launch, no atomics, nothing read by the host.

Each program fills a piece of one table. What it has to know of the whole batch it counts itself, by
comparisons. So no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Cut, PrefixPart

# Rows or runs that a program compares with at a time, prefixes that it looks at together, and what
# a program fills: units, and rows or runs.
CHUNK = tl.constexpr(128)
PREFIXES = tl.constexpr(32)
UNITS = tl.constexpr(64)
RUNS = tl.constexpr(32)


@triton.jit
def prefixes_of(index, o_b, B, N):
    """The prefix of each row: -1 for none and for a number out of range, N past the last row."""
    if index is None:
        i_b = o_b * 0
    else:
        i_b = tl.load(index + o_b, mask=o_b < B, other=0)
        i_b = tl.where((i_b < 0) | (i_b >= N), -1, i_b).to(tl.int32)
    return tl.where(o_b < B, i_b, N)


@triton.jit
def tile_counts(cu, lengths, o_m, M, length, rows, group):
    """How many tiles each run has: of `rows` rows, a token counting `group` times; 0 past the last.

    The runs lie between the offsets `cu`, or they have `lengths`, or are all `length` long.
    """
    m_m = o_m < M
    if cu is not None:
        n_m = tl.load(cu + o_m + 1, mask=m_m, other=0) - tl.load(cu + o_m, mask=m_m, other=0)
    elif lengths is not None:
        n_m = tl.load(lengths + o_m, mask=m_m, other=0)
    else:
        n_m = o_m * 0 + length
    n_m = tl.maximum(n_m, 0).to(tl.int32)
    return tl.where(m_m, (n_m * group + rows - 1) // rows, 0)


@triton.jit
def store_tiles(
    table, size, i_program, n_programs, index, cu, lengths, M, N, length, rows, group
):  # fmt: skip
    """Tiles of runs [size, 2], (run, tile), in the order of the runs' prefixes; (-1, 0) at the end.

    The program writes the tiles of its runs.
    """
    o_m = i_program * RUNS + tl.arange(0, RUNS)
    i_m = prefixes_of(index, o_m, M, N)
    place = tl.zeros([RUNS], dtype=tl.int32)
    totals = tl.zeros([CHUNK], dtype=tl.int32)
    for i_j in tl.range(0, M, CHUNK):
        o_j = i_j + tl.arange(0, CHUNK)
        n_j = tile_counts(cu, lengths, o_j, M, length, rows, group)
        m_before = o_j[None, :] < o_m[:, None]
        if index is not None:
            p_j = prefixes_of(index, o_j, M, N)
            m_before = (p_j[None, :] < i_m[:, None]) | (
                (p_j[None, :] == i_m[:, None]) & m_before
            )  # fmt: skip
        place += tl.sum(tl.where(m_before, n_j[None, :], 0), 1)
        totals += n_j
    n_m = tile_counts(cu, lengths, o_m, M, length, rows, group)
    o_t = tl.arange(0, RUNS)
    # No more than fit: lengths that are wrong do not keep the device busy.
    for i_t in tl.range(0, tl.minimum(tl.max(n_m, 0), size), RUNS):
        o_at = place[:, None] + (i_t + o_t)[None, :]
        m_at = ((i_t + o_t)[None, :] < n_m[:, None]) & (o_at < size)
        tl.store(table + o_at * 2, o_m[:, None] + o_at * 0, mask=m_at)
        tl.store(table + o_at * 2 + 1, (i_t + o_t)[None, :] + o_at * 0, mask=m_at)
    total = tl.sum(totals, 0)
    for i_t in tl.range(total + i_program * CHUNK, size, n_programs * CHUNK):
        o_at = i_t + tl.arange(0, CHUNK)
        tl.store(table + o_at * 2, tl.full([CHUNK], -1, tl.int32), mask=o_at < size)
        tl.store(table + o_at * 2 + 1, tl.zeros([CHUNK], dtype=tl.int32), mask=o_at < size)


@triton.jit
def store_sums(
    table, size, i_program, index, cu, lengths, M, N, length, rows, group, most,
    BY_PREFIX: tl.constexpr,
):  # fmt: skip
    """[size]: the tiles of the first n runs, or of all whose prefix is below n; at most `most`."""
    o_n = i_program * RUNS + tl.arange(0, RUNS)
    b_sum = tl.zeros([RUNS], dtype=tl.int64)
    for i_j in tl.range(0, M, CHUNK):
        o_j = i_j + tl.arange(0, CHUNK)
        n_j = tile_counts(cu, lengths, o_j, M, length, rows, group).to(tl.int64)
        if BY_PREFIX:
            p_j = prefixes_of(index, o_j, M, N)
        else:
            p_j = o_j
        b_sum += tl.sum(tl.where(p_j[None, :] < o_n[:, None], n_j[None, :], 0), 1)
    tl.store(table + o_n, tl.minimum(b_sum, most).to(tl.int32), mask=o_n < size)


@triton.jit
def part_of(index, lengths, i_n, key, unit, split, B, N, P, cut):
    """The prefixes from i_n on, with `key` keys and `unit` units before them.

    `split` are the keys per split; None for at most `cut.parts` splits of each prefix. Lengths that
    add up to more than P are cut.
    """
    o_n = i_n + tl.arange(0, PREFIXES)
    length = tl.load(lengths + o_n, mask=o_n < N, other=0).to(tl.int64)
    length = tl.minimum(tl.maximum(length, 0), P)
    end = key + tl.cumsum(length, 0)
    below = tl.zeros([PREFIXES], dtype=tl.int32)
    own = tl.zeros([PREFIXES], dtype=tl.int32)
    for i_j in tl.range(0, B, CHUNK):
        p_j = prefixes_of(index, i_j + tl.arange(0, CHUNK), B, N)
        below += tl.sum((p_j[None, :] < o_n[:, None]).to(tl.int32), 1)
        own += tl.sum((p_j[None, :] == o_n[:, None]).to(tl.int32), 1)
    key_first = tl.minimum(end - length, P).to(tl.int32)
    key_end = tl.minimum(end, P).to(tl.int32)
    tiles = (own * cut.packed + cut.rows - 1) // cut.rows
    if split is None:
        n_split = ceil_to(key_end - key_first, cut.parts, cut.keys)
        n_split = tl.maximum(n_split, cut.shortest)
    else:
        n_split = tl.zeros([PREFIXES], dtype=tl.int32) + split
    n_splits = (key_end - key_first + n_split - 1) // n_split
    unit_end = unit + tl.cumsum(tiles * n_splits, 0)
    return PrefixPart(
        o=o_n, key_first=key_first, key_end=key_end, row_first=below, row_end=below + own,
        tiles=tiles, split=n_split, splits=n_splits, unit_first=unit_end - tiles * n_splits,
        unit_end=unit_end, key=key + tl.sum(length, 0), unit=unit + tl.sum(tiles * n_splits, 0),
    )  # fmt: skip


@triton.jit
def ceil_to(total, parts, step):
    """The smallest multiple of `step` that, `parts` times, is at least the total."""
    return (total + parts * step - 1) // (parts * step) * step


@triton.jit
def common_split(index, lengths, B, N, P, cut, FREE: tl.constexpr):
    """The keys per split of all prefixes; None if each has its own number.

    Units <= tiles + keys of all tiles / split, so with this split there are at most tiles + parts.
    """
    if not FREE:
        return None
    else:
        key = tl.cast(0, tl.int64)
        unit = tl.cast(0, tl.int32)
        total = tl.cast(0, tl.int64)
        for i_n in tl.range(0, N, PREFIXES):
            part = part_of(index, lengths, i_n, key, unit, 1, B, N, P, cut)
            key = part.key
            length = (part.key_end - part.key_first).to(tl.int64)
            total += tl.sum(part.tiles.to(tl.int64) * length, 0)
        split = ceil_to(total, tl.cast(cut.parts, tl.int64), cut.keys)
        return tl.maximum(tl.minimum(split, 1 << 30).to(tl.int32), cut.shortest)


@triton.jit
def store_units(table, size, i_program, index, lengths, B, N, P, cut, FREE: tl.constexpr):
    """Units [size, 4]: first row, end of the prefix's rows, first and end key; zeros at the end."""
    o_u = i_program * UNITS + tl.arange(0, UNITS)
    row = tl.zeros([UNITS], dtype=tl.int32)
    row_end = tl.zeros([UNITS], dtype=tl.int32)
    lo = tl.zeros([UNITS], dtype=tl.int32)
    hi = tl.zeros([UNITS], dtype=tl.int32)
    split = common_split(index, lengths, B, N, P, cut, FREE)
    key = tl.cast(0, tl.int64)
    unit = tl.cast(0, tl.int32)
    for i_n in tl.range(0, N, PREFIXES):
        part = part_of(index, lengths, i_n, key, unit, split, B, N, P, cut)
        key = part.key
        unit = part.unit
        i_u = o_u[:, None] - part.unit_first[None, :]  # [UNITS, PREFIXES], as the next ones
        m_u = (i_u >= 0) & (o_u[:, None] < part.unit_end[None, :])
        splits = tl.maximum(part.splits, 1)[None, :]
        i_tile = i_u // splits
        end = part.row_end[None, :] * cut.packed
        first = part.row_first[None, :] * cut.packed + i_tile * cut.rows
        key_first = part.key_first[None, :] + (i_u - i_tile * splits) * part.split[None, :]
        key_end = tl.minimum(key_first + part.split[None, :], part.key_end[None, :])
        row += tl.sum(tl.where(m_u, first, 0), 1)
        row_end += tl.sum(tl.where(m_u, end, 0), 1)
        lo += tl.sum(tl.where(m_u, key_first, 0), 1)
        hi += tl.sum(tl.where(m_u, key_end, 0), 1)
    m_u = o_u < size
    tl.store(table + o_u * 4, row, mask=m_u)
    tl.store(table + o_u * 4 + 1, row_end, mask=m_u)
    tl.store(table + o_u * 4 + 2, lo, mask=m_u)
    tl.store(table + o_u * 4 + 3, hi, mask=m_u)


@triton.jit
def store_rows(order, table, i_program, index, lengths, B, N, P, cut, FREE: tl.constexpr):
    """Rows [B, 3]: first row within the prefix, its first unit, its splits; and the order [B]."""
    o_b = i_program * RUNS + tl.arange(0, RUNS)
    i_b = prefixes_of(index, o_b, B, N)
    n_b = tl.maximum(i_b, 0)
    slot = tl.zeros([RUNS], dtype=tl.int32)
    first = tl.zeros([RUNS], dtype=tl.int32)  # where the prefix's rows begin
    for i_j in tl.range(0, B, CHUNK):
        o_j = i_j + tl.arange(0, CHUNK)
        p_j = prefixes_of(index, o_j, B, N)[None, :]
        tied = (p_j == i_b[:, None]) & (o_j[None, :] < o_b[:, None])
        slot += tl.sum(((p_j < i_b[:, None]) | tied).to(tl.int32), 1)
        first += tl.sum((p_j < n_b[:, None]).to(tl.int32), 1)
    unit_first = tl.zeros([RUNS], dtype=tl.int32)
    splits = tl.zeros([RUNS], dtype=tl.int32)
    split = common_split(index, lengths, B, N, P, cut, FREE)
    key = tl.cast(0, tl.int64)
    unit = tl.cast(0, tl.int32)
    for i_n in tl.range(0, N, PREFIXES):
        part = part_of(index, lengths, i_n, key, unit, split, B, N, P, cut)
        key = part.key
        unit = part.unit
        m_n = n_b[:, None] == part.o[None, :]
        unit_first += tl.sum(tl.where(m_n, part.unit_first[None, :], 0), 1)
        splits += tl.sum(tl.where(m_n, part.splits[None, :], 0), 1)
    m_b = o_b < B
    tl.store(order + slot, o_b, mask=m_b)
    tl.store(table + o_b * 3, (slot - first) * cut.packed, mask=m_b)
    tl.store(table + o_b * 3 + 1, unit_first, mask=m_b)
    tl.store(table + o_b * 3 + 2, tl.where(i_b >= 0, splits, 0), mask=m_b)


# Nothing is specialised: batches of all sizes share one compiled kernel.
NUMBERS = [
    "M", "N", "length", "P", "group", "packed", "cut_rows", "cut_keys", "n_units", "shortest",
    "parts", "forward_rows", "dq_rows", "dkv_keys", "prefix_keys", "prefix_rows",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def prefix_attn_tables_kernel(
    index, lengths, cu, tables, M, N, length, P, group,
    packed, cut_rows, cut_keys, n_units, shortest, parts,
    forward_rows, dq_rows, dkv_keys, prefix_keys, prefix_rows,
    FREE: tl.constexpr,
):  # fmt: skip
    """The tables that are not None, one after the other; a program writes a piece of one."""
    cut = Cut(packed=packed, rows=cut_rows, keys=cut_keys, shortest=shortest, parts=parts)
    i = tl.program_id(0)
    n_runs = tl.cdiv(M, RUNS)
    n_prefixes = tl.cdiv(N, RUNS)
    n_sums = tl.cdiv(N + 1, RUNS)
    if tables.units is not None:
        if i < n_runs:
            store_rows(tables.order, tables.rows, i, index, lengths, M, N, P, cut, FREE)
        i -= n_runs
        n = tl.cdiv(n_units, UNITS)
        if (i >= 0) & (i < n):
            store_units(tables.units, n_units, i, index, lengths, M, N, P, cut, FREE)
        i -= n
    # Where each prefix begins; without several it is one, all of P.
    if (i >= 0) & (i < n_sums):
        store_sums(tables.starts, N + 1, i, None, None, lengths, N, N, P, 1, 1, P, False)
    i -= n_sums
    if (i >= 0) & (i < n_sums):
        store_sums(
            tables.bounds, N + 1, i, index, cu, None, M, N, length, prefix_rows, 1,
            1 << 30, True,
        )  # fmt: skip
    i -= n_sums
    if (i >= 0) & (i < n_prefixes):
        size = tl.cdiv(P, prefix_keys) + N
        store_tiles(
            tables.key_tiles, size, i, n_prefixes, None, None, lengths, N, N, P, prefix_keys, 1
        )  # fmt: skip
    i -= n_prefixes
    if (i >= 0) & (i < n_runs):
        if cu is None:
            size = M * tl.cdiv(length, prefix_rows)
        else:
            size = tl.cdiv(length, prefix_rows) + M
        store_tiles(
            tables.query_tiles, size, i, n_runs, index, cu, None, M, N, length, prefix_rows, 1
        )  # fmt: skip
    i -= n_runs
    if cu is not None:
        if (i >= 0) & (i < n_runs):
            size = tl.cdiv(length * group, forward_rows) + M
            store_tiles(
                tables.forward, size, i, n_runs, None, cu, None, M, N, length, forward_rows, group
            )  # fmt: skip
        i -= n_runs
        if (i >= 0) & (i < n_runs):
            size = tl.cdiv(length * group, dq_rows) + M
            store_tiles(tables.dq, size, i, n_runs, None, cu, None, M, N, length, dq_rows, group)
        i -= n_runs
        if (i >= 0) & (i < n_runs):
            size = tl.cdiv(length, dkv_keys) + M
            store_tiles(tables.dkv, size, i, n_runs, None, cu, None, M, N, length, dkv_keys, 1)
