"""generate() of encoder-decoders with prefixes in all three groups, and prompts for them."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf import patch_of
from fastprefix_testing import textbook, zoo

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_generated_ids(name, mode):
    """The oracle generates with a dynamic cache, or with none, whatever we do."""
    model, bare = zoo.kind(name), zoo.kind(name)
    inputs, _ = zoo.kind_inputs(model, "left")
    with torch.no_grad():
        patch_model(model)
        kv = tiny.kv_of_shapes(patch_of(model).shapes).detach()
        oracle = textbook.concatenating(bare, kv, inputs)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **MODES[mode]}
    text = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    plain = zoo.kind(name).generate(**text, **options)
    expected = oracle.generate(**text, **{**options, "cache_implementation": None})
    with use_prefix(model, kv):
        got = model.generate(**text, **options)
    assert not torch.equal(plain, expected), "the prefix must matter"
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("name", "deeper"), [("t5", "num_decoder_layers"), ("bart", "decoder_layers")]
)
def test_a_decoder_deeper_than_the_encoder(name, deeper):
    """Each layer has a prefix of its own, none is dead."""
    model, bare = (zoo.kind(name, **{deeper: 4}).requires_grad_(False) for _ in range(2))
    inputs, real = zoo.kind_inputs(model)
    patch_model(model)
    assert patch_of(model).groups.count("encoder") < patch_of(model).groups.count("decoder") == 4
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    expected = textbook.concatenating(bare, kv, inputs)(**inputs).logits[real]
    with use_prefix(model, kv):
        got = model(**inputs).logits[real]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    leaves = (*kv.keys, *kv.values)
    for found, wanted in zip(
        torch.autograd.grad(got.softmax(-1).square().sum(), leaves),
        torch.autograd.grad(expected.softmax(-1).square().sum(), leaves),
        strict=True,
    ):
        assert wanted.abs().max() > 1e-9
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_the_encoder_alone_sees_its_prefix():
    """generate() calls the encoder like this."""
    model = patch_model(zoo.kind("t5").requires_grad_(False))
    inputs, _ = zoo.kind_inputs(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with use_prefix(model, kv):
        whole = model(**inputs).encoder_last_hidden_state
        alone = model.get_encoder()(**text).last_hidden_state
    assert torch.equal(alone, whole)
    assert not torch.allclose(alone, model.get_encoder()(**text).last_hidden_state)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_prompts_are_for_decoders(name):
    """An encoder's prompt sees the text: no keys of its own stand for it."""
    model = zoo.kind(name)
    with pytest.raises(ValueError, match="takes a decoder-only model"):
        PrefixKV.prefill(model, tiny.prompt())
    patch_model(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    with (
        pytest.raises(ValueError, match="in_window: got a prefilled prompt"),
        use_prefix(model, PrefixKV(kv.keys, kv.values, 0, in_window=True)),
    ):
        pass
