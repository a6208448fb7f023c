"""The plan of a decoding step: its splits, its tables, and where it pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprefix.kernels import decode_grid, tilings
from fastprefix_testing.decode import hopper, plan_shape
from fastprefix_testing.launchers import interpreted
from fastprefix_testing.tables import build_tables

pytestmark = interpreted


def test_partials_are_small():
    for P in (2048, 1 << 17):
        grid = decode_grid.grid_of(plan_shape(P=P, Lk=8), hopper())
        # At most a partial per row and split: WAVES tiles per multiprocessor, and one per row.
        rows = (2 * 132 + 8) * grid.tile.rows + 32 * 32
        assert grid.partial_rows <= rows
        assert decode_grid.partial_bytes(grid, 128) <= rows * 129 * 4


@settings(max_examples=80)
@given(data=st.data())
def test_tables_cover_every_row_and_key_once(data):
    """The tables that test_tables.py holds the kernel to."""
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 3000), min_size=1, max_size=6))
    index = draw(st.lists(st.integers(-1, len(lengths) - 1), min_size=1, max_size=70))
    Lq, group = draw(st.integers(1, 16)), draw(st.sampled_from([1, 4, 7]))
    P, target = sum(lengths), draw(st.sampled_from([hopper(), tilings.Target("interpreter", 4)]))
    chosen = plan_shape(
        B=len(index), Hq=2 * group, Hkv=2, Lq=Lq, P=P, N=len(lengths),
        batch_invariant=draw(st.booleans()),
    )  # fmt: skip
    cut, packed = decode_grid.grid_of(chosen, target).prefix, group * Lq
    if not cut.units:
        assert P == 0
        return
    tables = build_tables(torch.tensor(index), torch.tensor(lengths), cut)
    order, units, rows = (t.tolist() for t in (tables.order, tables.units, tables.rows))
    assert len(units) == cut.units
    assert [index[b] for b in order] == sorted(index)
    real = [u for u in units if u[0] < u[1]]
    for row, _, lo, hi in real:
        assert 0 <= lo < hi <= P
        assert (lo - sum(lengths[: index[order[row // packed]]])) % cut.keys == 0
    for b, n in enumerate(index):
        first, i_u, splits = rows[b]
        if n < 0:
            assert splits == 0
            continue
        begin = sum(lengths[:n])
        for r in {0, packed - 1}:
            at = begin
            for split in range(splits):
                row, row_end, lo, hi = units[i_u + (first + r) // cut.rows * splits + split]
                own = row + (first + r) % cut.rows
                assert own < row_end
                assert order[own // packed] == b
                assert own % packed == r
                assert lo == at
                at = hi
            assert at == begin + lengths[n]


@pytest.mark.parametrize(
    ("changes", "pays"),
    [
        ({"P": 20, "B": 8, "Lk": 60}, False),
        ({"P": 0, "B": 256, "Lk": 300}, False),
        ({"P": 64, "B": 1, "Lk": 64}, False),
        ({"P": 2048, "B": 32}, True),
        ({"P": 2048, "B": 1}, True),  # one pass would leave most multiprocessors idle
        ({"P": 128, "B": 512, "Lk": 64}, True),
        ({"P": 0, "B": 1, "Lk": 8192}, True),
        ({"P": 20, "B": 1, "Lk": 60, "batch_invariant": True}, True),
        ({"B": 0}, False),
        # up to 64 queries: where a tile holds the rows of several sequences, or one pass has few
        # programs; not where a sequence fills the tiles of one pass, and the batch the device
        ({"Lq": 17, "Hq": 8, "B": 64}, True),
        ({"Lq": 64, "B": 1, "P": 4096, "Lk": 64}, True),
        ({"Lq": 64, "B": 64, "Lk": 64}, False),
        ({"Lq": 64, "B": 4, "P": 20, "Lk": 64}, False),
    ],
    ids=str,
)
def test_where_two_phases_pay(changes, pays):
    assert decode_grid.two_phase_pays(plan_shape(**changes), hopper()) is pays


# The programs of the first launch and the keys of prefix and sequence splits, on 132
# multiprocessors. With at least 256 keys in every split the first three had 40, 96 and 18 programs.
SPLITS = {
    "one sequence": ({"B": 1, "P": 1024, "Lk": 256}, 128 + 32, 64, 64),
    "eight sequences": ({"B": 8, "P": 1024, "Lk": 256}, 64 + 128, 128, 128),
    "few heads": ({"B": 4, "Hq": 9, "Hkv": 3, "P": 512, "Lk": 64, "D": 64}, 24 + 12, 64, 64),
    "a full tile of rows": ({"B": 16, "P": 1024, "Lk": 0}, 128, 64, 64),
    # 64 keys would keep all programs busy too, but their partial results would be twice as many.
    "and a longer prefix": ({"B": 16, "P": 2112, "Lk": 0}, 17 * 8, 128, 128),
    "a full device": ({"B": 32, "P": 1024, "Lk": 256}, 64 + 256, 256, 256),
    "a long prefix": ({"B": 128, "P": 4096, "Lk": 256}, 256 + 1024, 1024, 256),
    "batch invariant": ({"B": 1, "P": 1024, "Lk": 256, "batch_invariant": True}, 16 + 8, 512, 512),
}


@pytest.mark.parametrize(("changes", "programs", "prefix", "sequence"), SPLITS.values(), ids=SPLITS)
def test_splits_fill_the_device_without_more_partials_than_that_takes(
    changes, programs, prefix, sequence
):
    size = changes.get("D", 128)
    shape = plan_shape(**changes, Dv=size)
    grid = decode_grid.grid_of(shape, hopper())
    assert (grid.programs, grid.prefix.split, grid.sequence_split) == (programs, prefix, sequence)
    assert decode_grid.two_phase_pays(shape, hopper())


def test_fixed_splits_and_the_merges_tile_do_not_depend_on_the_batch():
    for P in (300, 1024, 1 << 16):
        lengths = set()
        for B in (1, 7, 64, 500):
            grid = decode_grid.grid_of(plan_shape(B=B, P=P, batch_invariant=True), hopper())
            lengths.add((grid.prefix.split, grid.sequence_split, grid.merge_tile))
        assert lengths == {(max(512, P // 16), 512, (4, 1, 1, 1))}


def test_the_merge_of_a_small_batch_has_more_programs():
    for B, rows in ((1, 1), (8, 1), (16, 2), (32, 4), (500, 4)):
        grid = decode_grid.grid_of(plan_shape(B=B), hopper())
        assert grid.merge_tile.rows == rows
        assert grid.merge_programs == B * 8 * 4 // rows
