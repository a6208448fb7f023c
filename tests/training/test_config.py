"""Configurations of runs: read from YAML, and refused in one line that names the field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import SchedulerType

from fastprefix.training.config import LEARNING_RATES, SCHEDULERS, RunConfig

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "task: got nothing, takes a value"),
    ({"batchsize": 4}, "batchsize: unknown; did you mean batch_size?"),
    ({"xyz": 4}, "xyz: unknown; takes task, model, method"),
    ({"batch_size": 0}, "batch_size: got 0, takes greater than or equal to 1"),
    ({"batch_size": "many"}, "batch_size: got 'many', takes a valid integer"),
    ({"learning_rate": float("nan")}, "learning_rate: got nan, takes"),
    ({"method": "prefixes"}, "method: got 'prefixes', takes 'prefix', 'prompt'"),
    ({"dtype": "float8"}, "dtype: got 'float8', takes 'float32', 'bfloat16' or 'float16'"),
    ({"data_files": {"dev": "a.csv"}}, "data_files.dev"),
    ({"max_steps": 1, "epochs": 1}, "max_steps, epochs: got both, takes one of them"),
    ({"streaming": True}, "streaming: got no max_steps, which it takes"),
    ({"method": "full", "options": {"r": 8}}, "options: got ['r'], but full has none"),
    ({"lr_scheduler": "liner"}, "lr_scheduler: got 'liner', did you mean linear?"),
    ({"seed": -1}, "seed: got -1, takes greater than or equal to 0"),
    ({"batch_size": 0, "seeds": 1}, "seeds: unknown; did you mean seed?"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(values: dict[str, Any], said: str) -> None:
    task = {} if said.startswith("task") else {"task": "bbc"}
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        RunConfig.of(task | values)
    assert "\n" not in str(caught.value)


def test_a_file_says_the_same(tmp_path: Path) -> None:
    config = RunConfig.of(
        {"task": "bbc", "options": {"num_virtual_tokens": 3}, "data_files": {"train": "a.csv"}}
    )
    file = tmp_path / "run.yaml"
    file.write_text(config.yaml())
    assert RunConfig.read(file) == config
    file.write_text("task: [")
    with pytest.raises(ValueError, match=r"run\.yaml: not YAML"):
        RunConfig.read(file)
    file.write_text("- task")
    with pytest.raises(ValueError, match=r"run\.yaml: got list, takes fields with values"):
        RunConfig.read(file)
    file.write_text("task: bbc\nbatchsize: 3")
    with pytest.raises(ValueError, match=r"run\.yaml: batchsize: unknown"):
        RunConfig.read(file)


def test_schedules_are_those_of_transformers() -> None:
    assert set(SCHEDULERS) <= {kind.value for kind in SchedulerType}


def test_every_method_has_a_rate() -> None:
    for method, rate in LEARNING_RATES.items():
        assert RunConfig.of({"task": "bbc", "method": method}).rate == rate
    assert RunConfig.of({"task": "bbc", "learning_rate": 0.5}).rate == 0.5


@pytest.mark.parametrize(
    ("values", "processes", "steps"),
    [
        ({}, 1, 38),  # three passes through 100 examples, 8 at a time
        ({"epochs": 1, "batch_size": 25}, 1, 4),
        ({"epochs": 0.5, "batch_size": 25}, 1, 2),
        ({"epochs": 2, "batch_size": 10}, 2, 10),
        ({"epochs": 1, "batch_size": 5, "gradient_accumulation_steps": 4}, 1, 5),
        ({"max_steps": 7}, 4, 7),
        ({"method": "none"}, 1, 0),
    ],
)
def test_steps(values: dict[str, Any], processes: int, steps: int) -> None:
    assert RunConfig.of({"task": "bbc"} | values).steps_of(100, processes) == steps
