"""``fastprefix tune``: tiles timed, kept and taken up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastprefix.cli.app import app
from fastprefix.cli.tune import run_tuning
from fastprefix.kernels import launch
from fastprefix.kernels.target import Splitting, Tile
from fastprefix.kernels.tilings import PASSES
from fastprefix.kernels.tuning import store

CPU = torch.device("cpu")
SIZES = {"batch": 1, "kv_heads": 1, "group": 1, "length": 16, "prefix": 16, "decode_batch": 20}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    monkeypatch.undo()
    launch.forget_devices()


def test_tiles_are_kept_and_later_launches_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    """In the interpreter it does not matter which tile is fastest."""
    run_tuning([16], ["fp32"], SIZES, CPU)
    kept = store.load("interpreter", Tile)
    assert set(kept) == {f"{step} 256 32" for step in PASSES}
    assert launch.target_of(CPU).tuned == kept
    splittings = store.load("interpreter", Splitting)
    assert set(splittings) == {"decode 256 32"}
    assert launch.target_of(CPU).splittings == splittings
    printed = capsys.readouterr().out
    assert all(f"{step} 256 32" in printed for step in (*PASSES, "splits"))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 1
    assert "no GPU here" in result.output


@pytest.mark.parametrize(
    ("sizes", "dtypes", "said"),
    [
        ([0], ["bf16"], "head_dim"),
        ([64], ["f"], "dtype"),
        ([96, 128], ["bf16"], "96 bf16 and 128 bf16 share"),
        ([64], ["bf16", "fp16"], "64 bf16 and 64 fp16 share"),
    ],
)
def test_what_it_cannot_tune_is_named(sizes, dtypes, said) -> None:
    with pytest.raises(ValueError, match=said):
        run_tuning(sizes, dtypes, SIZES, CPU)
