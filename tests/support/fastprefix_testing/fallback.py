"""Models whose attention bypasses transformers' interface, and what is right for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
)

from fastprefix import (
    PrefixKV,
)
from fastprefix.hf import patch_of

P = 5
_BASE: dict[str, Any] = {
    "vocab_size": 101, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.15, "tie_word_embeddings": False,
}  # fmt: skip
STACK: dict[str, Any] = {
    **_BASE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_BERT: dict[str, Any] = {
    **STACK, "intermediate_size": 96, "is_decoder": True, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_GPTJ: dict[str, Any] = {
    **_BASE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_GROUPED: dict[str, Any] = {
    **STACK,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_SPEECH: dict[str, Any] = {
    **_BASE, "d_model": 64, "max_position_embeddings": 64, "dropout": 0.0, "init_std": 0.15,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon mqa": (
        "FalconForCausalLM",
        {**STACK, "multi_query": True, "new_decoder_architecture": False, "alibi": False},
    ),
    "falcon alibi": (
        "FalconForCausalLM",
        {**STACK, "multi_query": False, "new_decoder_architecture": False, "alibi": True,
         "parallel_attn": False, "bias": True},
    ),
    "falcon new": (
        "FalconForCausalLM",
        {**STACK, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    ),
    "bloom": ("BloomForCausalLM", {**_BASE, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJForCausalLM", _GPTJ),
    "codegen": ("CodeGenForCausalLM", _GPTJ),
    "mpt": (
        "MptForCausalLM", {**_BASE, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
         "use_cache": True}
    ),
    "xglm": (
        "XGLMForCausalLM",
        {**_SPEECH, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96,
         "attention_dropout": 0.0, "activation_dropout": 0.0},
    ),
    "stablelm": ("StableLmForCausalLM", _GROUPED),
    "nemotron": ("NemotronForCausalLM", _GROUPED),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        {**STACK, "intermediate_multiple_size": 2, "attention_dropout": 0.0,
         "hidden_dropout": 0.0},
    ),
    "roformer": ("RoFormerForCausalLM", {**_BERT, "embedding_size": 64}),
    "rembert": (
        "RemBertForCausalLM", {**_BERT, "input_embedding_size": 32, "output_embedding_size": 32}
    ),
    "megatron_bert": ("MegatronBertForCausalLM", _BERT),
    "trocr": (
        "TrOCRForCausalLM",
        {**_SPEECH, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
    ),
}  # fmt: skip
# Their pads take positions, so that padding on the left is refused.
COUNT_PADS = ("roformer", "trocr")
BERTS = ("roformer", "rembert", "megatron_bert")
# From 5.24 on their attention goes through the interface.
MAY_BE_PATCHED = ("gptj", "codegen")


def make(name: str, **changes: Any) -> Any:
    """A model of MODELS with loud weights."""
    model_class, fields = MODELS[name]
    cls = getattr(transformers, model_class)
    return fill(cls(cls.config_class(**{**fields, **changes})))


def fill(model: Any) -> Any:
    """Loud weights, the same for the same model."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for key, parameter in model.named_parameters():
            if "embed_positions" in key and not parameter.requires_grad:
                continue  # sinusoids
            mean = parameter.mean().item() if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.1 if parameter.dim() == 1 else 0.15)
    return model.eval()


def learned(model: Any, length: int = P, seed: int = 0, requires_grad: bool = True) -> PrefixKV:
    """A prefix that no text has, for a patched model."""
    generator = torch.Generator().manual_seed(7 + seed)
    made = []
    for shape in patch_of(model).shapes * 2:
        size = (shape.num_heads, length, shape.key_size)
        made.append(torch.randn(size, generator=generator).requires_grad_(requires_grad))
    half = len(made) // 2
    return PrefixKV(tuple(made[:half]), tuple(made[half:]), length)


def rows_of(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row's real tokens, [1, length]."""
    return [row[keep.bool()][None] for row, keep in zip(ids, mask, strict=True)]


def plain_logits(bare: Any, row: Tensor, kv: PrefixKV | None = None) -> Tensor:
    """The bare model's logits of one text [1, L], behind a prefix in a plain cache."""
    if kv is None or kv.num_virtual_tokens == 0:
        return bare(row).logits[0]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cache.update(key[None], value[None], layer)
    F = kv.num_virtual_tokens
    where: dict[str, Any] = {}
    if "position_ids" in inspect.signature(bare.forward).parameters:
        where["position_ids"] = torch.arange(row.shape[1])[None] + kv.position_offset
    mask = torch.ones(1, F + row.shape[1], dtype=torch.long)
    return bare(row, attention_mask=mask, past_key_values=cache, **where).logits[0]


def close(found: Tensor, wanted: Tensor) -> None:
    """Asserts that float32 results agree."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
