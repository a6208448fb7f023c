"""Tuning: in the interpreter, where a stopwatch that is told the times stands for the GPU's."""

import json
from dataclasses import replace

import pytest
import torch

from fastprefix.kernels import (
    decode,
    decode_grid,
    launch,
    launch_backward,
    launch_forward,
    tilings,
)
from fastprefix.kernels.target import SHARED_MEMORY, Tile
from fastprefix.kernels.tuning import store, tune
from fastprefix.options import Options

CPU = torch.device("cpu")
SHAPE = tune.TimedProblem(
    16, torch.float32, batch=1, kv_heads=1, group=1, length=24, prefix=40, decode_batch=20
)
HOPPER = tilings.Target("hopper", 132)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def told(times):
    """A stopwatch that says what `times` makes of the tile."""
    return lambda launches, device: times(launches[0].tile)


@pytest.mark.parametrize("step", tilings.PASSES)
def test_the_fastest_tile_is_found_and_runs_right(step):
    """All tiles really run; one that is best from all sides is where the search ends."""
    best = tilings.Tile(16, 64, 4, 2)

    def times(tile):
        apart = abs(tile.keys / best.keys - 1) + abs(tile.stages - best.stages)
        return 1.0 + apart + abs(tile.rows - best.rows) + abs(tile.warps - best.warps)

    found = tune.tune(SHAPE, step, CPU, timer=told(times))
    assert found.best == best
    assert found.table == tilings.TILES["interpreter"][step][0][2]
    assert found.best_ms == 1.0 < found.table_ms
    assert found.tried >= 5
    assert found.name == f"{step} 256 32"


def test_nothing_faster_leaves_the_tables_tile():
    found = tune.tune(SHAPE, "forward", CPU, timer=told(lambda tile: 1.0))
    assert found.best == found.table


def test_a_tile_with_other_results_is_not_taken(monkeypatch):
    """A miscompiled kernel could be the fastest."""
    run = launch.Launch.run

    def broken(self):
        run(self)
        if self.tile.keys == 64 and "out" in self.arguments:
            self.arguments["out"][..., 0] = float("nan")

    monkeypatch.setattr(launch.Launch, "run", broken)
    found = tune.tune(SHAPE, "forward", CPU, timer=told(lambda tile: 1.0 / tile.keys))
    assert found.best.keys < 64


def test_a_tile_that_does_not_fit_is_passed_over(monkeypatch):
    from triton.runtime.errors import OutOfResources

    run = launch.Launch.run

    def full(self):
        if self.tile.stages > 1:
            raise OutOfResources(300_000, 232_448, "shared memory")
        run(self)

    monkeypatch.setattr(launch.Launch, "run", full)
    found = tune.tune(SHAPE, "dq", CPU, timer=told(lambda tile: 1.0 / tile.stages))
    assert found.best.stages == 1


def test_a_tile_that_some_calls_could_not_run_is_passed_over(monkeypatch):
    """Whatever a plain call gains from it."""
    from triton.runtime.errors import OutOfResources

    run = launch.Launch.run

    def full(self):
        if self.values.get("softcap") is not None and self.tile.stages > 2:
            raise OutOfResources(300_000, 232_448, "shared memory")
        run(self)

    monkeypatch.setattr(launch.Launch, "run", full)
    found = tune.tune(SHAPE, "dkv", CPU, timer=told(lambda tile: 1.0 / tile.stages))
    assert found.best.stages == 2


def test_calls_with_halved_tiles_keep_the_tables():
    q = torch.empty(1, 1, 4096, 64, device="meta", dtype=torch.bfloat16)
    mask = torch.empty(1, 1, 4096, 4096, device="meta")
    tuned = {"forward 64 16": tilings.Tile(64, 32, 2, 4)}
    with launch.collected(replace(HOPPER, tuned=tuned)) as launches:
        launch_forward(q, q, q, q[0, :, :128], q[0, :, :128], Options(False, 1.0, attn_mask=mask))
    table = tilings.TILES["hopper"]["forward"][0][1]
    assert launches[0].tile == table._replace(rows=table.rows // 2)


def test_neighbours_stay_within_what_kernels_take():
    for tile in (tilings.Tile(16, 16, 1, 1), tilings.Tile(256, 256, 16, 4)):
        for other in tune.neighbours(tile):
            assert 16 <= min(other.rows, other.keys) <= max(other.rows, other.keys) <= 256
            assert 1 <= other.warps <= 16
            assert 1 <= other.stages <= 4
            assert sum(a != b for a, b in zip(tile, other, strict=True)) == 1


def test_tuned_tiles_are_what_launches_take():
    """They change only their own row, and a launch treats them as it treats the table's tiles."""
    whole = torch.empty(1, 1, 4096, 64, device="meta", dtype=torch.bfloat16)
    tuned = {"forward 64 16": tilings.Tile(64, 32, 2, 4)}
    for dtype, length, tile in (
        (torch.bfloat16, 4096, tuned["forward 64 16"]),
        (torch.bfloat16, 20, tilings.Tile(32, 32, 2, 4)),
        (torch.float32, 4096, tilings.TILES["hopper"]["forward"][0][2]),
    ):
        x = whole[:, :, :length].to(dtype)  # 20 queries behind a longer text would be decode's
        p = whole[0, :, :128].to(dtype)
        with launch.collected(replace(HOPPER, tuned=tuned)) as launches:
            launch_forward(x, x, x, p, p, Options(is_causal=False, scale=1.0))
        assert launches[0].tile == tile


def test_the_whole_operator_with_tuned_tiles(monkeypatch):
    """Forward and backward agree with those of the table's tiles."""
    torch.manual_seed(0)
    q, g = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    k, v, pk, pv = (torch.randn(*s, 16) for s in ((2, 1, 40), (2, 1, 40), (1, 33), (1, 33)))
    options = Options(is_causal=True, scale=0.25)

    def both():
        out, lse = launch_forward(q, k, v, pk, pv, options)
        needs = (True,) * 5 + (False, False)
        grads = launch_backward(g, q, k, v, pk, pv, out, lse, options, needs)
        return [out, lse, *grads[:5]]

    plain = both()
    tuned = {f"{step} 256 32": tilings.Tile(16, 64, 2, 3) for step in tilings.PASSES}
    target = replace(launch.target_of(CPU), tuned=tuned)
    monkeypatch.setattr(launch, "_device_target", lambda device: target)
    for a, b in zip(both(), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_kept_is_loaded_for_that_device_alone():
    first, second = tilings.Tile(64, 32, 4, 2), tilings.Tile(16, 16, 8, 1)
    assert store.load("GPU A", Tile) == {}
    store.save("GPU A", "forward 64 16", first)
    store.save("GPU A", "dq 64 16", second)
    assert store.load("GPU A", Tile) == {"forward 64 16": first, "dq 64 16": second}
    assert store.load("GPU B", Tile) == {}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": 1}', '{"a": [64, 64, 4]}', '{"a": [64, 48, 4, 2]}', '{"a": [8, 64, 4, 2]}'],
)
def test_a_broken_file_is_named(content):
    file = store.save("GPU", "a", tilings.Tile(64, 32, 4, 2))
    assert json.loads(file.read_text())["tiles"] == {"a": [64, 32, 4, 2]}
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file.name}: no tiles"):
        store.load("GPU", Tile)


def test_a_file_that_was_cut_short_or_damaged():
    """Refused, or equal: a tile's number that is another one would be one that nobody timed."""
    tiles = {"forward 64 16": tilings.Tile(64, 32, 4, 2), "dq 64 16": tilings.Tile(16, 16, 8, 1)}
    file = [store.save("GPU", *each) for each in tiles.items()][-1]
    content = file.read_bytes()
    damaged = [content[: len(content) * i // 17] for i in range(16)]
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        damaged.append(bytes(changed))
    refused = 0
    for one in damaged:
        file.write_bytes(one)
        try:
            found = store.load("GPU", Tile)
        except ValueError as error:
            assert str(error).startswith(f"{file}: no tiles")  # noqa: PT017
            refused += 1
        else:
            assert found == tiles, one
    assert refused > 0.7 * len(damaged)


def test_a_cache_that_cannot_be_made_holds_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert store.load("GPU", Tile) == {}


def test_steps_and_sizes_that_do_not_exist():
    with pytest.raises(ValueError, match="pass_name: got 'middle'"):
        tune.tune(SHAPE, "middle", CPU)
    with pytest.raises(ValueError, match="256"):
        tune.tune(replace(SHAPE, head_size=300), "forward", CPU)


def decode_problem(**changes):
    base = decode_grid.DecodeShape(
        B=64, Hq=8, Hkv=2, Lq=1, Lk=512, P=2048, N=None, D=64, Dv=64,
        dtype=torch.bfloat16, sliding_window=None, batch_invariant=False,
    )  # fmt: skip
    return base._replace(**changes)


def test_tuned_tiles_are_what_decode_takes():
    """Also on a device whose grids are already cached with the tile of the table."""
    table = tilings.TILES["hopper"]["decode"][0][1]
    tuned = replace(HOPPER, tuned={"decode 64 16": tilings.Tile(32, 32, 2, 4)})
    for _ in range(2):
        assert decode_grid.grid_of(decode_problem(), HOPPER).tile == table
        assert decode_grid.grid_of(decode_problem(), tuned).tile == (32, 32, 2, 4)
    few = decode_problem(B=2)
    assert decode_grid.grid_of(few, tuned).tile == (16, 32, 2, 4)
    fixed = few._replace(batch_invariant=True)
    assert decode_grid.grid_of(fixed, tuned).tile == (32, 32, 2, 4)
    other = decode_problem(dtype=torch.float32)
    assert decode_grid.grid_of(other, tuned).tile == tilings.TILES["hopper"]["decode"][0][2]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("keys", [16, 64, 256])
def test_a_decoding_step_with_a_tuned_tile(monkeypatch, keys, batch_invariant):
    """It agrees with that of the table's tile, also where a tile is longer than a split."""
    torch.manual_seed(0)
    sizes = (5, 4, 2), (5, 2, 150), (5, 2, 150), (2, 170), (2, 170)
    operands = [torch.randn(*size, 16) for size in sizes]
    options = Options(
        is_causal=True, scale=0.25, batch_invariant=batch_invariant, sliding_window=70,
        prefix_index=torch.tensor([0, 1, -1, 2, 0], dtype=torch.int32),
        prefix_lengths=torch.tensor([100, 30, 40], dtype=torch.int32),
    )  # fmt: skip
    plain = decode.decode_forward(*operands, options)
    tuned = {"decode 256 32": tilings.Tile(16, keys, 2, 3)}
    target = replace(launch.target_of(CPU), tuned=tuned)
    monkeypatch.setattr(launch, "_device_target", lambda device: target)
    again = decode.decode_forward(*operands, options)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


def test_tiles_that_are_launched_alike_are_timed_once():
    """With 20 sequences a tile of 64 rows becomes one of 32; noise would choose between them."""
    timed = []

    def timer(launches, device):
        timed.append(launches[0].tile)
        return 1.0

    found = tune.tune(SHAPE, "decode", CPU, timer=timer)
    assert found.table.rows == 32
    assert {tile.rows for tile in timed} == {16, 32}
    assert len(set(timed)) == len(timed)


def test_families_have_rows_for_every_pass_and_head_size():
    for family, passes in tilings.TILES.items():
        assert tuple(passes) == tilings.PASSES, family
        assert family in SHARED_MEMORY
        for name in passes:
            for head_size in (1, 64, 65, 128, 129, 256):
                assert tilings.row(name, family, head_size, torch.float16)[1]
