"""``fastprefix generate``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fastprefix.cli.console import messages, tell, working
from fastprefix.cli.errors import blaming
from fastprefix.cli.prompts import encode, shared, template_of
from fastprefix.formats.peft_files import read_config
from fastprefix.formats.peft_prefixes import OWN_KIND, PREFIX_KINDS, load_adapter
from fastprefix.formats.peft_prompts import PROMPT_KINDS, load_prompt
from fastprefix.hf import use_prefix
from fastprefix.kv import PrefixKV
from fastprefix.tasks.registry import get_task
from fastprefix.training.base_models import load_causal, load_tokenizer
from fastprefix.training.config import ADAPTER, RunConfig
from fastprefix.training.examples import task_type_of
from fastprefix.training.methods import load_trained
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
    as_json: bool = False,
    run: RunConfig | None = None,
) -> None:
    """Loads a model, generates one batch, and prints the text after each prompt.

    A prompt is a turn of a chat if the model has a chat template, or if the adapter was trained
    with a template. With `raw` the model gets it unchanged. Standard output gets only the texts,
    or with `as_json` a list of objects, each with a prompt and its text. An adapter is the folder
    of a run where `run` is its configuration.
    """
    set_seed(seed)
    named = "--adapter"
    if run is not None and adapter is not None:
        adapter = str(Path(adapter) / ADAPTER)
    elif adapter is not None and not Path(adapter).is_dir():
        named += f": got {adapter}, which is no folder here"
    tokenizer = load_tokenizer(model_name)
    with blaming(named):
        load = None if adapter is None else _loader(adapter, run)
        template = None if raw else template_of(adapter, tokenizer)
    with working(f"loading {model_name}"):
        kv, tuned = None, None
        if load is not None:
            tuned = load(model_name, getattr(torch, dtype), named)
            rows = encode(prompts, tokenizer, template)
            if isinstance(tuned, (PrefixTuningModel, PromptTuningModel)):
                kv = tuned.export()
        else:
            model = load_causal(model_name, getattr(torch, dtype))
            if system_prompt is None:
                rows = encode(prompts, tokenizer, template)
            else:
                kv, rows = _behind_system_prompt(model, tokenizer, template, system_prompt, prompts)
    if not all(rows):
        raise ValueError("prompt: got one without a token, takes a text")
    if kv is not None:
        tell(
            f"prefix of {kv.num_virtual_tokens} tokens, one copy for all {len(prompts)} prompts: "
            f"{kv.nbytes / 1e6:.2f} MB"
        )
    used = model if tuned is None else tuned
    with contextlib.nullcontext() if kv is None or tuned is not None else use_prefix(model, kv):
        texts = _texts(used, tokenizer, rows, max_new_tokens, temperature)
    if as_json:
        pairs = zip(prompts, texts, strict=True)
        print(json.dumps([{"prompt": prompt, "text": text} for prompt, text in pairs], indent=1))
        return
    for prompt, text in zip(prompts, texts, strict=True):
        messages.print(Text(prompt, style="bold"), soft_wrap=True)
        print(text, flush=True)


def _behind_system_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    system_prompt: str,
    prompts: Sequence[str],
) -> tuple[PrefixKV, list[list[int]]]:
    """The keys and values of what all prompts share, and the token ids that follow for each.

    Raises:
        ValueError: the chat template puts something else before the system prompt.
    """
    if template is None:
        kv = PrefixKV.from_text(model, tokenizer, system_prompt)
        # The system prompt starts the sequence, so the prompts get no token for a beginning.
        return kv, tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    # An empty turn beside them: even a single prompt then shares only what precedes it.
    *rows, empty = encode([*prompts, ""], tokenizer, template, system_prompt)
    count = shared([*rows, empty])
    if not count:
        raise ValueError("--system-prompt: the chat template does not begin with it; --raw")
    return PrefixKV.prefill(model, rows[0][:count]), [row[count:] for row in rows]


def _texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    """What a model, plain or tuned, generates behind each row of token ids.

    Raises:
        ValueError: the model cannot generate.
    """
    device = next(model.parameters()).device
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(f"model: {type(model).__name__} cannot generate")
    ids = generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **{"do_sample": False, **sampling},
    )
    new = ids[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


# Loads a model with an adapter: by the model's name, its dtype, and what errors name.
_Loader = Callable[[str, torch.dtype, str], Any]


def _loader(adapter: str, run: RunConfig | None) -> _Loader:
    """What loads an adapter. Its files are read before the model is, so that damage shows early.

    Raises:
        ValueError: it is of a run that did not train a causal language model, or it is damaged.
    """
    method = "prefix" if run is None else run.method
    if run is not None and task_type_of(run, get_task(run.task)) != "CAUSAL_LM":
        raise ValueError(f"got a run on {run.task} whose model writes nothing behind a prompt")
    if method not in ("prefix", "prompt"):
        return lambda name, dtype, _: load_trained(method, Path(adapter), name, "CAUSAL_LM", dtype)
    kind = _kind_of(adapter)

    def load(name: str, dtype: torch.dtype, named: str) -> PrefixTuningModel | PromptTuningModel:
        model = load_causal(name, dtype)
        with blaming(named):
            return kind.from_pretrained(model, adapter)

    return load


def _kind_of(adapter: str) -> type[PrefixTuningModel | PromptTuningModel]:
    """The class that loads an adapter. Its files are read, so that damage shows early."""
    config, _ = read_config(adapter, (*PREFIX_KINDS, OWN_KIND, *PROMPT_KINDS))
    if config["peft_type"] in PROMPT_KINDS:
        load_prompt(adapter)
        return PromptTuningModel
    if (config.get("num_transformer_submodules") or 1) == 1:  # else the model's layers are needed
        load_adapter(adapter)
    return PrefixTuningModel
