"""The suites as pytest-benchmark's users run them; figures of tiny cases, which say nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[3]


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "benchmarks/suites/test_operator.py", "--tiny"]
    options = ["--rounds", "3", "-p", "no:cacheprovider", "-k", "prefill and not reference"]
    # pytest-benchmark measures nothing in what it takes for a worker of xdist
    outside = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    environment = {**outside, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *options, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def test_figures_are_saved_grouped_and_compared(tmp_path):
    storage = f"--benchmark-storage={tmp_path}"
    done = run(f"--benchmark-json={tmp_path / 'out.json'}", "--benchmark-save=one", storage)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    providers = {each["params"]["provider"]: each for each in found}
    assert {"fastprefix", "sdpa", "sdpa concatenated", "hydragen"} <= set(providers)
    assert len({each["group"] for each in found}) == 1
    for each in found:
        figures = each["extra_info"]["figures"]["ms"]
        assert each["stats"]["median"] == pytest.approx(figures["median"] / 1e3, abs=1e-9)
        assert each["stats"]["rounds"] == 3
    assert "needs a GPU" in done.stdout  # why the others skip

    again = run("--benchmark-compare", storage, "--benchmark-group-by=param:provider")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "provider=sdpa concatenated" in again.stdout
    assert "(0001_one)" in again.stdout


def test_without_timing_only_the_results_are_checked():
    done = run("--benchmark-disable")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
