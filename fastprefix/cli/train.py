"""``fastprefix train``."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import set_seed

from fastprefix.cli.console import TrainingProgress, console
from fastprefix.cli.loading import load
from fastprefix.cli.prompts import save_template
from fastprefix.tasks import Collator, DescriptionDataset, load_descriptions, load_records
from fastprefix.tuning import PrefixConfig, PrefixTuningModel
from fastprefix.tuning.trainer import FitOptions, fit


def run_training(
    model_name: str,
    dtype: str,
    data: Path | None,
    output: Path,
    config: PrefixConfig,
    options: FitOptions,
    max_length: int,
) -> None:
    """Loads, trains, saves."""
    records = load_descriptions("train") if data is None else load_records(data)
    set_seed(options.seed)
    with console.status(f"loading {model_name}"):
        model, tokenizer = load(model_name, getattr(torch, dtype))
    items = DescriptionDataset(records, tokenizer, max_length)
    tuned = PrefixTuningModel(model, config, tokenizer)
    tuned.print_trainable_parameters()
    losses = fit(tuned, items, Collator(tokenizer), options, [TrainingProgress()])
    tuned.save_pretrained(output)
    save_template(tokenizer, output)
    console.print(
        f"training loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; "
        f"adapter saved in {output}"
    )
