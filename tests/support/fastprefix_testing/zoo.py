"""A model of every kind, by its class in transformers, so small that each runs in a moment."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix_testing.models import PAD, VOCAB, batch

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KV: dict[str, Any] = {**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_WINDOW: dict[str, Any] = {**_KV, "sliding_window": 4}
_STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT: dict[str, Any] = {**_SMALL, **_STILL}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_max_distance": 8,
    "relative_attention_num_buckets": 8,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": 2,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_WHISPER = {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 48}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _BERT),
    "roberta": ("RobertaForMaskedLM", _BERT),
    "electra": ("ElectraForTokenClassification", {**_BERT, "embedding_size": 16}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48,
         "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": PAD},
    ),
    "albert": (
        "AlbertForMaskedLM",
        {**_BERT, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2,
         "inner_group_num": 2},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**_SMALL, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **_STILL,
         "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    ),
    "t5": ("T5ForConditionalGeneration", _T5),
    "mt5": ("MT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "t5 encoder": ("T5ForTokenClassification", {**_T5, "classifier_dropout": 0.0}),
    "bart": ("BartForConditionalGeneration", {**_BART, "max_position_embeddings": 48}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_BART, **_WHISPER, "begin_suppress_tokens": None, "suppress_tokens": None},
    ),
    "llama": ("LlamaForCausalLM", _KV),
    "mistral": ("MistralForCausalLM", _WINDOW),
    "mixtral": ("MixtralForCausalLM", {**_KV, "num_local_experts": 3}),
    "qwen2": ("Qwen2ForCausalLM", _KV),
    "qwen3": ("Qwen3ForCausalLM", _KV),
    "gemma2": ("Gemma2ForCausalLM", _WINDOW),
    "gemma3": ("Gemma3ForCausalLM", _WINDOW),
    "phi3": ("Phi3ForCausalLM", _SMALL),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 48, "word_embed_proj_dim": 32,
         "dropout": 0.0, "pad_token_id": PAD},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _SMALL),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_WINDOW, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "olmo2": ("Olmo2ForCausalLM", _KV),
    "gemma3n": (
        "Gemma3nForCausalLM",
        {**_WINDOW, "vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 4,
         "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "altup_num_inputs": 2,
         "activation_sparsity_pattern": None},
    ),
    # attends twice in each layer, with the same keys and other values
    "diffllama": ("DiffLlamaForCausalLM", {**_KV, "num_key_value_heads": 4, "head_dim": 8}),
    # decoders whose modules say that they are not causal
    "bigbird_pegasus": (
        "BigBirdPegasusForCausalLM",
        {**_BART, "max_position_embeddings": 48, "is_decoder": True, "is_encoder_decoder": False},
    ),
}  # fmt: skip


def kind(
    name: str,
    dtype: torch.dtype = torch.float64,
    model_class: str | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """A model of the zoo in eval mode; the same arguments give the same weights.

    Args:
        name: one of ZOO.
        dtype: type of the weights.
        model_class: name of a class to use instead, for example of a classifier.
        changes: fields of the configuration.
    """
    of_the_zoo, fields = ZOO[name]
    make: Any = getattr(transformers, model_class or of_the_zoo)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(make.config_class(**{**fields, **changes}))
        for parameter in model.parameters():
            mean = parameter.mean().item() if parameter.dim() == 1 else 0.0
            nn.init.normal_(parameter, mean, 0.2)
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the fused one has no float64
    return model.to(dtype).eval()


def kind_inputs(model: PreTrainedModel, side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Padded inputs for a model of the zoo, and [B, L] bool: which of its outputs are real."""
    ids, mask = batch((7, 4), side)
    target, target_mask = batch((5, 3), "right")
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels.to(model.dtype)}, torch.ones(2, dtype=torch.bool)
    if model.main_input_name == "input_features":
        generator = torch.Generator().manual_seed(5)
        shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        sound = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)
        return {"input_features": sound, "decoder_input_ids": target}, torch.ones(2, 5).bool()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith("ForConditionalGeneration"):
        inputs |= {"decoder_input_ids": target, "decoder_attention_mask": target_mask}
        return inputs, target_mask.bool()
    return inputs, mask.bool()
