"""Whole comparisons with real training of a tiny model: in processes, on Ray, killed."""

import importlib.util
import json
import signal

import pytest
import yaml

from fastprefix.training.compare import run_compare
from fastprefix.training.engines import LocalEngine, RayEngine
from fastprefix.training.grid import CompareConfig
from fastprefix.training.report import write_report
from fastprefix.training.run import read_metrics
from fastprefix_testing.comparisons import eventually, start

HAS_RAY = importlib.util.find_spec("ray") is not None
DISHES = ("soup", "bread", "rice", "fish")
PLACES = ("Bridge", "Mill", "Harbour", "Station", "Garden")


@pytest.fixture
def base(tmp_path, tiny_folder):
    """A run that takes seconds, on a few records that are made here."""
    files = {}
    for split, dishes in (("train", DISHES), ("test", DISHES[:1])):
        rows = [
            {
                "meaning_representation": f"name[The {place}], food[{dish}]",
                "target": f"The {place} serves {dish}.",
                "references": [],
            }
            for place in PLACES
            for dish in dishes
        ]
        files[split] = str(tmp_path / f"{split}.jsonl")
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "e2e_nlg", "model": tiny_folder, "data_files": files, "max_steps": 6,
        "batch_size": 2, "eval_steps": 2, "max_length": 64, "max_target_length": 16,
        "test_size": 3, "save": False, "options": {"num_virtual_tokens": 4},
    }  # fmt: skip


def finished(folder):
    files = sorted(folder.glob("runs/*/result.json"))
    return {file.parent.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_a_comparison_of_real_runs(tmp_path, base):
    methods = {
        "prefix": {"learning_rate": [1e-30, 3e-2]},  # the first cannot learn
        "full": {"method": "full", "options": {}, "learning_rate": 1e-2},
    }
    config = CompareConfig.of({"base": base, "methods": methods, "seeds": [0]})
    comparison = run_compare(config, tmp_path, engine=LocalEngine(2))
    assert comparison.failed == []
    assert comparison.rates == {"prefix": 3e-2, "full": 1e-2}
    sizes = {o.run.cell.method: o.result["trainable"] for o in comparison.outcomes}
    assert sizes["prefix"] == 2 * 2 * 4 * 2 * 16  # layers, keys and values, tokens, heads, size
    page = write_report(comparison, tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert page.count("<img") == 3
    assert "name\\[The " in markdown
    assert all(o.result["samples"][0]["source"] in page for o in comparison.outcomes)


def test_real_runs_that_are_killed_go_on_from_their_checkpoint(tmp_path, base):
    """The report that comes out at the end is that of a comparison that nobody killed."""
    slow = base | {"max_steps": 60, "eval_steps": 20}
    methods = {"prefix": {"max_steps": 2}, "full": {"method": "full", "options": {}}}
    config = {"base": slow, "methods": methods, "seeds": [0]}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))

    def checkpoints():
        return list(tmp_path.glob("runs/full-*/checkpoints/checkpoint-20/trainer_state.json"))

    first = start(file, tmp_path, 1)
    try:
        assert eventually(checkpoints, 400)
        before = finished(tmp_path)
    finally:
        first.kill()
        _, told = first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL, told
    assert [name.partition("-")[0] for name in before] == ["prefix"]
    second = start(file, tmp_path, 1)
    _, told = second.communicate(timeout=400)
    assert second.returncode == 0, told
    after = finished(tmp_path)
    assert {name: after[name] for name in before} == before
    (full,) = tmp_path.glob("runs/full-*")
    steps = [line["step"] for line in read_metrics(full) if "loss" in line]
    assert steps == list(range(1, 61))
    result = json.loads((full / "result.json").read_text())
    assert result["steps"] == 60
    assert "2 of 2 runs finished" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(not HAS_RAY, reason="needs the package ray")
def test_a_comparison_on_a_ray_cluster(tmp_path, base):
    """A cluster on this machine; what it did, the local engine need not do again."""
    methods = {
        "prefix": {},
        "broken": {"method": "lora", "options": {"r": 0}},
    }
    config = CompareConfig.of({"base": base, "methods": methods, "seeds": [0]})
    comparison = run_compare(config, tmp_path, engine=RayEngine(jobs=2))
    (failed,) = comparison.failed
    assert failed.run.cell.method == "broken"
    assert "`r` should be a positive integer" in failed.error
    good = comparison.outcomes[0]
    assert good.result["steps"] == 6
    before = finished(tmp_path)
    assert list(before) == [good.folder.name]
    good_only = CompareConfig.of({"base": base, "methods": {"renamed": {}}, "seeds": [0]})
    again = run_compare(good_only, tmp_path, engine=LocalEngine())
    assert [(outcome.known, outcome.result) for outcome in again.outcomes] == [(True, good.result)]
    assert finished(tmp_path) == before
