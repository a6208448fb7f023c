"""Makes any model's configuration small, by what its fields are called.

Sizes keep their proportions where models insist on them (heads times head size is the width), and
of every kind of layer one is kept. What this cannot guess is in :mod:`walk.special`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from walk.special import FIELDS

VOCAB, PAD = 101, 0
TEXT = (2, 80)  # ids of ordinary tokens; special ones are above
WIDTH, HEADS, HEAD, INNER = 32, 4, 8, 48
WINDOW = 6  # shorter than prompt and text together, so that a window which counts wrongly shows
ROOM = 128

_LAYERS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers",
    "decoder_layers", "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers",
    "num_self_attends_per_block", "num_local_layers", "num_global_layers",
)  # fmt: skip
_PATTERNS: tuple[tuple[str, Any], ...] = (
    # the first that matches the whole name wins
    ("|".join(_LAYERS), 2),
    (r"(\w+_)?vocab_size(_\w+)?|n_words|vocab_size_or_config_json_file", VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|max_(source_|target_)?positions?|max_seq_len"
     r"|max_sequence_length|max_seq_length|context_length|seq_length|model_max_length", ROOM),
    (r"original_max_position_embeddings", ROOM),
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size", WINDOW),
    (r"attention_chunk_size", 2 * ROOM),  # a text's place among chunks is another question
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|ffn_num_experts", 4),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k|num_selected_experts|moe_k|experts_per_token"
     r"|ffn_top_k|router_top_k|num_experts_per_token|moe_topk", 2),
    (r"n_group|topk_group|num_expert_group|num_expert_groups", 1),
    (r"(n|num|moe_num)_shared_experts?", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers", 1),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|\w+_rank", 16),
    (r"qk_nope_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim", 4),
    (r"qk_head_dim", 12),
    (r"(linear_|mamba_|ssm_|lightning_)?n(um)?_(linear_)?(key|value|v|k)_heads", None),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)|state_dim", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"(mamba_)?chunk_size", 8),
    (r"\w*num_(query_|attention_)?heads|n_heads?|encoder_attention_heads|decoder_attention_heads"
     r"|num_encoder_attention_heads|num_decoder_attention_heads|heads|attention_heads", HEADS),
    (r"(\w+_)?head_dim|d_kv|head_size|kv_channels|attention_head_size|attention_head_dim", HEAD),
    (r"\w*intermediate\w*size\w*|\w*ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|\w*mlp_dim"
     r"|ffn_intermediate_size|\w*feedforward_dim|dim_ff|\w*ffn_size|hidden_dim", INNER),
    (r"hidden_size|hidden_sizes|d_model|n_embd|n_embed|dim|embed_dim|model_dim|emb_dim|d_embed"
     r"|word_embed_proj_dim|embedding_size|width|lru_width|text_hidden_size|projection_dim"
     r"|out_hidden_size|encoder_hidden_dim|decoder_hidden_dim|conv_dim|hidden_size_per_layer_input"
     r"|attention_hidden_size|embedding_dim|input_embedding_size|output_hidden_size"
     r"|cross_attention_hidden_size|input_hidden_size|dim_model", WIDTH),
    (r"image_size", 16),
    (r"patch_size", 4),
)  # fmt: skip
_RULES = tuple((re.compile(pattern), value) for pattern, value in _PATTERNS)
_GROUPED = re.compile(r"num_key_value_heads|num_kv_heads|n_head_kv|n_kv_heads|kv_n_heads"
                      r"|num_global_key_value_heads|swa_num_key_value_heads"
                      r"|multi_query_group_num|num_key_value_groups_")  # fmt: skip
_ENDS = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")
_LISTED: dict[str, Any] = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "image_size": [16, 16],
    "patch_size": [4, 4],
    "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
    "vision_feature_layer": [-2, -1],
}
_SPECIAL = re.compile(r"\w+_token_(id|index)|image_token_index")


def small(config_class: Any, model_type: str = "", **changes: Any) -> Any:
    """A configuration of this class, small.

    Args:
        config_class: transformers'.
        model_type: as listed; the class's own if empty.
        changes: fields that are set as they are.
    """
    own = FIELDS.get(model_type or config_class.model_type, {})
    given = copy.deepcopy({**own, **changes})  # configurations change what they are given
    default = _default(config_class)
    fields = shrink(default)
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        inner = getattr(default, name, None)
        if name in given and not isinstance(given[name], dict):
            continue
        extra = given.pop(name, {})
        if inner is not None and hasattr(inner, "to_dict"):
            made = small(type(inner), getattr(type(inner), "model_type", ""), **extra)
        elif hasattr(part, "model_type") and part.__name__ != "AutoConfig":
            made = small(part, part.model_type, **extra)
        else:
            continue
        fields[name] = made
    merged = {**fields, **given}
    return config_class(**{name: value for name, value in merged.items() if value is not DROP})


DROP = object()  # a field that is left to the class


def _default(config_class: Any) -> Any:
    try:
        return config_class()
    except Exception:
        fields = FIELDS.get(config_class.model_type, {})
        return config_class(**{n: v for n, v in fields.items() if v is not DROP})


def shrink(default: Any) -> dict[str, Any]:
    """Fields for a small configuration, from one with the class's defaults."""
    names = _names(default)
    values = {name: _get(default, name) for name in names}
    fields: dict[str, Any] = {}
    special = VOCAB - 1
    heads = next((values[n] for n in ("num_attention_heads", "n_head", "num_heads", "n_heads")
                  if isinstance(values.get(n), int)), HEADS)  # fmt: skip
    for name, value in values.items():
        if isinstance(value, bool):
            if name in ("tie_word_embeddings", "tie_encoder_decoder"):
                fields[name] = False
            continue
        if name == "pad_token_id":
            fields[name] = PAD
        elif name in _ENDS:
            fields[name] = 1
        elif name in ("forced_bos_token_id", "forced_eos_token_id"):
            fields[name] = None
        elif _SPECIAL.fullmatch(name) and isinstance(value, int):
            fields[name] = special
            special -= 1
        elif isinstance(value, int) and _GROUPED.fullmatch(name):
            fields[name] = 2 if value < heads else HEADS
        elif isinstance(value, int) and (made := _rule(name)) is not None:
            fields[name] = min(made, value) if name in ("num_experts_per_tok",) else made
        elif name in _LISTED and isinstance(value, (list, tuple)):
            fields[name] = list(_LISTED[name])
        elif name == "dtype" or name == "torch_dtype":
            continue
        elif isinstance(value, dict) and "mrope_section" in value:
            fields[name] = {**value, "mrope_section": [2, 1, 1]}
        elif isinstance(value, float) and "drop" in name:
            fields[name] = 0.0
    if "fullatt_block_indexes" in values:  # the others see a window, given in pixels
        fields["window_size"] = 16
    _cut_layers(values, fields)
    return fields


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some fields differ by layer, and do not say what they are for all
        return None


def _names(default: Any) -> list[str]:
    if dataclasses.is_dataclass(default):
        own = [field.name for field in dataclasses.fields(default) if field.init]
    else:
        own = list(default.to_dict())
    skip = {"transformers_version", "architectures", "id2label", "label2id", "model_type"}
    return [name for name in own if name not in skip]


def _rule(name: str) -> Any:
    for pattern, value in _RULES:
        if pattern.fullmatch(name):  # type: ignore[attr-defined]
            return value
    return None


def _cut_layers(values: dict[str, Any], fields: dict[str, Any]) -> None:
    """Keeps a layer of each kind, where lists say what kind each layer is."""
    count = next((n for n in _LAYERS if isinstance(values.get(n), int)), None)
    if count is None:
        return
    total = values[count]
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == total and total > 1
        and name != "hidden_sizes"
    }  # fmt: skip
    if not lists:
        return
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(total):
        kinds.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    chosen = sorted(kinds.values())[:6]
    if len(chosen) == 1:
        chosen = [0, 1]
    for name, value in lists.items():
        fields[name] = [value[layer] for layer in chosen]
    for name in _LAYERS:
        if name in fields and values.get(name) == total:
            fields[name] = len(chosen)
