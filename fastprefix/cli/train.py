"""``fastprefix train``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from transformers import set_seed

from fastprefix.cli.console import tell, working
from fastprefix.cli.errors import blaming
from fastprefix.cli.prompts import save_template
from fastprefix.cli.training import train_prefix
from fastprefix.tasks import Collator, DescriptionDataset, load_descriptions, load_records
from fastprefix.training.base_models import load_causal, load_tokenizer
from fastprefix.tuning import PrefixConfig, PrefixTuningModel
from fastprefix.tuning.trainer import FitOptions


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
        records = load_descriptions("train") if data is None else load_records(data)
    tokenizer = load_tokenizer(model_name)
    with blaming("--data"):  # before the model: a record may be too long
        items = DescriptionDataset(records, tokenizer, max_length)
    set_seed(options.seed)
    with working(f"loading {model_name}"):
        model = load_causal(model_name, getattr(torch, dtype))
    tuned = PrefixTuningModel(model, config, tokenizer)
    with contextlib.redirect_stdout(sys.stderr):
        tuned.print_trainable_parameters()
    losses = train_prefix(tuned, items, Collator(tokenizer), options)
    with blaming("--output"):
        tuned.save_pretrained(output)
        save_template(tokenizer, output)
    tell(
        f"training loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; "
        f"adapter saved in {output}"
    )
