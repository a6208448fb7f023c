"""The section on GPUs of docs/benchmarks.md is what the JSON says, or says that there is none."""

import json
from pathlib import Path

import pytest

from device import report
from device.records import NO_TIME

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"


def between_marks(text):
    return text.split(report.BEGIN)[1].split(report.END)[0].strip()


def test_the_page_holds_what_was_measured():
    found = report.measured(RESULTS)
    written = between_marks((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    assert written.startswith(report.section(found))
    assert (found is None) == ("Nothing was measured" in written)


def stage(name, *units, not_run=()):
    outcomes = {"passed": len(units)}
    return {"name": name, "units": list(units), "not_run": list(not_run), "outcomes": outcomes}


@pytest.fixture
def found():
    """As a run on a GPU writes it; the numbers are invented."""
    versions = {"torch": "2.11", "triton": "3.6.0", "transformers": "5.17.0"}
    about = {"name": "about", "outcome": "passed", "device": "NVIDIA H200", "driver": "580",
             "versions": versions, "commit": "0123456789abcdef", "changed": False,
             "data_sheet": {"tbytes_per_s": 4.8, "tflop_per_s": 989}}  # fmt: skip
    row = {"name": "decode", "outcome": "passed", "label": "decode B32",
           "ms": {"ours": 0.02, "sdpa": 0.08},
           "left_out": {"flex": f"NotImplementedError: {NO_TIME}", "fa2": "not installed"},
           "kernels": {"sdpa": ["void flash_fwd<x>(y)"]},
           "rates": {"ours": {"tbytes_per_s": 3.1, "tflop_per_s": 50.0}}}  # fmt: skip
    model = {"name": "m", "outcome": "passed", "label": "generate", "model": "SmolLM2-135M",
             "tokens_per_s": {"ours": 1000.0}, "peak_bytes": {"ours": 2e9}}  # fmt: skip
    late = {"name": "prefill B8", "why": NO_TIME}
    return {
        "reduced": False,
        "stages": [
            stage("about", about), stage("numerics", {"name": "t", "outcome": "passed"}),
            stage("operator", row, not_run=[late]), stage("model figures", model),
        ],
    }  # fmt: skip


def test_a_run_becomes_a_section_and_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    file, page = tmp_path / "gpu.json", tmp_path / "page.md"
    file.write_text(json.dumps(found))
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.draw(file, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    section = between_marks(text)
    for part in ("NVIDIA H200", "commit 0123456789.", "| decode B32 | **0.020** | 0.080 |",
                 "3.10, 50", "`flash_fwd`", "1000 tokens/s",
                 f"Not run: prefill B8 ({NO_TIME}), flex at decode B32 ({NO_TIME})."):  # fmt: skip
        assert part in section, part
    assert (tmp_path / report.PICTURE).stat().st_size > 5_000


def test_a_run_of_the_interpreter_is_no_measurement(found, tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(found | {"reduced": True}))
    assert report.measured(file) is None
