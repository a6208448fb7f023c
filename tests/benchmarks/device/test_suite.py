"""The GPU suite's command, without a GPU: a reduced plan in Triton's interpreter, end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a reduced run writes."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--reduced"]
    options = ["--output", str(folder), "--kernels", str(folder / "kernels"), "--budget", "36000"]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads((folder / "gpu.json").read_text())


def test_every_stage_ran_and_nothing_failed(found):
    assert [stage["name"] for stage in found["stages"]] == [
        "about", "tests", "operator", "model figures",
    ]  # fmt: skip
    for stage in found["stages"]:
        assert "failed" not in stage["outcomes"], stage
        assert stage["not_run"] == []
        assert stage["units"]


def test_what_needs_a_device_is_skipped_with_a_reason(found):
    skipped = {u["name"]: u["why"] for u in units(found, "tests") if u["outcome"] == "skipped"}
    assert any("test_graphs" in name for name in skipped)
    assert any("compiled" in name for name in skipped)
    assert all("device" in why or "GPU" in why for why in skipped.values())


def test_sides_agree_and_have_no_timings_without_a_device(found):
    for row in units(found, "operator"):
        assert {"ours", "sdpa", "composed"} <= row["error"].keys()
        assert row["ms"] == {}
        assert "device" in row["why_no_ms"]
        assert "not installed" in row["left_out"]["fa2"]
    decode, prefill, _ = units(found, "operator")
    forward = {"hydragen", "flex", "flex one copy"}
    assert {*forward, "sdpa rows"} <= decode["error"].keys()
    assert forward <= prefill["error"].keys()
    for row in units(found, "model figures"):
        assert row.get("ms") in (None, {})
        assert row.get("tokens_per_s") in (None, {})


def units(found, name):
    return next(stage["units"] for stage in found["stages"] if stage["name"] == name)
