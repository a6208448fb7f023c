"""A cache by each name that a forward takes it by, and by its place: always the concatenation.

Release 5.24 of transformers renamed ``past_key_values`` to ``cache``; the old name still works.
"""

import inspect
import warnings

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, EncoderDecoderCache

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    patch_model,
    use_prefix,
)
from fastprefix.hf import patch_of
from fastprefix.hf.versions import CACHE_NAMES, cache_name, cache_of
from fastprefix_testing import zoo

CLOSE = {"rtol": 0, "atol": 1e-5}
WINDOWED = ("mistral", "gemma2")
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")


def own_name(model):
    """What this release calls the cache, the name that provokes no warning."""
    name = cache_name(tuple(inspect.signature(model.forward).parameters))
    assert name is not None
    return name


@pytest.fixture(params=["past_key_values", "own name", "position"])
def call(request):
    """Calls a model on ids with a cache, given in one of the ways."""

    def run(model, ids, cache, **kwargs):
        name = own_name(model)
        if request.param == "position":
            names = list(inspect.signature(model.forward).parameters)
            between = [kwargs.pop(other, None) for other in names[1 : names.index(name)]]
            return model(ids, *between, cache, **kwargs)
        name = name if request.param == "own name" else "past_key_values"
        return model(ids, **{name: cache}, **kwargs)

    return run


def build(architecture):
    return tiny.windowed(architecture) if architecture in WINDOWED else tiny.build(architecture)


@pytest.fixture(params=["llama", "qwen2", "gpt2", *WINDOWED])
def architecture(request):
    return request.param


@torch.no_grad()
def test_chunks_without_a_mask(architecture, call):
    """Positions come only from the cache's length, which was once looked for by one name."""
    model, bare = build(architecture), build(architecture)
    front, text = tiny.prompt(9), tiny.prompt(11, seed=5)
    ids = text.expand(2, -1)
    whole = torch.cat([front, text], 1)
    expected = bare(whole, attention_mask=torch.ones_like(whole)).logits[:, 9:]
    kv, cache, got = PrefixKV.prefill(model, front), DynamicCache(), []
    with use_prefix(model, kv):
        for piece in (ids[:, :5], ids[:, 5:9], ids[:, 9:]):
            got.append(call(model, piece, cache, use_cache=True).logits)
    assert cache.get_seq_length() == 11
    torch.testing.assert_close(torch.cat(got, 1), expected.expand(2, -1, -1), **CLOSE)


@torch.no_grad()
def test_chunks_with_a_mask(architecture, call):
    model, bare = build(architecture), build(architecture)
    front, (ids, mask) = tiny.prompt(9), tiny.batch((8, 5))
    expected = tiny.concatenated_logits(bare, front, ids, mask)
    kv, cache = PrefixKV.prefill(model, front), DynamicCache()
    with use_prefix(model, kv):
        first = call(model, ids[:, :6], cache, attention_mask=mask[:, :6]).logits
        second = call(model, ids[:, 6:], cache, attention_mask=mask).logits
    got = torch.cat([first, second], 1)[mask.bool()]
    torch.testing.assert_close(got, expected[mask.bool()], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_encoders_that_decode_go_on_behind_prefix_and_cache(name, call):
    """Their position embedding counts the cache, by a name that was changed as well."""
    model, bare = (zoo.kind(name, is_decoder=True) for _ in range(2))
    patch_model(model)
    P = 4
    patch = patch_of(model)
    kv = tiny.kv_of_shapes(patch.shapes, P, position_offset=patch.default_offset(P))
    assert kv.position_offset > 0
    ids = tiny.batch((7, 7))[0].clamp(min=3)
    expected_cache, cache = tiny.expanded(kv, 2), DynamicCache()
    expected = bare.base_model(ids, **{own_name(bare.base_model): expected_cache})[0]
    with use_prefix(model, kv):
        first = call(model.base_model, ids[:, :4], cache, use_cache=True)[0]
        second = call(model.base_model, ids[:, 4:], cache, use_cache=True)[0]
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_decoder_behind_an_encoder(call):
    model, bare = patch_model(zoo.kind("bart")), zoo.kind("bart")
    own = [layer for layer, group in enumerate(patch_of(model).groups) if group == "decoder"]
    whole = tiny.kv_of_shapes(patch_of(model).shapes, 4, position_offset=4)
    kv = whole.select(own).spread(own, patch_of(model).shapes)
    inputs, _ = zoo.kind_inputs(model, "left")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    decoded = inputs["decoder_input_ids"]
    filled = EncoderDecoderCache(tiny.expanded(whole.select(own), len(decoded)), DynamicCache())
    told = {**text, "decoder_input_ids": decoded, own_name(bare): filled}
    expected = bare(**told, use_cache=True).logits
    cache, got = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    options = {"attention_mask": text["attention_mask"], "use_cache": True}
    with use_prefix(model, kv):
        for piece in (decoded[:, :3], decoded[:, 3:]):
            out = call(model, text["input_ids"], cache, decoder_input_ids=piece, **options)
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-9)


def test_packed_sequences_refuse_a_filled_cache(call):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    rows = [{"input_ids": tiny.prompt(5)[0]}, {"input_ids": tiny.prompt(3)[0]}]
    packed, model, cache = collate(rows), tiny.build(), DynamicCache()
    packed.pop("labels", None)
    with use_prefix(model, tiny.random_kv(model)):
        call(model, tiny.prompt(), cache)
        with pytest.raises(ValueError, match="takes packed sequences without cache"):
            call(model, packed.pop("input_ids"), cache, **packed)


@torch.no_grad()
def test_positions_that_start_anew_are_not_packed_where_a_cache_is(call):
    """As in transformers, positions beside a cache are used as they are."""
    model = tiny.build()
    ids, positions = tiny.prompt(6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    kv = tiny.random_kv(model)
    bare, filled = tiny.build(), tiny.expanded(kv, 1)
    expected = bare(ids, position_ids=positions + 5, **{own_name(bare): filled}).logits
    with use_prefix(model, kv):
        got = call(model, ids, DynamicCache(), position_ids=positions).logits
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_prompt_refuses_a_filled_cache(name):
    tuned = PromptTuningModel(tiny.build(), PromptConfig(num_virtual_tokens=4)).eval()
    cache, ids = DynamicCache(), tiny.prompt(3)
    tuned.base_model(ids, **{own_name(tuned.base_model): cache})
    with pytest.raises(ValueError, match="got a cache that holds tokens"):
        tuned(ids, **{name: cache})


@torch.no_grad()
def test_chats_go_on_from_a_cache(architecture):
    """generate() is given the cache of the turn before, by the name that this release has."""
    model, bare = build(architecture), build(architecture)
    front, text, more = tiny.prompt(9), tiny.prompt(5, seed=5), tiny.prompt(4, seed=6)
    whole = torch.cat([front, text], 1)
    cache = DynamicCache()
    options = {own_name(model): cache, "max_new_tokens": 4}
    with use_prefix(model, PrefixKV.prefill(model, front)):
        first = tiny.generate(model, text, **options)
        second = tiny.generate(model, torch.cat([text, first, more], 1), **options)
    assert torch.equal(first, tiny.generate(bare, whole, max_new_tokens=4))
    whole = torch.cat([whole, first, more], 1)
    assert torch.equal(second, tiny.generate(bare, whole, max_new_tokens=4))


@pytest.fixture
def strict():
    """Deprecations of transformers are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings(
            "error", message=".*deprecated", module=r"(transformers|fastprefix)"
        )
        yield


@pytest.mark.usefixtures("strict")
def test_nothing_of_ours_provokes_a_deprecation(architecture):
    model = build(architecture)
    kv = PrefixKV.prefill(model, tiny.prompt())
    ids, mask = tiny.batch()
    with use_prefix(model, kv):
        model(ids, attention_mask=mask)
        tiny.generate(model, ids, mask)
        tiny.generate(model, ids, mask, num_beams=2)
    tuned = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=4))
    tuned(ids, attention_mask=mask, labels=ids).loss.backward()
    tiny.generate(tuned, ids, mask)
    prompted = PromptTuningModel(build(architecture), PromptConfig(num_virtual_tokens=4))
    prompted(ids, attention_mask=mask, labels=ids).loss.backward()
    tiny.generate(prompted, ids, mask)


def test_a_cache_is_found_by_each_name_and_none_where_there_is_none():
    cache = DynamicCache()
    for name in CACHE_NAMES:
        assert cache_of({name: cache, "use_cache": True}) is cache
        other = next(each for each in CACHE_NAMES if each != name)
        assert cache_of({name: cache, other: None}) is cache
    assert cache_of({"use_cache": True, "cache": None}) is None
