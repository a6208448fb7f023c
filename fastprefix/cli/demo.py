"""``fastprefix demo``: train, save, load and measure on one real model, beside PEFT."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fastprefix.cli.console import console, working
from fastprefix.cli.errors import blaming
from fastprefix.cli.outputs import write_text
from fastprefix.cli.prompts import save_template
from fastprefix.cli.training import train_prefix
from fastprefix.cli.versus_peft import Workload, compare
from fastprefix.hf import unpatch_model
from fastprefix.hf.versions import peft_mismatch
from fastprefix.tasks.encoding import Encoding
from fastprefix.tasks.loading import load_examples
from fastprefix.tasks.measuring import mean_loss, write
from fastprefix.tasks.registry import get_task
from fastprefix.tasks.task import Example
from fastprefix.training.base_models import load
from fastprefix.training.speed import fast_dtype
from fastprefix.tuning import PrefixConfig, PrefixTuningModel
from fastprefix.tuning.trainer import FitOptions

_INIT_TEXT = (
    "Describe the item given by its attributes in one plain sentence that names it first, "
    "says what it is, and mentions every attribute."
)
_MAX_LENGTH = 192
_WITHOUT_PEFT = (
    "[bold yellow]Without PEFT beside it:[/] {reason}. Its figures would be wrong "
    "and are left out; `make demo` sets up an environment in which both run."
)


def run_demo(
    model_name: str, json_file: Path | None, output: Path, steps: int, seed: int
) -> dict[str, Any]:
    """Runs and prints all parts. Returns the figures, which also go into the JSON file."""
    set_seed(seed)
    started = time.perf_counter()
    no_peft = peft_mismatch()
    if no_peft is not None:
        console.print(_WITHOUT_PEFT.format(reason=no_peft))
    with working(f"loading {model_name}"):
        model, tokenizer = load(model_name, fast_dtype(torch.device("cpu")))
    encoding = Encoding(get_task("descriptions"), tokenizer, "CAUSAL_LM", _MAX_LENGTH)
    # nothing is chosen by a validation split, so its records are learned from, too
    train = [*load_examples(encoding.task, "train"), *load_examples(encoding.task, "validation")]
    heldout = load_examples(encoding.task, "test")
    shown = heldout[:: max(1, len(heldout) // 3)][:3]

    console.rule("1. Train a 32-token prefix")
    with working("held-out loss and descriptions without a prefix"):
        before = mean_loss(model, encoding, heldout)
        said_before = write(model, encoding, shown)
    config = PrefixConfig(num_virtual_tokens=32, init="text", init_text=_INIT_TEXT)
    tuned = PrefixTuningModel(model, config, tokenizer)
    tuned.print_trainable_parameters()
    options = FitOptions(steps=steps, seed=seed)
    train_prefix(tuned, list(encoding.items(train)), encoding.collator(), options)
    with working("held-out loss and descriptions with the prefix"):
        after = mean_loss(tuned, encoding, heldout)
        said_after = write(tuned, encoding, shown)
    console.print(
        f"held-out loss per target token: {before:.3f} without the prefix, "
        f"[bold]{after:.3f}[/] with it ({1 - after / before:.0%} lower; {len(heldout)} records)"
    )
    console.print(_descriptions(shown, said_before, said_after))

    console.rule("2. Save it, load it" + (", load it into PEFT (float32)" if not no_peft else ""))
    model.float()
    probe = encoding.collator()(list(encoding.items(heldout[:8])))
    logits = _saved_and_loaded(tuned, tokenizer, output, probe)
    console.print(f"loaded back from {output}: equal logits")
    losses = {"before": before, "fastprefix": after}
    figures: dict[str, Any] = {"model": model_name, "steps": steps, "held_out_loss": losses}
    if no_peft is None:
        difference, losses["peft"] = _in_peft(model, output, probe, logits, encoding, heldout)
        console.print(
            f"the same files in PEFT: largest logit difference {difference:.1e}, "
            f"held-out loss {losses['peft']:.3f}"
        )
        figures["peft_max_logit_diff"] = {"fastprefix": 0.0, "peft": difference}

        console.rule("3. Beside PEFT, in this run")
        figures |= _measured_beside_peft(model)
    else:
        figures["peft"] = f"not run: {no_peft}"
    figures["threads"] = torch.get_num_threads()
    figures["seconds"] = time.perf_counter() - started
    if json_file is not None:
        with blaming("--json"):
            write_text(json_file, json.dumps(figures, indent=2) + "\n")
        console.print(f"figures written to {json_file}")
    return figures


def _saved_and_loaded(
    tuned: PrefixTuningModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    probe: dict[str, Tensor],
) -> Tensor:
    """Saves the adapter, loads it back, and leaves the base without a patch.

    Returns:
        The logits of the probe, which are the same before and after.

    Raises:
        RuntimeError: they are not.
    """
    model = tuned.get_base_model()
    with torch.no_grad():
        logits = tuned(**probe).logits
    with blaming("--output"):
        tuned.save_pretrained(output)
        save_template(tokenizer, output)
    unpatch_model(model)
    reloaded = PrefixTuningModel.from_pretrained(model, output)
    with torch.no_grad():
        equal = bool(torch.equal(reloaded(**probe).logits, logits))
    if not equal:
        raise RuntimeError("the adapter that was loaded back gives other logits")
    unpatch_model(model)
    return logits


def _in_peft(
    model: PreTrainedModel,
    folder: Path,
    probe: dict[str, Tensor],
    logits: Tensor,
    encoding: Encoding,
    heldout: list[Example],
) -> tuple[float, float]:
    """Largest logit difference and held-out loss with the adapter loaded by PEFT."""
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        theirs = peft_model(**probe).logits
    real = probe["attention_mask"].bool()
    difference = float((theirs - logits)[real].abs().max())
    return difference, mean_loss(peft_model, encoding, heldout)


def _measured_beside_peft(model: PreTrainedModel) -> dict[str, Any]:
    """Times and memory of both libraries, which are also printed."""
    workload = Workload()
    with working("decoding and training with both libraries, a minute or two"):
        measured = compare(model, workload)
    console.print(_comparison(measured, workload))
    return measured


def _descriptions(examples: list[Any], before: list[str], after: list[str]) -> Table:
    table = Table(title="Held-out records", show_lines=True)
    for column in ("attributes", "without the prefix", "with it", "reference"):
        table.add_column(column, ratio=1)
    for example, old, new in zip(examples, before, after, strict=True):
        table.add_row(*map(Text, (example.source, old, new, example.targets[0])))
    return table


def _comparison(measured: dict[str, Any], w: Workload) -> Table:
    speed, extra = measured["decode_tokens_per_s"], measured["decode_extra_mb"]
    step, peak = measured["train_step_s"], measured["train_extra_mb"]
    about = f"prefix of {w.num_virtual_tokens} tokens, medians of {w.repeats}"
    table = Table(title=f"{measured['dtype']}, {about}")
    for column in ("", "fastprefix", "PEFT", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        (f"decode, batch {w.batch}: tokens/s", speed, "fastprefix", ".0f"),
        ("decode: extra peak memory, MB", extra, "fastprefix", ".0f"),
        (f"training step {w.train_batch}x{w.train_length}: s", step, "fastprefix", ".2f"),
        ("training: extra peak memory, MB", peak, "fastprefix", ".0f"),
        ("checkpointed step: s", step, "fastprefix_checkpointing", ".2f"),
        ("checkpointed: extra peak memory, MB", peak, "fastprefix_checkpointing", ".0f"),
    )
    for label, values, key, form in rows:
        ratio = values[key] / values["peft"]
        checkpointed = key != "fastprefix"
        theirs = (
            f"({values['peft']:{form}} without)" if checkpointed else f"{values['peft']:{form}}"
        )
        table.add_row(label, f"{values[key]:{form}}", theirs, f"{ratio:.2f}x")
    table.caption = (
        f"decoding without any prefix: {speed['no_prefix']:.0f} tokens/s\n"
        f"PEFT with gradient checkpointing: {step['peft_checkpointing']}"
    )
    return table
