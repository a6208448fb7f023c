"""Shared prompts on models whose layers keep a state: as if prompt and text were one sequence.

The yardstick is the same model without fastprefix, each row alone and unpadded behind the prompt.
"""

import copy
import functools

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixBank,
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    patch_model,
    unpatch_model,
    use_prefix,
)

V, P, LENGTHS = 101, 9, (6, 3, 1)

_NO_HEAD = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.15,
    "tie_word_embeddings": False, "num_hidden_layers": 3,
}  # fmt: skip
_BASE = {**_NO_HEAD, "head_dim": 16}  # twice hidden_size / num_attention_heads
_TYPES = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_CONV = {"layer_types": ["conv", "full_attention", "conv"]}
_DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, **_TYPES,
}  # fmt: skip
_EXPERTS = {
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2,
    "num_experts": 4,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "mlp_layer_types": ["dense", "sparse", "dense"], **_TYPES,
}  # fmt: skip
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "mamba_d_state": 8, "use_mamba_kernels": False, "num_key_value_heads": 4,
}  # fmt: skip
HYBRIDS = {
    "qwen3_5": ("Qwen3_5TextConfig", {**_BASE, **_DELTA}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_BASE, **_DELTA, **_EXPERTS}),
    "qwen3_next": ("Qwen3NextConfig", {**_BASE, **_DELTA, **_EXPERTS}),
    "granite": (
        "GraniteMoeHybridConfig",
        {**_NO_HEAD, **_MAMBA, **_TYPES, "num_local_experts": 4, "shared_intermediate_size": 24,
         "attention_multiplier": 0.35},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {**{k: x for k, x in _BASE.items() if k != "num_hidden_layers"},
         "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp",
                               "linear_attention"],
         "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
         "chunk_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 24,
         "moe_shared_expert_intermediate_size": 24},
    ),
    "falcon_h1": (
        "FalconH1Config", {**_BASE, **_MAMBA, "mamba_d_ssm": 64, "num_hidden_layers": 2},
    ),
    # goes on from its state only by single tokens
    "jamba": (
        "JambaConfig",
        {**_NO_HEAD, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "bamba": ("BambaConfig", {**_NO_HEAD, **_MAMBA, "attn_layer_indices": [1]}),
    "lfm2": ("Lfm2Config", {**_NO_HEAD, **_CONV, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**_NO_HEAD, **_CONV, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 24},
    ),
    "lfm3": ("Lfm3Config", {**_BASE, **_CONV}),
    # has a cache of its own, and does not say that it keeps a state
    "minimax": (
        "MiniMaxConfig",
        {**_BASE, "num_hidden_layers": 4, "num_local_experts": 2, "block_size": 4,
         "layer_types": ["full_attention", "linear_attention"] * 2},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", {**_NO_HEAD, **_DELTA, "linear_num_value_heads": 2}),
    "zamba": (
        "ZambaConfig",
        {**_NO_HEAD, **_ZAMBA, "n_mamba_heads": 2, "attention_hidden_size": 64,
         "attention_head_dim": 16},
    ),
    "zamba2": (
        "Zamba2Config",
        {**_NO_HEAD, **_ZAMBA, "n_mamba_heads": 4, "chunk_size": 8, "adapter_rank": 4},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {**_NO_HEAD, **_LATENT, "linear_head_dim": 8, "linear_num_heads": 4,
         "routed_scaling_factor": 1.0},
    ),
    "bailing": (
        "BailingHybridConfig",
        {**_BASE, **_LATENT, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0},
    ),
    # a window that is shorter than the prompt
    "lara_mini": (
        "LaraMiniConfig",
        {**_BASE, **_DELTA, **_EXPERTS, "sliding_window": 8,
         "layer_types": ["linear_attention", "full_attention", "sliding_attention"]},
    ),
    "zaya": (
        "ZayaConfig",
        {**_BASE, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 24,
         "router_hidden_size": 16},
    ),
}  # fmt: skip
REFUSED = {
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_NO_HEAD, "block_types": ["recurrent", "attention"], "attention_window_size": 128,
         "lru_width": 32},
        "keep a state outside the cache",
    ),
    # its scores get a bias by distance
    "inkling": (
        "InklingTextConfig",
        {**_BASE, "num_hidden_layers": 2, "swa_num_attention_heads": 4,
         "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8,
         "layer_types": ["hybrid_sliding", "hybrid"], "mlp_layer_types": ["dense", "sparse"],
         "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
         "moe_intermediate_size": 24, "d_rel": 4, "rel_extent": 16,
         "logits_mup_width_multiplier": 1.0, "route_scale": 1.0},
        "compute something else behind them",
    ),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        {**_BASE, **_DELTA, **_EXPERTS, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2,
         "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
         "indexer_compress_ratio": 2, "eos_token_id": 2, "ngram_vocab_size_base": 101,
         "ple_embed_dim": 8, "heads_per_ngram": 1},
        r"more than keys and values \(DynamicIndexedLayer\)",
    ),
}  # fmt: skip
FEW = ("qwen3_5", "granite", "jamba", "lfm2", "minimax", "falcon_h1")


@functools.cache
def build(name, dtype=torch.float32):
    kind, fields = {**HYBRIDS, **REFUSED}[name][:2]
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, kind)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms start at 0 and 1
                    nn.init.normal_(parameter, parameter.mean().item(), 0.1)
                elif not parameter.isfinite().all() or parameter.abs().max() == 0:
                    nn.init.normal_(parameter, 0.0, 0.15)
    return model.to(dtype).eval()


def ids(rows, length, seed=1):
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


PROMPT = ids(1, P, 5)
TEXTS = [ids(1, length, 10 + row)[0] for row, length in enumerate(LENGTHS)]


@torch.no_grad()
def logits_alone(model, prompt, text):
    whole = torch.cat([prompt, text])[None]
    places = torch.arange(whole.shape[1])[None]
    options = {} if model.config.model_type == "minimax" else {"use_cache": False}
    return model(whole, position_ids=places, **options).logits[0, len(prompt) :]


def greedy(model, text, mask=None, **options):
    mask = torch.ones_like(text) if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(text, attention_mask=mask, **options)[:, text.shape[1] :]


def answer_alone(model, prompt, text, **options):
    return greedy(model, torch.cat([prompt, text])[None], **options)


def padded(side="left"):
    return tiny.pad(TEXTS, side)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", HYBRIDS)
def test_forwards_equal_one_sequence_also_the_second_time(name):
    model = build(name)
    wanted = [logits_alone(model, PROMPT[0], text) for text in TEXTS]
    without = logits_alone(model, PROMPT[0][:0], TEXTS[0])
    assert 0.5 < wanted[0].std() < 2
    assert (wanted[0] - without).abs().max() > 0.5  # a prompt that is lost would show
    kv = PrefixKV.prefill(model, PROMPT)
    before = [x.clone() for x in kv.tensors]
    assert kv.states
    batch = torch.stack([TEXTS[0], TEXTS[0].flip(0)])
    flipped = logits_alone(model, PROMPT[0], batch[1])
    for _ in range(2):
        with torch.no_grad(), use_prefix(model, kv):
            for text, want in zip(TEXTS, wanted, strict=True):
                close(model(text[None]).logits[0], want)
            close(model(batch).logits, torch.stack([wanted[0], flipped]))
    assert all(torch.equal(x, y) for x, y in zip(kv.tensors, before, strict=True))
    # a shared prompt whose states were lost
    bare = PrefixKV(kv.keys, kv.values, kv.position_offset, True)
    with pytest.raises(NotImplementedError, match="keep a state besides"), use_prefix(model, bare):
        pass


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_skipped(name, side):
    model = build(name)
    text, mask = padded(side)
    with torch.no_grad(), use_prefix(model, PrefixKV.prefill(model, PROMPT)):
        got = model(text, attention_mask=mask).logits
    for row, one in enumerate(TEXTS):
        close(got[row, mask[row].bool()], logits_alone(model, PROMPT[0], one))


@pytest.mark.parametrize("name", HYBRIDS)
def test_generate_from_a_padded_batch(name):
    model = build(name)
    wanted = torch.cat([answer_alone(model, PROMPT[0], text) for text in TEXTS])
    text, mask = padded()
    with use_prefix(model, PrefixKV.prefill(model, PROMPT)):
        assert torch.equal(greedy(model, TEXTS[0][None]), wanted[:1])
        assert torch.equal(greedy(model, text, mask), wanted)
    assert not torch.equal(greedy(model, text, mask), wanted)


@pytest.mark.parametrize("name", HYBRIDS)
def test_rows_of_a_bank_and_rows_without_a_prompt(name, tmp_path):
    model = build(name)
    other = ids(1, 4, 6)
    bank = PrefixBank()
    bank.add("long", PrefixKV.prefill(model, PROMPT))
    bank.add("short", PrefixKV.prefill(model, other))
    bank.save(tmp_path)
    bank = PrefixBank.load(tmp_path)
    fronts = [other[0], PROMPT[0][:0], PROMPT[0]]
    text, mask = padded()
    with torch.no_grad(), use_prefix(model, bank, rows=["short", None, "long"]):
        got = model(text, attention_mask=mask).logits
        answers = greedy(model, text, mask)
    for row, (front, one) in enumerate(zip(fronts, TEXTS, strict=True)):
        close(got[row, mask[row].bool()], logits_alone(model, front, one))
        assert torch.equal(answers[row : row + 1], answer_alone(model, front, one))


@pytest.mark.parametrize("name", ["qwen3_5", "granite", "lfm2", "minimax", "zaya"])
def test_gradients_reach_the_text(name):
    model = build(name)
    embed = model.get_input_embeddings()
    text, mask = tiny.pad(TEXTS[:2], "left")  # a single token overwrites the state
    inputs = embed(text).detach().requires_grad_()
    weights = torch.randn(*text.shape, V, generator=torch.Generator().manual_seed(7))
    with use_prefix(model, PrefixKV.prefill(model, PROMPT)):
        logits = model(inputs_embeds=inputs, attention_mask=mask).logits
        (logits * weights * mask[..., None]).sum().backward()
    for row, one in enumerate(TEXTS[:2]):
        alone = embed(one[None]).detach().requires_grad_()
        whole = torch.cat([embed(PROMPT).detach(), alone], 1)
        places = torch.arange(whole.shape[1])[None]
        logits = model(inputs_embeds=whole, position_ids=places).logits[:, P:]
        (logits * weights[row, -len(one) :]).sum().backward()
        got = inputs.grad[row, -len(one) :]
        assert (got - alone.grad[0]).norm() < 1e-4 * alone.grad.norm()
    model.zero_grad()


def test_training_is_refused_where_tokens_go_one_by_one():
    model = copy.deepcopy(build("jamba"))
    kv = PrefixKV.prefill(model, PROMPT)
    model.train()
    with use_prefix(model, kv), pytest.raises(NotImplementedError, match="has no gradient"):
        model(TEXTS[0][None])


def test_a_prompt_and_a_learned_prefix_in_one_batch():
    """The learned one has no state: its row's layers start as they do by themselves."""
    model = build("qwen3_5")
    prompt = PrefixKV.prefill(model, PROMPT)
    generator = torch.Generator().manual_seed(9)
    parts = [torch.randn(x[:, :4].shape, generator=generator) for x in prompt.keys + prompt.values]
    learned = PrefixKV(parts[:1], parts[1:], 4)
    text, mask = tiny.pad(TEXTS[:2], "left")
    kvs = {"prompt": prompt, "learned": learned}
    with torch.no_grad(), use_prefix(model, kvs, rows=["prompt", "learned"]):
        got = model(text, attention_mask=mask).logits
    close(got[0], logits_alone(model, PROMPT[0], TEXTS[0]))
    with torch.no_grad(), use_prefix(model, learned):
        close(got[1, -3:], model(TEXTS[1][None]).logits[0])


@pytest.mark.parametrize("name", FEW)
def test_save_and_load(name, tmp_path):
    model = build(name)
    kv = PrefixKV.prefill(model, PROMPT)
    kv.save(tmp_path / "prompt.safetensors")
    with use_prefix(model, PrefixKV.load(tmp_path / "prompt.safetensors")):
        got = greedy(model, TEXTS[0][None])
    assert torch.equal(got, answer_alone(model, PROMPT[0], TEXTS[0]))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(name, options):
    model = build(name)
    text, mask = tiny.pad(TEXTS[:2], "left")
    wanted = [answer_alone(model, PROMPT[0], one, **options) for one in TEXTS[:2]]
    with use_prefix(model, PrefixKV.prefill(model, PROMPT)):
        assert torch.equal(greedy(model, text, mask, **options), torch.cat(wanted))


@pytest.mark.parametrize("name", ["qwen3_5", "granite", "lfm2", "falcon_h1"])
def test_a_static_cache(name):
    model = build(name)
    text, mask = padded()
    wanted = torch.cat([answer_alone(model, PROMPT[0], one) for one in TEXTS])
    with use_prefix(model, PrefixKV.prefill(model, PROMPT)):
        assert torch.equal(greedy(model, text, mask, cache_implementation="static"), wanted)


@pytest.mark.parametrize("name", [x for x in FEW if x != "minimax"])
def test_a_chat_goes_on_over_one_cache(name):
    """The prompt's state starts the cache once; what is in it later goes on by itself."""
    model = build(name)
    whole = torch.cat(TEXTS[:2])
    wanted = logits_alone(model, PROMPT[0], whole)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), use_prefix(model, PrefixKV.prefill(model, PROMPT)):
        first = model(TEXTS[0][None], past_key_values=cache).logits[0]
        mask = torch.ones(1, len(whole), dtype=torch.long)
        second = model(TEXTS[1][None], attention_mask=mask, past_key_values=cache).logits[0]
    close(torch.cat([first, second]), wanted)


@pytest.mark.parametrize("name", ["qwen3_5", "granite", "jamba", "minimax"])
def test_bfloat16(name):
    """About as far from float32 as the model itself is in bfloat16; a lost state is 20 % off."""
    model, exact = build(name, torch.bfloat16), build(name)
    kv = PrefixKV.prefill(model, PROMPT)
    text, mask = padded()
    with torch.no_grad(), use_prefix(model, kv):
        got = model(text, attention_mask=mask).logits.float()
        answers = greedy(model, text, mask)
    assert answers.shape == (3, 6)
    for row, one in enumerate(TEXTS):
        want = logits_alone(exact, PROMPT[0], one)
        own = (logits_alone(model, PROMPT[0], one).float() - want).norm()
        assert (got[row, mask[row].bool()] - want).norm() < 2 * own + 0.05 * want.norm()


@pytest.mark.parametrize("name", FEW)
def test_what_has_no_cache_is_refused(name):
    model = build(name)
    kv, text = PrefixKV.prefill(model, PROMPT), TEXTS[0][None]
    with use_prefix(model, kv):
        with pytest.raises(NotImplementedError, match="use_cache: got False, takes True"):
            model(text, use_cache=False)
        with pytest.raises(NotImplementedError, match="use_cache: got False"):
            greedy(model, text, use_cache=False)
        starts = torch.tensor([[0, 1, 2, 0, 1, 2]])
        with pytest.raises(NotImplementedError, match="packed sequences do not go"):
            model(text, position_ids=starts)
        # and the model is as usable as before
        close(model(text).logits[0].detach(), logits_alone_in(model, kv))


def logits_alone_in(model, kv):
    with use_prefix(model, None):
        return logits_alone(model, PROMPT[0], TEXTS[0])


def test_a_cache_without_a_place_for_states_is_refused():
    model = build("qwen3_5")
    kv, text = PrefixKV.prefill(model, PROMPT), TEXTS[0][None]
    message = r"DynamicCache\(config=model.config\)"
    with torch.no_grad(), use_prefix(model, kv), pytest.raises(ValueError, match=message):
        model(text, past_key_values=DynamicCache())


def test_states_of_another_model_are_refused():
    model = build("qwen3_5")
    kv, other = PrefixKV.prefill(model, PROMPT), PrefixKV.prefill(build("qwen3_next"), PROMPT)
    short = PrefixKV(kv.keys, kv.values, P, True, states=kv.states[:1])
    with pytest.raises(ValueError, match="got states"), use_prefix(model, short):
        pass
    assert {one.layer for one in other.states} == {0, 2}


def test_gradient_checkpointing_takes_the_state_away():
    model = patch_model(copy.deepcopy(build("qwen3_5")))
    kv = PrefixKV.prefill(model, PROMPT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with use_prefix(model, kv), pytest.raises(NotImplementedError, match="checkpointing"):
        model(TEXTS[0][None])


@pytest.mark.parametrize("name", FEW)
def test_what_patching_left_is_taken_back(name):
    model = build(name)
    kv = PrefixKV.prefill(model, PROMPT)
    with use_prefix(model, kv):
        model(TEXTS[0][None])
    assert not any(key.startswith("_fastprefix") for m in model.modules() for key in vars(m))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    twin = copy.deepcopy(patch_model(model))
    unpatch_model(model)
    with torch.no_grad(), use_prefix(twin, kv):
        close(twin(TEXTS[0][None]).logits[0], logits_alone(model, PROMPT[0], TEXTS[0]))


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_start_from_a_state(name):
    model = build(name)
    with pytest.raises(NotImplementedError, match=REFUSED[name][2]):
        PrefixKV.prefill(model, PROMPT)
    kv = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=3)).export()
    asked = PrefixKV(kv.keys, kv.values, kv.position_offset, True)
    with pytest.raises(NotImplementedError, match="a state besides"), use_prefix(model, asked):
        pass


@pytest.mark.parametrize("name", [*FEW, "recurrent_gemma"])
def test_prompt_tuning_generates_what_its_forward_says(name):
    """Through an export with states, or with the embeddings where a model takes no prompt."""
    model = copy.deepcopy(build(name))
    torch.manual_seed(3)
    tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=5)).eval()
    with torch.no_grad():
        tuned.encoder.embedding.normal_(0, 0.3)
    text = TEXTS[0][None]
    wanted = text
    for _ in range(6):
        with torch.no_grad():
            best = tuned(wanted, attention_mask=torch.ones_like(wanted)).logits[:, -1].argmax(-1)
        wanted = torch.cat([wanted, best[:, None]], 1)
    got = tuned.generate(input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=6,
                         do_sample=False)  # fmt: skip
    assert torch.equal(got[:, -6:], wanted[:, -6:])
