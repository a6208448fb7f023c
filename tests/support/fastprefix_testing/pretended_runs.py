"""A stand-in for a training run that writes the same files at once, and fails when it is told to.

It is for tests of what happens around runs: processes that end, folders, reports. What a run
computes here is made up, from its configuration alone. ``options: {"pretend": WHAT}`` has it fail,
``options: {"wait_for": FILE}`` has it go on only when there is such a file.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprefix.files import json_text, written_whole
from fastprefix.training.config import RunConfig
from fastprefix.training.engines import Event, Job, Train

TRAINABLE = {"prefix": 9_216, "prompt": 576, "lora": 460_800, "full": 134_515_008, "none": 0}
TOTAL = 134_515_008
SOURCES = ("name[Alimentum], area[city centre]", "name[Aromi], eatType[coffee shop]")


def train(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What train_run writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.yaml())
    with (folder / "began").open("a") as began:
        began.write(f"{os.getpid()}\n")
    print(f"a line of {config.method}")
    _misbehave(config.options)
    environment = {"machine": "2 CPU cores, pretended", "python": "3", "commit": None}
    (folder / "environment.json").write_text(json_text(environment))
    lines, best = _curve(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = _result(config, best)
    with written_whole(folder / "result.json") as partial:
        partial.write_text(json_text(result))
    return result


def times_begun(folder: Path) -> int:
    """How often :func:`train` began in a folder."""
    return len((folder / "began").read_text().splitlines())


class InThisProcess:
    """An engine without processes."""

    def run(self, jobs: Sequence[Job], train: Train) -> Generator[Event, None, None]:
        """One job after the other."""
        for index, job in enumerate(jobs):
            yield Event(index, "started")
            try:
                train(job.config, job.folder)
            except ValueError as error:
                yield Event(index, "failed", str(error))
            else:
                yield Event(index, "finished")


def _misbehave(options: Mapping[str, Any]) -> None:
    how = options.get("pretend")
    if how == "raise":
        raise ValueError("options: got pretend, takes <less> | *more*")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    while "wait_for" in options and not Path(options["wait_for"]).exists():
        time.sleep(0.05)


def _rate(config: RunConfig) -> float:
    return 1e-2 if config.learning_rate is None else config.learning_rate


def _quality(config: RunConfig) -> float:
    """From 0 to 1: more to train is better, up to a point, and so is a rate near 0.01."""
    length = config.options.get("num_virtual_tokens", 20)
    trainable = TRAINABLE[config.method] * length / 20
    off = abs(math.log10(max(_rate(config), 1e-9) / 1e-2))
    noise = random.Random(f"{config.seed}{config.options}{config.method}").gauss(0, 0.015)
    if config.method == "none":
        return 0.1
    return min(0.95, 0.35 + 0.08 * math.log10(trainable + 1) - 0.15 * off + noise)


def _curve(config: RunConfig) -> tuple[list[dict[str, Any]], int]:
    if config.method == "none":
        return [], 0
    steps, end = config.max_steps or 100, 3.4 - 2 * _quality(config)
    noise = random.Random(config.seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = end + 1.5 * math.exp(-5 * step / steps)
        line = {"step": step, "epoch": step / 40, "seconds": 0.3 * step}
        lines.append(line | {"loss": loss + noise.gauss(0, 0.1), "learning_rate": _rate(config)})
        if step % max(1, steps // 8) == 0:
            lines.append(line | {"eval_loss": loss + 0.05 + 0.2 * max(0, step / steps - 0.7)})
    best = min((line for line in lines if "eval_loss" in line), key=lambda line: line["eval_loss"])
    return lines, best["step"]


def _result(config: RunConfig, best: int) -> dict[str, Any]:
    quality, trains = _quality(config), config.method != "none"
    trainable = TRAINABLE[config.method] * config.options.get("num_virtual_tokens", 20) // 20
    loss = 3.4 - 2 * quality
    if config.task == "e2e_nlg":
        metrics = {"bleu": 60 * quality, "rouge_l": 70 * quality, "chrf": 65 * quality}
    else:
        metrics = {"accuracy": quality, "f1": quality - 0.01}
    result: dict[str, Any] = {
        "task": config.task, "model": config.model, "method": config.method, "seed": config.seed,
        "learning_rate": _rate(config) if trains else 0.0, "trainable": trainable, "total": TOTAL,
        "bytes": 4 * trainable, "steps": (config.max_steps or 100) if trains else 0,
        "best_step": best, "validation": {"loss": loss + 0.05}, "test": {**metrics, "loss": loss},
    }  # fmt: skip
    if trains:
        memory = 3e8 + 8 * trainable + 1e6 * config.options.get("num_virtual_tokens", 20)
        result |= {
            "seconds": 30.0, "peak_memory": int(memory), "train_loss": loss,
            "seconds_per_step": 0.3 + 0.002 * config.options.get("num_virtual_tokens", 20),
        }  # fmt: skip
    if config.task == "e2e_nlg":
        result["samples"] = [
            {
                "source": source,
                "written": f"{source.split(']')[0][5:]} <b>is</b> a | place, by {config.method}.",
                "references": [f"Reference of {source}.", "Another one."],
            }
            for source in SOURCES
        ]
    return result
