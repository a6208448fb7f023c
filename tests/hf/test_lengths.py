"""Masks and positions that count the prefix, as those beside a DynamicCache do, are refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fastprefix_testing.models as tiny
from fastprefix import patch_model, use_prefix
from fastprefix.hf import patch_of
from fastprefix_testing import zoo

P, L = 5, 7


def ones(rows, length):
    return torch.ones(rows, length, dtype=torch.long)


@pytest.fixture
def kv(model):
    return tiny.random_kv(model, P)


def refused(name, got):
    return pytest.raises(ValueError, match=rf"{name}: got shape \[1, {got}\], takes \[B, L\]")


def test_a_mask_of_prefix_and_text(model, kv):
    with use_prefix(model, kv), refused("attention_mask", P + L):
        model(tiny.prompt(L), attention_mask=ones(1, P + L))


@pytest.mark.parametrize("length", [L, 1])
def test_positions_of_prefix_and_text(model, kv, length):
    """Those of one token would broadcast."""
    positions = torch.arange(P + length)[None]
    with use_prefix(model, kv), refused("position_ids", P + length):
        model(tiny.prompt(length), position_ids=positions)


def test_positions_behind_the_prefix(model, kv):
    positions = torch.arange(P, P + L)[None]
    with use_prefix(model, kv), pytest.raises(ValueError, match=r"position_ids: got .* from 5 on"):
        model(tiny.prompt(L), position_ids=positions)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [0, 3])
def test_generate_with_a_mask_of_prefix_and_text(model, kv, cache, pads):
    ids, mask = tiny.batch((L, L - pads))
    wide = torch.cat([ones(2, P), mask], 1)
    with use_prefix(model, kv), pytest.raises(ValueError, match="attention_mask"):
        tiny.generate(model, ids, wide, cache_implementation=cache)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_is_in_the_cache_counts(model, kv, kind):
    def cache():
        if kind == "dynamic":
            return DynamicCache()
        return StaticCache(config=model.config, max_cache_len=32)

    ids = tiny.prompt(L)
    with use_prefix(model, kv), torch.no_grad():
        whole = model(ids, attention_mask=ones(1, L)).logits
        kept = cache()
        model(ids[:, :4], attention_mask=ones(1, 4), past_key_values=kept)
        rest = model(ids[:, 4:], attention_mask=ones(1, L), past_key_values=kept).logits
        torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)
        kept = cache()
        model(ids[:, :4], attention_mask=ones(1, 4), past_key_values=kept)
        with refused("attention_mask", P + L):
            model(ids[:, 4:], attention_mask=ones(1, P + L), past_key_values=kept)


@pytest.mark.parametrize("name", ["t5", "bart", "bert"])
def test_masks_of_every_part_of_a_model(name):
    model = patch_model(zoo.kind(name))
    inputs, _ = zoo.kind_inputs(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    masks = [key for key in inputs if key.endswith("attention_mask")]
    assert masks
    for key in masks:
        wide = {key: ones(2, inputs[key].shape[1] + P)}
        with use_prefix(model, kv), pytest.raises(ValueError, match="attention_mask: got shape"):
            model(**{**inputs, **wide})


def test_token_types_of_prefix_and_text():
    model = patch_model(zoo.kind("bert"))
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    with use_prefix(model, kv), refused("token_type_ids", P + 1):
        model(tiny.prompt(1), token_type_ids=ones(1, P + 1) * 0)
