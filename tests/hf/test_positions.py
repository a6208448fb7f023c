"""The positions of a text behind a prefix. They are those of PEFT, whose prefix is in the cache."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf import patch_of
from fastprefix.hf.prefill.recorded import text_keys_values
from fastprefix_testing import zoo

EXACT = {"rtol": 0, "atol": 1e-9}
P = 5


def cached(kv, layers, rows):
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        key, value = kv.layer(layer)
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), index)
    return cache


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds", "position_ids"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_encoders_as_with_the_prefix_in_a_cache(name, side, given):
    model, bare = patch_model(zoo.kind(name)), zoo.kind(name)
    patch = patch_of(model)
    kv = tiny.kv_of_shapes(patch.shapes, P, position_offset=patch.default_offset(P))
    inputs, real = zoo.kind_inputs(model, side)
    mask = inputs["attention_mask"]
    told = {}
    if given == "inputs_embeds":
        inputs["inputs_embeds"] = bare.get_input_embeddings()(inputs.pop("input_ids"))
    if given == "position_ids":
        inputs["position_ids"] = torch.arange(7)[None] + 3
        told["position_ids"] = inputs["position_ids"] + P
    if name == "roberta" and given == "inputs_embeds":
        told["position_ids"] = torch.arange(7)[None] + 1 + P  # its own default forgets the cache
    told = {**inputs, **told, "attention_mask": torch.cat([mask.new_ones(2, P), mask], 1)}
    told.pop("token_type_ids", None)
    with torch.no_grad():
        backbone = bare.base_model(**told, past_key_values=cached(kv, range(2), 2))
        with use_prefix(model, kv):
            got = model.base_model(**inputs)
            alone = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(got[0][real], backbone[0][real], **EXACT)
    torch.testing.assert_close(alone[real], backbone[0][real], **EXACT)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_a_decoder_with_its_prefix_in_a_cache(name):
    """PEFT trains BART so: the prefix is in the decoder's own attention and moves its text."""
    model, bare = patch_model(zoo.kind(name)), zoo.kind(name)
    groups = patch_of(model).groups
    own = [layer for layer, group in enumerate(groups) if group == "decoder"]
    whole = tiny.kv_of_shapes(patch_of(model).shapes, P, position_offset=P)
    kv = whole.select(own).spread(own, patch_of(model).shapes)
    inputs, real = zoo.kind_inputs(model, "left")
    told = dict(inputs)
    if "decoder_attention_mask" in told:
        mask = told["decoder_attention_mask"]
        told["decoder_attention_mask"] = torch.cat([mask.new_ones(2, P), mask], 1)
    cache = EncoderDecoderCache(cached(kv, own, 2), DynamicCache())
    with torch.no_grad():
        expected = bare(**told, past_key_values=cache, use_cache=True).logits
        still = bare(**inputs).logits
        with use_prefix(model, kv):
            got = model(**inputs).logits
    torch.testing.assert_close(got[real], expected[real], **EXACT)
    assert not torch.allclose(got[real], still[real], atol=1e-3)


def test_the_offset_does_not_outlive_its_call():
    """The embedding is told by the call at hand: one run by itself keeps its own positions."""
    model = patch_model(zoo.kind("bert"))
    inputs, _ = zoo.kind_inputs(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes, position_offset=P)
    before = model.bert.embeddings(inputs["input_ids"])
    with use_prefix(model, kv):
        model(**inputs)
        assert torch.equal(model.bert.embeddings(inputs["input_ids"]), before)
    assert torch.equal(model.bert.embeddings(inputs["input_ids"]), before)


def test_the_offset_of_a_call_that_failed_is_forgotten():
    model = patch_model(zoo.kind("bert"))
    inputs, _ = zoo.kind_inputs(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes, position_offset=P)
    before, start = model(**inputs).logits, text_keys_values(model, inputs["input_ids"][:1])
    with use_prefix(model, kv), pytest.raises(ValueError, match="exactly one of input_ids"):
        model(attention_mask=inputs["attention_mask"])
    again = text_keys_values(model, inputs["input_ids"][:1])
    assert torch.equal(again.keys[0], start.keys[0])
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", ["distilbert", "albert", "modernbert"])
def test_encoders_without_a_cache_move_explicit_positions_alone(name):
    model = patch_model(zoo.kind(name))
    assert patch_of(model).default_offset(P) == 0
    inputs, real = zoo.kind_inputs(model)
    moved = tiny.kv_of_shapes(patch_of(model).shapes, position_offset=3)
    still = PrefixKV(moved.keys, moved.values, 0)
    if name == "modernbert":  # whose positions are rotary, so that only distances matter
        with use_prefix(model, moved):
            got = model(**inputs).logits
            positions = tiny.positions(inputs["attention_mask"])
            expected = model(**inputs, position_ids=positions).logits
        torch.testing.assert_close(got[real], expected[real], **EXACT)
    else:
        with use_prefix(model, moved), pytest.raises(ValueError, match="takes position_ids"):
            model(**inputs)
    if name == "distilbert":  # its heads take no position_ids
        model = model.base_model
        patch_model(model)
    with use_prefix(model, moved):
        got = model(**inputs, position_ids=torch.arange(7)[None])[0]
    with use_prefix(model, still):
        expected = model(**inputs, position_ids=torch.arange(7)[None] + 3)[0]
    torch.testing.assert_close(got[real], expected[real], **EXACT)


@pytest.mark.parametrize("name", ["t5 encoder", "vit"])
def test_models_that_cannot_be_told_take_no_offset(name):
    model = patch_model(zoo.kind(name))
    kv = tiny.kv_of_shapes(patch_of(model).shapes, position_offset=2)
    with (
        pytest.raises(ValueError, match=r"position_offset: got 2, takes 0"),
        use_prefix(model, kv),
    ):
        pass


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "electra", "bart"])
def test_a_text_that_does_not_fit_behind_the_prefix(name):
    """48 positions, of which RoBERTa uses those from 1: no index error, and no last one lost."""
    model = patch_model(zoo.kind(name))
    room = 48 - P - (name == "roberta")
    field = "decoder_input_ids" if name == "bart" else "input_ids"
    kv = tiny.kv_of_shapes(patch_of(model).shapes, P, position_offset=P).detach()
    inputs = {"input_ids": tiny.prompt(4)} if name == "bart" else {}
    with torch.no_grad(), use_prefix(model, kv):
        model(**inputs, **{field: tiny.prompt(room)})
        with pytest.raises(ValueError, match=r"got 5, which moves .* position 48; .* learned 48"):
            model(**inputs, **{field: tiny.prompt(room + 1)})


@pytest.mark.parametrize("name", ["gpt2", "opt", "roberta"])
def test_padding_needs_no_room(name):
    model = patch_model(zoo.kind(name))
    ids, mask = tiny.batch((42, 7), "left")
    ids, mask = (torch.nn.functional.pad(x, (6, 0)) for x in (ids, mask))
    kv = tiny.kv_of_shapes(patch_of(model).shapes, P, position_offset=P).detach()
    with torch.no_grad(), use_prefix(model, kv):
        padded = model(ids, attention_mask=mask).logits[0, -1]
        alone = model(ids[:1, 6:]).logits[0, -1]
    torch.testing.assert_close(padded, alone, **EXACT)


def test_generating_past_the_last_position():
    model = patch_model(zoo.kind("gpt2"))
    kv = tiny.kv_of_shapes(patch_of(model).shapes, P, position_offset=P).detach()
    with use_prefix(model, kv):
        assert tiny.generate(model, tiny.prompt(40), max_new_tokens=4).shape[1] == 4
        with pytest.raises(ValueError, match="to position 48"):
            tiny.generate(model, tiny.prompt(40), max_new_tokens=5)
