"""``fastprefix generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from rich.text import Text
from transformers import set_seed

from fastprefix.cli.console import console
from fastprefix.cli.loading import load
from fastprefix.cli.prompts import encode, shared, template_of
from fastprefix.hf import use_prefix
from fastprefix.hf.peft_files import read_config
from fastprefix.hf.peft_format import OWN_KIND, PREFIX_KINDS
from fastprefix.hf.peft_prompts import PROMPT_KINDS
from fastprefix.kv import PrefixKV
from fastprefix.tuning import PrefixTuningModel, PromptTuningModel


def run_generation(
    model_name: str,
    dtype: str,
    prompts: Sequence[str],
    adapter: str | None,
    system_prompt: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Loads, generates one batch, prints what came after each prompt.

    Prompts are turns of a chat if the model has a template for one, or an adapter a template that
    it was trained with; `raw` takes them as they are.
    """
    set_seed(seed)
    with console.status(f"loading {model_name}"):
        model, tokenizer = load(model_name, getattr(torch, dtype))
        kv = tuned = None
        template = None if raw else template_of(adapter, tokenizer)
        if adapter is not None:
            kind = read_config(adapter, (*PREFIX_KINDS, OWN_KIND, *PROMPT_KINDS))[0]["peft_type"]
            of = PromptTuningModel if kind in PROMPT_KINDS else PrefixTuningModel
            tuned = of.from_pretrained(model, adapter)
            kv = tuned.export()
            rows = encode(prompts, tokenizer, template)
        elif system_prompt is None:
            rows = encode(prompts, tokenizer, template)
        elif template is None:
            kv = PrefixKV.from_text(model, tokenizer, system_prompt)
            # the system prompt starts the sequence, so that these get no token for its beginning
            rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        else:
            # beside an empty turn, so that even one prompt shares no more than what precedes it
            *rows, empty = encode([*prompts, ""], tokenizer, template, system_prompt)
            count = shared([*rows, empty])
            if not count:
                raise ValueError("--system-prompt: the chat template does not begin with it; --raw")
            kv = PrefixKV.prefill(model, rows[0][:count])
            rows = [row[count:] for row in rows]
    if not all(rows):
        raise ValueError("prompt: got an empty one, takes a token at least")
    if kv is not None:
        console.print(
            f"prefix of {kv.num_virtual_tokens} tokens, one copy for all {len(prompts)} prompts: "
            f"{kv.nbytes / 1e6:.2f} MB"
        )
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(f"model: {type(model).__name__} cannot generate")
    if tuned is not None:
        generate = tuned.generate  # with the heads that were trained beside it
    with contextlib.nullcontext() if kv is None or tuned is not None else use_prefix(model, kv):
        ids = generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False, **sampling},
        )
    new = ids[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    for prompt, text in zip(prompts, texts, strict=True):
        console.print(Text(prompt, style="bold"))
        console.print(Text(text))
