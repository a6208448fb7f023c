"""``fastprefix train``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from fastprefix.cli.console import tell, working
from fastprefix.cli.errors import blaming
from fastprefix.cli.loading import load_causal, load_tokenizer
from fastprefix.cli.prompts import save_template
from fastprefix.cli.training import train_prefix
from fastprefix.tasks import files
from fastprefix.tasks.encoding import Encoding
from fastprefix.tasks.loading import load_examples
from fastprefix.tasks.registry import get_task
from fastprefix.tuning import PrefixConfig, PrefixTuningModel
from fastprefix.tuning.trainer import FitOptions

LONGEST = 2**20  # tokens; nothing is cut off, and what is longer than a user's limit is refused


def run_training(
    model_name: str,
    dtype: str,
    data: Path | None,
    output: Path,
    config: PrefixConfig,
    options: FitOptions,
    max_length: int,
) -> None:
    """Reads the records, loads the model, trains and saves."""
    with blaming("--data"):
        examples = load_examples("descriptions") if data is None else _examples_of(data)
    tokenizer = load_tokenizer(model_name)
    encoding = Encoding(get_task("descriptions"), tokenizer, "CAUSAL_LM", 2 * LONGEST, LONGEST)
    items = list(encoding.items(examples))
    for example, item in zip(examples, items, strict=True):  # before the model is loaded
        length = len(item["input_ids"])
        if length > max_length:
            raise ValueError(
                f"--data: the record {example.source!r} is {length} tokens long, more than "
                f"max_length={max_length}"
            )
    set_seed(options.seed)
    with working(f"loading {model_name}"):
        model = load_causal(model_name, getattr(torch, dtype))
    tuned = PrefixTuningModel(model, config, tokenizer)
    with contextlib.redirect_stdout(sys.stderr):
        tuned.print_trainable_parameters()
    losses = train_prefix(tuned, items, encoding.collator(), options)
    with blaming("--output"):
        tuned.save_pretrained(output)
        save_template(tokenizer, output)
    tell(
        f"training loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; "
        f"adapter saved in {output}"
    )


def _examples_of(data: Path) -> list[Any]:
    """The records of a file, all of them to train with."""
    read = files.description_lines if data.suffix.lower() == ".jsonl" else files.attribute_lines
    rows = read(data)
    if not rows:
        raise ValueError(f"{data}: no records; the file is empty")
    for number, row in enumerate(rows, start=1):
        for key in ("attributes", "description"):
            if key not in row:
                raise ValueError(f'{data}, line {number}: the key "{key}" is missing')
    return [get_task("descriptions").read(row) for row in rows]
