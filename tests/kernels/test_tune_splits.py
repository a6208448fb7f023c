"""How decode cuts its keys, tuned in the interpreter, with a stopwatch that is told the times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastprefix.kernels import decode_grid, launch
from fastprefix.kernels.target import Splitting, Tile
from fastprefix.kernels.tuning import splitting, store, tune
from fastprefix_testing.decode import hopper, plan_shape
from fastprefix_testing.launchers import interpreted

pytestmark = interpreted

CPU = torch.device("cpu")
TIMED = tune.TimedProblem(
    16, torch.float32, kv_heads=1, group=1, length=256, prefix=256, decode_batch=2
)


def tuned(times) -> tune.Choice[Splitting]:
    """What is found where `times` says how long launches take, by their numbers of programs."""
    return splitting.tune_splitting(
        TIMED, CPU, timer=lambda launches, device: times([each.grid[0] for each in launches])
    )


def test_nothing_faster_leaves_the_default():
    found = tuned(lambda programs: 1.0)
    assert found.best == found.table == Splitting()
    assert found.name == "decode 256 32"


def test_more_programs_where_they_are_faster():
    found = tuned(lambda programs: 1.0 / programs[0])
    assert found.best.launch_bytes < found.table.launch_bytes
    assert found.best_ms < found.table_ms


def test_two_launches_where_they_are_faster_than_one():
    """These problems are so small that a launch is thought to cost more than they do."""
    for faster, least, most in ((2, 0, 2**15), (1, 2**15, 2**20)):
        found = tuned(lambda programs, faster=faster: 1.0 if len(programs) == faster else 5.0)
        assert least < found.best.launch_bytes <= most


def test_every_way_to_run_a_step_is_timed_once():
    timed = []
    tuned(lambda programs: timed.append(programs) or 1.0)
    assert len(timed) < 4 * 13
    assert {len(programs) for programs in timed} == {1, 2}


def test_what_was_tuned_is_what_decode_takes():
    shape = plan_shape(B=1, P=1024, Lk=256)
    device = replace(hopper(), splittings={"decode 128 16": Splitting(1, 256, 1 << 19)})
    for _ in range(2):  # grids are kept
        assert decode_grid.grid_of(shape, hopper()).prefix.split == 64
        assert decode_grid.grid_of(shape, device).prefix.split == 256
    assert decode_grid.two_phase_pays(shape, hopper())
    assert not decode_grid.two_phase_pays(shape, device)
    single = shape._replace(dtype=torch.float32)
    assert decode_grid.grid_of(single, device) == decode_grid.grid_of(single, hopper())
    long = plan_shape(B=8, P=1 << 15)
    programs = [decode_grid.grid_of(long, each).programs for each in (device, hopper())]
    assert programs[0] < programs[1]


def test_it_changes_no_bit_of_a_batch_invariant_call():
    shape = plan_shape(batch_invariant=True)
    device = replace(hopper(), splittings={"decode 128 16": Splitting(4, 32, 1)})
    assert decode_grid.split_lengths(shape, device) == [512]
    assert decode_grid.grid_of(shape, device) == decode_grid.grid_of(shape, hopper())


def test_it_is_kept_beside_the_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile, cut = Tile(64, 32, 4, 2), Splitting(1, 128, 4096)
    store.save("interpreter", "decode 64 16", tile)
    file = store.save("interpreter", "decode 64 16", cut)
    store.save("interpreter", "decode 128 16", cut)
    try:
        launch.forget_devices()
        target = launch.target_of(CPU)
        assert target.tuned == {"decode 64 16": tile}
        assert target.splittings == {"decode 64 16": cut, "decode 128 16": cut}
        file.write_text(file.read_text().replace("4096", "4095"))
        with pytest.raises(ValueError, match="no splittings"):
            store.load("interpreter", Splitting)
    finally:
        monkeypatch.undo()
        launch.forget_devices()
