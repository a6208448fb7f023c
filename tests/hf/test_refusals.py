"""What is not supported is refused, by name, and leaves the model usable."""

import pytest
import torch
from transformers import BloomConfig, MistralConfig, Wav2Vec2Config, Wav2Vec2Model

from fastprefix import PrefixKV, UnsupportedModelError, patch_model, use_prefix

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


def test_a_model_that_takes_what_nobody_can_make_up_is_refused():
    model = Wav2Vec2Model(Wav2Vec2Config(**SMALL))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="Wav2Vec2Model: takes input_values"):
        patch_model(model)
    assert model.config._attn_implementation == before
    assert not any(name.startswith("_fastprefix") for m in model.modules() for name in vars(m))


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


def test_a_prompt_in_a_window_with_a_custom_mask_is_refused(tiny):
    model = patch_model(tiny.from_config(MistralConfig(**{**tiny.GROUPED, "sliding_window": 8})))
    ids, _ = tiny.batch((6, 6))
    sees = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with (
        use_prefix(model, PrefixKV.prefill(model, tiny.prompt(5))),
        pytest.raises(NotImplementedError, match=r"sliding_window of 8.*user's own"),
    ):
        model(ids, attention_mask=sees)
