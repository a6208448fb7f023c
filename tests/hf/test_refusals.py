"""What is not supported is refused, by name, and leaves the model usable."""

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    EncoderDecoderModel,
    FalconConfig,
    FalconForCausalLM,
    MistralConfig,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, UnsupportedModelError, patch_model, use_prefix
from fastprefix.hf import patch_of

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, "a name"])
def test_what_is_no_transformers_model(thing):
    with pytest.raises(TypeError, match="model: got"):
        patch_model(thing)


def falcon():
    return FalconForCausalLM(
        FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def two_berts():
    """Its forward keeps what does not begin with decoder_ from its decoder."""
    decoder = BertConfig(**SMALL, vocab_size=50, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(
        encoder=BertModel(BertConfig(**SMALL, vocab_size=50)), decoder=BertLMHeadModel(decoder)
    )
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model


REFUSED = {
    "deberta_v2": (
        lambda: DebertaV2ForMaskedLM(DebertaV2Config(**SMALL, vocab_size=50)),
        "DebertaV2ForMaskedLM does not route its attention",
    ),
    "falcon": (falcon, "FalconForCausalLM does not route its attention"),
    "two berts": (two_berts, "BertCrossAttention, BertSelfAttention .* did not receive"),
    "sound": (
        lambda: Wav2Vec2Model(Wav2Vec2Config(**SMALL)),
        "Wav2Vec2Model: takes input_values, .* pass patch_model an example",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_take_a_prefix(name):
    make, message = REFUSED[name]
    model = make()
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    with pytest.raises(UnsupportedModelError, match=message):
        patch_model(model)
    after = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert after == before
    assert not any(name.startswith("_fastprefix") for m in model.modules() for name in vars(m))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_chooses_keys_beside_the_mask():
    make = getattr(transformers, "DeepseekV32Config", None)
    if make is None:
        pytest.skip("this transformers has no DeepSeek-V3.2")
    config = make(
        **SMALL, vocab_size=tiny.VOCAB, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=16,
        index_topk=2, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="Attention: hands its attention indices"):
        patch_model(tiny.from_config(config))


@pytest.mark.parametrize("given", [torch.zeros(2), 3, 0.5])
def test_unknown_arguments_of_the_attention_are_refused(model, given):
    ids, mask = tiny.batch()
    with pytest.raises(NotImplementedError, match="hands its attention chosen, got"):
        patch_model(model)(ids, attention_mask=mask, chosen=given)


@pytest.mark.parametrize("given", [None, True, False, 0, "eager"])
def test_what_decides_nothing_passes(model, given):
    ids, mask = tiny.batch()
    expected = patch_model(model)(ids, attention_mask=mask).logits
    count = torch.tensor(3)
    got = model(ids, attention_mask=mask, chosen=given, num_items_in_batch=count).logits
    assert torch.equal(got, expected)


def test_an_example_says_what_a_model_runs_on():
    model = Wav2Vec2Model(
        Wav2Vec2Config(
            **SMALL, conv_dim=[8], conv_stride=[4], conv_kernel=[4], num_feat_extract_layers=1,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    ).eval()  # fmt: skip
    sound = torch.randn(2, 64)
    before = model(sound).last_hidden_state
    patch_model(model, example={"input_values": sound[:1]})
    torch.testing.assert_close(model(sound).last_hidden_state, before, rtol=1e-4, atol=1e-4)
    assert patch_of(model).groups == ("encoder",)


def test_a_model_with_an_attention_of_its_own_stays_usable():
    config = BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=1, n_head=2)
    model = tiny.from_config(config)
    ids, mask = tiny.batch()
    before, implementation = (
        model(ids, attention_mask=mask).logits,
        (model.config._attn_implementation),
    )
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
            patch_model(model)
    with pytest.raises(UnsupportedModelError), use_prefix(model, None):
        pass
    with pytest.raises(UnsupportedModelError):
        PrefixKV.prefill(model, ids[:1])
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_prefix_for_another_model_is_refused(model):
    kv = tiny.random_kv(model)
    key, value = kv.keys[0], kv.values[0]
    wrong = {
        "2 layers, takes one of 3": PrefixKV(kv.keys[:2], kv.values[:2], 5),
        "num_heads=1": PrefixKV((key[:1],) * 3, (value[:1],) * 3, 5),
        "key_size=8": PrefixKV((key[..., :8],) * 3, kv.values, 5),
        "value_size=8": PrefixKV(kv.keys, (value[..., :8],) * 3, 5),
        "layer 2": PrefixKV(kv.keys, (value, value, value[..., :8]), 5),
    }
    for message, prefix in wrong.items():
        with pytest.raises(ValueError, match=message), use_prefix(model, prefix):
            pass
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("thing", [(), {"keys": 1}, torch.zeros(3)])
def test_what_is_no_prefix_is_refused(model, thing):
    with pytest.raises(TypeError, match="kv: got"), use_prefix(model, thing):
        pass


def test_a_prompt_in_a_window_with_a_custom_mask_is_refused():
    model = patch_model(tiny.from_config(MistralConfig(**{**tiny.GROUPED, "sliding_window": 8})))
    ids, _ = tiny.batch((6, 6))
    sees = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with (
        use_prefix(model, PrefixKV.prefill(model, tiny.prompt(5))),
        pytest.raises(NotImplementedError, match=r"sliding_window of 8.*user's own"),
    ):
        model(ids, attention_mask=sees)
