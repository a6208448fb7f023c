"""A stage that is stopped, dies or fails: what ran is kept, and what did not is named."""

import json
import os
import sys
import time

import pytest

from device import records
from device.stages import Stage, run

# A part that dies in its second unit the first time it is run.
PART = """
import os, sys
sys.path.insert(0, "benchmarks")
from device.records import run_units

def fail():
    raise ValueError("no such luck")

def skip():
    raise NotImplementedError("needs a device")

run_units([
    ("good", 0, lambda: {"ms": 1}),
    ("deadly", 0, lambda: os._exit(9)),
    ("bad", 0, fail),
    ("idle", 0, skip),
    ("long", 1e6, lambda: {}),
])
"""
SLOW = """
import sys, time
sys.path.insert(0, "benchmarks")
from device.records import run_units
run_units([("first", 0, lambda: {}), ("slow", 0, lambda: time.sleep(60)), ("last", 0, lambda: {})])
"""


@pytest.fixture
def run_part(tmp_path):
    def start(code, seconds):
        stage = Stage("stage", (("-c", code),), "a stage", share=1.0)
        return run(stage, tmp_path / "log", time.time() + seconds, dict(os.environ))

    return start


def test_a_process_that_dies_is_replaced_and_goes_on_behind_what_it_died_in(run_part):
    found = run_part(PART, seconds=300)
    units = {unit["name"]: unit for unit in found["units"]}
    assert units.keys() == {"good", "bad", "idle"}
    assert units["good"]["ms"] == 1
    assert units["bad"]["why"] == "ValueError: no such luck"
    assert units["idle"]["outcome"] == "skipped"
    assert found["outcomes"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["not_run"] == [
        {"name": "deadly", "why": "its process died"},
        {"name": "long", "why": records.NO_TIME},
    ]


def test_at_the_deadline_a_stage_is_stopped_and_the_rest_is_named(run_part):
    began = time.time()
    found = run_part(SLOW, seconds=25)
    assert time.time() - began < 50
    assert [unit["name"] for unit in found["units"]] == ["first"]
    assert found["not_run"] == [
        {"name": "slow", "why": f"{records.NO_TIME}; it was running"},
        {"name": "last", "why": records.NO_TIME},
    ]


def test_a_stage_that_hangs_leaves_time_to_the_others(tmp_path):
    stage = Stage("stage", (("-c", "import time; time.sleep(600)"),), "a stage", share=0.01)
    began = time.time()
    run(stage, tmp_path / "log", began + 500, dict(os.environ))
    assert time.time() - began < 100


def test_a_stage_that_cannot_begin_is_named(run_part, tmp_path):
    found = run_part("raise SystemExit('no such module')", seconds=100)
    assert found["not_run"] == [{"name": "stage", "why": "nothing began; see log"}]
    assert "no such module" in (tmp_path / "log").read_text()


def test_a_line_that_was_left_half_written_is_ignored(tmp_path):
    file = tmp_path / "records"
    line = {"name": "a", "outcome": "passed"}
    file.write_text(f'{{"planned": ["a", "b"]}}\n{json.dumps(line)}\n{{"name": "b", "outc')
    assert records.Record.read(file).missing == ["b"]


def test_the_suite_s_own_python_runs_the_stages(run_part, tmp_path):
    run_part("import sys; print(sys.executable)", seconds=100)
    assert sys.executable in (tmp_path / "log").read_text()
