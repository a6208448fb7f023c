"""The tables of a batch: the kernel that builds them against PyTorch's operators."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprefix.kernels import decode_grid, ranks, tables
from fastprefix.kernels.arguments import BatchTables
from fastprefix.options import Options
from fastprefix_testing import tables as oracle
from fastprefix_testing.launchers import interpreted

pytestmark = interpreted

INTEGERS = st.sampled_from([torch.int32, torch.int64])


def built(layout: tables.Layout, **tensors: Tensor | None) -> BatchTables:
    """What the kernel builds, in memory with guards around it."""
    whole = torch.full((layout.size() + 64,), -77, dtype=torch.int32)
    found = layout.views(whole[32:-32])
    tables.tables_launch(Options(False, 1.0, **tensors), layout, found).run()
    assert (whole[:32] == -77).all()
    assert (whole[-32:] == -77).all()
    return found


def sizes(**changes: Any) -> tables.Layout:
    base = tables.Layout(
        M=1, N=1, length=1, P=0, group=1, packed=False, cut=None, forward=16, dq=32, dkv=16,
        prefix_keys=16, prefix_rows=32,
    )  # fmt: skip
    return base._replace(**changes)


def assert_tiles(found: Tensor, expected: Tensor) -> None:
    """Equal, but that entries past the last tile are (-1, 0)."""
    real = expected[:, :1] >= 0
    assert torch.equal(found, torch.where(real, expected, torch.tensor([-1, 0]).int()))


# 33 prefixes are more than the kernel looks at together, and 129 rows more than it compares with.
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=6)
    | st.lists(st.integers(0, 90), min_size=33, max_size=70),
    rows=st.lists(st.integers(-3, 80), min_size=1, max_size=70)
    | st.lists(st.integers(-1, 3), min_size=129, max_size=150),
    packed=st.integers(1, 60),
    tile=st.sampled_from([(16, 32), (64, 64)]),
    free=st.sampled_from([0, 1, 40]),
    cut_short=st.integers(0, 100),
    integers=INTEGERS,
)
def test_tables_of_decoding(lengths, rows, packed, tile, free, cut_short, integers):
    """Numbers out of range count as no prefix, and lengths of more than P are cut there."""
    index, N = torch.tensor(rows, dtype=integers), len(lengths)
    P = max(1, sum(lengths) - cut_short)
    used = min(N, len(rows))
    tiles = (len(rows) * packed + used * (tile[0] - 1)) // tile[0]
    units = tiles + free if free else tiles * decode_grid.FIXED_PREFIX_SPLITS
    cut = decode_grid.PrefixCut(P, packed, *tile, units, 0, 0, 64, free)
    layout = sizes(M=len(rows), N=N, P=P, group=packed, cut=cut)
    tensor = torch.tensor(lengths, dtype=integers)
    found = built(layout, prefix_index=index, prefix_lengths=tensor)
    expected = oracle.build_tables(index, tensor, cut)
    surplus = expected.units[:, :1] >= expected.units[:, 1:2]
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.units, expected.units.masked_fill(surplus, 0))
    assert torch.equal(found.rows, expected.rows)
    assert found.starts.tolist() == oracle.boundaries(tensor).clamp(max=P).tolist()


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=40) | st.none(),
    texts=st.lists(st.integers(0, 100), min_size=1, max_size=40)
    | st.lists(st.integers(0, 3), min_size=129, max_size=150),
    packed=st.booleans(),
    group=st.sampled_from([1, 3]),
    data=st.data(),
    integers=INTEGERS,
)
def test_tables_of_one_pass_and_its_backward(lengths, texts, packed, group, data, integers):
    """Packed sequences, empty ones among them, with and without several prefixes."""
    M, index, prefix_lengths, cu = len(texts), None, None, None
    if lengths is None and not packed:
        lengths = [3]
    N, P = 1, 50
    if lengths is not None:
        N, P = len(lengths), sum(lengths)
        drawn = data.draw(st.lists(st.integers(-1, N - 1), min_size=M, max_size=M))
        index = torch.tensor(drawn, dtype=integers)
        prefix_lengths = torch.tensor(lengths, dtype=integers)
    length = max(texts)
    if packed:
        cu = oracle.boundaries(torch.tensor(texts)).to(integers)
        length = sum(texts)
    layout = sizes(M=M, N=N, length=length, P=P, group=group, packed=packed)
    found = built(layout, prefix_index=index, prefix_lengths=prefix_lengths, cu_seqlens=cu)
    starts = torch.tensor([0, P]) if lengths is None else oracle.boundaries(prefix_lengths)
    assert found.starts.tolist() == starts.tolist()
    assert_tiles(found.key_tiles, oracle.tiles(starts, P, layout.prefix_keys))
    query_tiles, bounds = oracle.query_tile_table(index, cu, M, N, length, layout.prefix_rows)
    assert_tiles(found.query_tiles, query_tiles)
    assert found.bounds.tolist() == bounds.tolist()
    if packed:
        assert_tiles(found.forward, oracle.tiles(cu, length, layout.forward, group))
        assert_tiles(found.dq, oracle.tiles(cu, length, layout.dq, group))
        assert_tiles(found.dkv, oracle.tiles(cu, length, layout.dkv))


@settings(max_examples=6, deadline=None)
@given(
    cu=st.lists(st.integers(-50, 400), min_size=2, max_size=40),
    index=st.lists(st.integers(-9, 50), min_size=39, max_size=39),
    lengths=st.lists(st.integers(-50, 1 << 30), min_size=1, max_size=5),
)
def test_wrong_values_write_nothing_outside(cu, index, lengths):
    """They are trusted under torch.compile; every entry of a table names a sequence, or is -1."""
    M, N = len(cu) - 1, len(lengths)
    layout = sizes(M=M, N=N, length=200, P=100, packed=True)
    found = built(
        layout, prefix_index=torch.tensor(index[:M]), prefix_lengths=torch.tensor(lengths),
        cu_seqlens=torch.tensor(cu),
    )  # fmt: skip
    for table in (found.forward, found.dq, found.dkv, found.query_tiles):
        assert ((table[:, 0] >= -1) & (table[:, 0] < M)).all()
    assert ((found.key_tiles[:, 0] >= -1) & (found.key_tiles[:, 0] < N)).all()
    assert ((found.starts >= 0) & (found.starts <= 100)).all()


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4),
    Lq=st.integers(1, 40),
    Lk=st.sampled_from([1, 30, 40, ranks.CHUNK, ranks.CHUNK + 70]),
    in_use=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ranks_of_queries_behind_padding(B, Lq, Lk, in_use, seed):
    """More queries than keys, and more keys than the kernel counts at a time, among them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (B, Lk + 3), generator=generator).bool()[:, 1:-2]
    lengths = torch.randint(-2, Lk + 3, (B, 2), generator=generator).int()[:, 1] if in_use else None
    whole = torch.full((B * Lq + 64,), -77, dtype=torch.int32)
    rank = whole[32:-32].view(B, Lq)
    ranks.ranks_launch(mask, lengths, rank).run()
    assert torch.equal(rank, oracle.query_ranks(mask, lengths, Lq))
    assert (whole[:32] == -77).all()
    assert (whole[-32:] == -77).all()
