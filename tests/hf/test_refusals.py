"""What is not supported is refused, by name, and leaves the model usable."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    Gemma2Config,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from fastprefix import PrefixKV, UnsupportedModelError, patch_model, use_prefix

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def t5():
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, "a name"])
def test_what_is_no_transformers_model(thing):
    with pytest.raises(TypeError, match="model: got"):
        patch_model(thing)


@pytest.mark.parametrize(
    "make", [t5, lambda: ViTModel(ViTConfig(**SMALL, image_size=32))], ids=["T5", "ViT"]
)
def test_models_that_are_no_decoders(make):
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        patch_model(model)
    assert model.config._attn_implementation == before
    assert not any(name.startswith("_fastprefix") for m in model.modules() for name in vars(m))


def test_bert_is_refused_or_sees_the_prefix(tiny):
    """An encoder is no decoder; where it is patched all the same it must not lose the prefix."""
    model = BertForMaskedLM(BertConfig(vocab_size=50, **SMALL)).eval()
    ids = torch.arange(1, 7)[None]
    plain = model(ids).logits
    try:
        patch_model(model)
    except UnsupportedModelError:
        assert torch.equal(model(ids).logits, plain)
        return
    with use_prefix(model, tiny.random_kv(model)):
        assert not torch.allclose(model(ids).logits, plain)


def test_a_model_with_an_attention_of_its_own_stays_usable(tiny):
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


def test_attention_weights_are_refused(tiny, model):
    ids, mask = tiny.batch()
    with use_prefix(model, tiny.random_kv(model)), pytest.raises(ValueError, match="eager"):
        model(ids, attention_mask=mask, output_attentions=True)


def test_attention_weights_asked_for_in_the_config_are_refused(tiny, architecture):
    """Never quietly left out of the result."""
    model = tiny.build(architecture, attn_implementation="eager")
    model.config.output_attentions = True
    ids, mask = tiny.batch()
    with pytest.raises(ValueError, match="output_attentions"):
        patch_model(model)(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("architecture", "option"), [("gpt2", "attn_pdrop"), ("llama", "attention_dropout")]
)
def test_attention_dropout_in_training_is_refused_by_name(tiny, architecture, option):
    model = patch_model(tiny.build(architecture, **{option: 0.1}))
    ids, mask = tiny.batch()
    with use_prefix(model, tiny.random_kv(model)):
        model(ids, attention_mask=mask)
        model.train()
        with pytest.raises(NotImplementedError, match=option):
            model(ids, attention_mask=mask)


def test_a_prefix_for_another_model_is_refused(tiny, model):
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


@pytest.mark.parametrize("thing", [None, (), {"keys": 1}, torch.zeros(3)])
def test_what_is_no_prefix_is_refused(tiny, model, thing):
    with pytest.raises(TypeError, match="kv: got"), use_prefix(model, thing):
        pass


def attempt(run):
    """A result, or None and what the refusal says."""
    try:
        return run(), ""
    except (NotImplementedError, UnsupportedModelError) as error:
        return None, str(error)


def with_prompt(model, front, run):
    """What a model says behind a prompt."""
    with use_prefix(model, PrefixKV.prefill(model, front)):
        return run(model)


def exact_or_refused(tiny, config, message):
    """A model with a feature that is not there yet: equal to the concatenation, or an error."""
    model, bare = tiny.from_config(config), tiny.from_config(config)
    front, (ids, mask) = tiny.prompt(5), tiny.batch((20, 14))
    expected = tiny.concatenated_logits(bare, front, ids, mask)[:, -20:]
    got, refusal = attempt(
        lambda: with_prompt(model, front, lambda m: m(ids, attention_mask=mask).logits)
    )
    if got is None:
        assert message in refusal
        plain = bare(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask).logits, plain), "usable as before"
    else:
        real = mask.bool()
        torch.testing.assert_close(got[real], expected[real], rtol=1e-3, atol=1e-3)


def windowed(tiny, window=8):
    return MistralConfig(**{**tiny.GROUPED, "sliding_window": window})


def test_a_prompt_in_a_sliding_window_is_exact_or_refused(tiny):
    exact_or_refused(tiny, windowed(tiny), "sliding_window")


def test_a_window_wider_than_prompt_and_text_is_none(tiny):
    model, bare = (tiny.from_config(windowed(tiny, 64)) for _ in range(2))
    front, (ids, mask) = tiny.prompt(5), tiny.batch((20, 14))
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask)
    assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_past_a_sliding_window_is_exact_or_refused(tiny, cache):
    """Text shorter than the window that grows out of it."""
    model, bare = (tiny.from_config(windowed(tiny)) for _ in range(2))
    front, (ids, mask) = tiny.prompt(3), tiny.batch((4, 2))
    options = {"max_new_tokens": 12, **cache}
    expected = tiny.generate(bare, *tiny.concatenate(front, ids, mask), **options)
    got, refusal = attempt(
        lambda: with_prompt(model, front, lambda m: tiny.generate(m, ids, mask, **options))
    )
    if got is None:
        assert "sliding_window" in refusal
    else:
        assert torch.equal(got, expected)


def test_a_learned_prefix_stays_in_sight_of_a_sliding_window_or_is_refused(tiny):
    """No text, so it does not slide out: the window concerns the sequence alone."""
    model, bare = (tiny.from_config(windowed(tiny)) for _ in range(2))
    kv, (ids, mask) = tiny.random_kv(model, 4), tiny.batch((20, 20))
    near = torch.ones(20, 20, dtype=torch.bool).tril().triu(-7)
    sees = torch.cat([torch.ones(20, 4, dtype=torch.bool), near], 1).expand(2, 1, -1, -1)
    options = {"position_ids": tiny.positions(mask) + 4, "past_key_values": tiny.expanded(kv, 2)}
    expected = bare(ids, attention_mask=sees, **options).logits

    def run():
        with use_prefix(model, kv):
            return model(ids, attention_mask=mask).logits

    got, refusal = attempt(run)
    if got is None:
        assert "sliding_window" in refusal
    else:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_softcap_is_exact_or_refused(tiny):
    fields = {**tiny.GROUPED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}
    exact_or_refused(tiny, Gemma2Config(**{**fields, "sliding_window": 512}), "softcap")


def test_a_windowed_model_without_a_prefix_computes_what_it_did(tiny):
    model, bare = (tiny.from_config(windowed(tiny)) for _ in range(2))
    ids, mask = tiny.batch((20, 14))
    options = {"attention_mask": mask, "position_ids": tiny.positions(mask)}
    got, _ = attempt(lambda: patch_model(model)(**options, input_ids=ids).logits)
    if got is not None:
        expected = bare(ids, **options).logits
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-3)
