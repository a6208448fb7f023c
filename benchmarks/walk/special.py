"""Fields of configurations whose names do not tell how small they may be, by model type."""

from __future__ import annotations

from typing import Any

_TWO = ["sliding_attention", "full_attention"]
_HYBRID = ["linear_attention", "full_attention"]

FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "blt": {
        "patcher_config": {"num_hidden_layers": 2},
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "patch_in_forward": False,
    },
    "cohere_compass_text": {"layer_types": _TWO, "num_hidden_layers": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 48,
             "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1,
             "n_output_layers": 1, "layer_types": ["sliding_attention", "full_attention",
             "sliding_attention"]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
              "first_k_dense_replace": 1},
    "dots3_note_text": {"num_attention_heads": 4},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention",
                     "full_attention"], "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 101,
                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 8,
                     "intermediate_size": 48},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention",
                    "full_attention"], "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                    "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 101},
    "gemma4_unified_text": {"layer_types": _TWO, "num_hidden_layers": 2, "head_dim": 8,
                            "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": _HYBRID, "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": [2, 2]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "zero_expert_num": 2, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2, "layer_types": _TWO},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24], "num_buckets": 4,
                 "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4, "hash_seed": 0},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 3,
              "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2,
              "intermediate_size": 48},
}  # fmt: skip
