"""Kills and full disks while adapters, checkpoints and conversions are saved.

What was there before is whole; what is new is whole, or absent.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTrainer, PrefixTuningModel
from fastprefix.cli.convert import run_conversion
from fastprefix.formats.peft_prefixes import load_adapter, save_adapter
from fastprefix.tuning.trainer import PrefixTrainingArguments
from fastprefix_testing import interruptions

# How far apart the moments of the kills are, where there are many.
EVERY = 3


def told(folder: Path) -> tuple:
    """All that loading an adapter gives, to be compared."""
    found = load_adapter(folder)
    kv = found.kv
    return (
        [x.tolist() for x in kv.tensors],
        (kv.position_offset, kv.in_window, kv.reweighting and kv.reweighting.kind),
        {name: x.tolist() for name, x in found.heads.items()},
        found.config,
    )


def restored(folder: Path, template: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(template, folder)


@pytest.fixture
def savers():
    """Functions that save, by what: each other's files differ in number, kind and length."""

    def of(config: PrefixConfig, **options: Any) -> Any:
        tuned = PrefixTuningModel(tiny.build(), config)
        return lambda folder: tuned.save_pretrained(folder, **options)

    cartridge = of(PrefixConfig(4, peft_type="CARTRIDGE", num_frozen_tokens=2, init_std=1.0))
    return {
        "PEFT's": cartridge,
        "ours": of(PrefixConfig(6, gated=True, init_std=1.0)),
        "bin": of(PrefixConfig(4, init_std=1.0), safe_serialization=False),
    }


@pytest.mark.parametrize("pair", [("PEFT's", "ours"), ("ours", "PEFT's"), ("PEFT's", "bin")])
def test_save_pretrained_is_killed(ram_path, savers, pair):
    old, new = (savers[what] for what in pair)
    folder, template = ram_path / "adapter", ram_path / "template"
    new(folder)
    after = told(folder)
    shutil.rmtree(folder)
    old(template)
    before = told(template)
    shutil.copytree(template, folder)
    steps = interruptions.steps_of(lambda: new(folder))
    seen = []
    for step in range(0, steps, EVERY):
        restored(folder, template)
        interruptions.killed_at(step, lambda: new(folder))
        found = told(folder)
        assert found in (before, after), step
        seen.append(found == after)
    assert seen == sorted(seen), "from some step on, the new ones"
    assert {*seen} == {False, True}
    for nbytes in (0, 1, 500, 2000):
        restored(folder, template)
        assert interruptions.killed_at_byte(nbytes, lambda: new(folder))
        assert told(folder) == before
    new(folder)
    assert told(folder) == after
    assert not list(folder.rglob(".fastprefix-*")), "what the killed ones left is gone"


def test_the_first_save_is_killed(ram_path, savers):
    """There is the whole adapter, or none."""
    folder = ram_path / "adapter"
    steps = interruptions.steps_of(lambda: savers["ours"](folder))
    shutil.rmtree(folder)
    loaded = []
    for step in range(0, steps, 2 * EVERY):
        interruptions.killed_at(step, lambda: savers["ours"](folder))
        try:
            told(folder)
        except FileNotFoundError:
            loaded.append(False)
        else:
            loaded.append(True)
        shutil.rmtree(folder, ignore_errors=True)
    assert loaded == sorted(loaded)
    assert {*loaded} == {False, True}


@pytest.fixture(params=["tmpfs", "limit"])
def how(request, tmp_path):
    if request.param == "tmpfs" and not interruptions.can_mount(tmp_path):
        pytest.skip("no disk of one's own here")
    return request.param


REASONS = ("No space left on device", "File too large")


@pytest.mark.parametrize("pair", [("PEFT's", "ours"), ("ours", "PEFT's"), ("PEFT's", "bin")])
def test_save_pretrained_without_room(tmp_path, savers, how, pair):
    old, new = (savers[what] for what in pair)
    new(tmp_path / "new")
    old(tmp_path / "old")
    before, after = told(tmp_path / "old"), told(tmp_path / "new")
    outcomes = set()
    for i, room in enumerate((0, 300, 8192, 16384, 32768, 500_000)):
        disk = tmp_path / f"disk {i}"
        disk.mkdir()
        message, found = interruptions.without_room(
            disk,
            how,
            lambda disk: old(disk / "adapter"),
            lambda disk: new(disk / "adapter"),
            lambda disk: told(disk / "adapter"),
            room,
        )
        if message is None:
            assert found == after
        else:
            assert message.endswith(REASONS)
            assert f"{disk}/adapter" in message
            assert ".fastprefix-" not in message
            # a model card that does not fit is no part of the adapter
            assert found == (after if "README.md" in message else before)
        outcomes.add(message is None)
    assert outcomes == {False, True}


def test_a_file_without_room(tmp_path, how):
    def make(number: float) -> PrefixKV:
        x = torch.full((2, 8, 16), number)
        return PrefixKV([x], [x], 8)

    def work(disk: Path) -> None:
        make(2.0).save(disk / "kv.safetensors")

    for i, room in enumerate((0, 1000, 4096, 100_000)):
        disk = tmp_path / f"disk {i}"
        disk.mkdir()
        message, found = interruptions.without_room(
            disk,
            how,
            lambda disk: make(1.0).save(disk / "kv.safetensors"),
            work,
            lambda disk: (
                float(PrefixKV.load(disk / "kv.safetensors").keys[0].mean()),
                sorted(path.name for path in disk.iterdir() if path.name != "filler"),
            ),
            room,
        )
        assert found[1] == ["kv.safetensors"]
        assert (message is None) >= (room == 100_000)
        if message is None:
            assert (found[0], room >= 4096) == (2.0, True)
        else:
            assert found[0] == 1.0
            assert message.startswith(f"file: {disk}/kv.safetensors cannot be written: ")
            assert message.endswith(REASONS)


def kv(number: float, P: int) -> PrefixKV:
    x = torch.full((2, P, 16), number)
    return PrefixKV([x, x], [x, x], P)


def convert(folder: Path, to: str) -> None:
    target = folder / ("target.safetensors" if to == "fastprefix" else "target")
    try:
        run_conversion(folder / "source", target, to, None, "float32", False, True)
    except ValueError as error:  # the command line's words for it
        raise error.__cause__ or error from None


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """What is printed goes to no file, which a limit on files would concern."""
    monkeypatch.setattr("fastprefix.cli.convert.console", Console(file=io.StringIO()))


def converted(folder: Path) -> int:
    """How long what is at the target is."""
    if (folder / "target").exists():
        return load_adapter(folder / "target").kv.num_virtual_tokens
    return PrefixKV.load(folder / "target.safetensors").num_virtual_tokens


def sources(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_adapter(folder / "source", kv(2.0, 8), {})


def targets(folder: Path, to: str) -> None:
    if to == "fastprefix":
        kv(1.0, 4).save(folder / "target.safetensors")
    else:
        save_adapter(folder / "target", kv(1.0, 4), {}, kind="CARTRIDGE")


@pytest.mark.parametrize("to", ["fastprefix", "CARTRIDGE"])
def test_convert_is_killed(ram_path, to):
    folder, template = ram_path / "files", ram_path / "template"
    sources(template)
    targets(template, to)
    shutil.copytree(template, folder)
    steps = interruptions.steps_of(lambda: convert(folder, to))
    seen = []
    for step in range(0, steps, EVERY):
        restored(folder, template)
        interruptions.killed_at(step, lambda: convert(folder, to))
        seen.append(converted(folder))
    assert seen == sorted(seen)
    assert {*seen} == {4, 8}


@pytest.mark.parametrize("to", ["fastprefix", "CARTRIDGE"])
def test_convert_without_room(tmp_path, how, to):
    def before(disk: Path) -> None:
        sources(disk)
        targets(disk, to)

    for i, room in enumerate((0, 4096, 500_000)):
        disk = tmp_path / f"disk {i}"
        disk.mkdir()
        message, found = interruptions.without_room(
            disk, how, before, lambda disk: convert(disk, to), converted, room
        )
        assert found == (8 if message is None else 4)
        assert (message is None) == (room == 500_000)
        if message is not None:
            assert f"{disk}/target" in message
            assert message.endswith(REASONS)


@pytest.fixture
def trainer(ram_path):
    """A trainer that has made its first step, and a checkpoint of it."""
    tuned = PrefixTuningModel(tiny.build(), PrefixConfig(4))
    ids = (torch.arange(4)[:, None] % 3 + torch.arange(6) * 7 + 1) % tiny.VOCAB
    arguments = PrefixTrainingArguments(
        str(ram_path / "out"),
        max_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    made = PrefixTrainer(
        tuned, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in ids]
    )
    made.train()
    made.state.global_step = 2
    return made


def checkpoint(trainer: PrefixTrainer) -> None:
    trainer._save_checkpoint(trainer.model, None)


def files_of(folder: Path) -> dict[str, int]:
    """Sizes of the files of a checkpoint, each of which can be read."""
    for file in folder.glob("*.safetensors"):
        load_file(file)
    for file in folder.glob("*.json"):
        json.loads(file.read_text())
    for file in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        torch.load(file, weights_only=False)
    load_adapter(folder)
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_checkpoint_is_killed(trainer, ram_path):
    out, template = ram_path / "out", ram_path / "template"
    shutil.copytree(out, template)
    first = files_of(out / "checkpoint-1")
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_config.json"} <= {*first}
    steps = interruptions.steps_of(lambda: checkpoint(trainer))
    second = files_of(out / "checkpoint-2")
    assert second.keys() == first.keys()
    places = sorted({*range(0, steps, max(1, steps // 24)), *range(max(0, steps - 16), steps)})
    seen = []
    for step in places:
        restored(out, template)
        interruptions.killed_at(step, lambda: checkpoint(trainer))
        assert files_of(out / "checkpoint-1") == first
        last = get_last_checkpoint(str(out))
        if last.endswith("checkpoint-2"):
            assert files_of(out / "checkpoint-2").keys() == second.keys()
        seen.append(last.endswith("checkpoint-2"))
    assert seen == sorted(seen)
    assert {*seen} == {False, True}
    restored(out, template)
    assert interruptions.killed_at_byte(1000, lambda: checkpoint(trainer))
    assert list(out.glob(".fastprefix-*.partial"))
    trainer.train(resume_from_checkpoint=True)
    assert not list(out.glob(".fastprefix-*")), "what was left over is gone"


def test_a_checkpoint_without_room(trainer, tmp_path, how):
    outcomes = set()
    for i, room in enumerate((0, 2000, 8192, 40_000, 600_000)):
        disk = tmp_path / f"disk {i}"
        disk.mkdir()

        def before(disk: Path) -> None:
            shutil.copytree(trainer.args.output_dir, disk / "out")
            trainer.args.output_dir = str(disk / "out")

        message, found = interruptions.without_room(
            disk,
            how,
            before,
            lambda disk: checkpoint(trainer),
            lambda disk: (
                get_last_checkpoint(str(disk / "out")),
                files_of(disk / "out" / "checkpoint-1"),
            ),
            room,
        )
        assert found[1] == files_of(Path(trainer.args.output_dir) / "checkpoint-1")
        assert found[0].endswith("checkpoint-2" if message is None else "checkpoint-1")
        if message is not None:
            assert f"{disk}/out" in message
            assert "checkpoint-2" in message
            assert "\n" not in message
            assert ".fastprefix-" not in message
        outcomes.add(message is None)
    assert outcomes == {False, True}


def test_old_checkpoints_go_and_the_best_is_known(tmp_path):
    """The Trainer of transformers looks for both in the folder that it writes to."""
    tuned = PrefixTuningModel(tiny.build(), PrefixConfig(4))
    ids = (torch.arange(4)[:, None] % 3 + torch.arange(6) * 7 + 1) % tiny.VOCAB
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = PrefixTrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first
        save_total_limit=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.3,
    )
    trainer = PrefixTrainer(tuned, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / best)
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {best, "checkpoint-4"} | ({"checkpoint-3"} if best == "checkpoint-4" else set())
    for name in there:
        state = json.loads((tmp_path / "out" / name / "trainer_state.json").read_text())
        told = state["best_model_checkpoint"]
        assert told.startswith(str(tmp_path / "out" / "checkpoint-"))
    with contextlib.suppress(KeyError):
        load_adapter(tmp_path / "out" / best)
