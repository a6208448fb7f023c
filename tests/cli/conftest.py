"""A tiny model saved in a folder, with a real tokenizer."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprefix_testing.models as tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer Llama beside SmolLM2's tokenizer."""
    tokenizer = tiny.smollm2_tokenizer()
    assert tokenizer is not None
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.15,
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
