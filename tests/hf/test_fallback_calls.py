"""fallback="expand": calls, caches and threads that it refuses, by name."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    StaticCache,
)

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixKV,
    patch_model,
    unpatch_model,
    use_prefix,
)
from fastprefix.kv import Reweighting
from fastprefix_testing.fallback import COUNT_PADS, MODELS, P, learned, make

pytestmark = pytest.mark.filterwarnings("ignore:.*fallback='expand' the prefix is copied")


def test_what_cannot_be_exact_is_refused_by_name():
    model = patch_model(make("falcon new"), fallback="expand")
    kv, ids = learned(model, requires_grad=False), tiny.prompt(4)
    ones = torch.ones_like(ids)

    def refused(message, error=NotImplementedError, kv=kv, rows=None, model=model, **kwargs):
        with pytest.raises(error, match=message), use_prefix(model, kv, rows):
            model(ids, **kwargs)

    heads = Reweighting("bias", (torch.zeros(4),) * 2)
    refused("a bias for each query head", kv=PrefixKV(kv.keys, kv.values, P, reweighting=heads))
    shorter = PrefixKV((kv.keys[0], kv.keys[1][:, 1:]), (kv.values[0], kv.values[1][:, 1:]), P)
    refused("different lengths in different layers", kv=shorter)
    refused("got StaticCache", past_key_values=StaticCache(config=model.config, max_cache_len=9))
    refused("got DynamicCache of .*DynamicSliding", past_key_values=windowed_cache())
    refused("output_attentions", ValueError, output_attentions=True)
    refused("attention_mask: got 4 dimensions", attention_mask=torch.ones(1, 1, 4, 4).bool())
    refused("attention_mask: got shape", ValueError, attention_mask=ones[:, :2])
    refused("position_ids: start anew", position_ids=torch.tensor([[0, 1, 0, 1]]))
    refused("rows: got 2 names", ValueError, {"a": kv}, ["a", None])
    model.gradient_checkpointing_enable()
    model.train()
    refused("gradient checkpointing", ValueError)
    with pytest.raises(ValueError, match="a prefix of 1 layers"), use_prefix(model, kv.select([0])):
        pass
    bloom = patch_model(make("bloom"), fallback="expand")
    away = learned(bloom)
    refused("position_offset", ValueError, PrefixKV(away.keys, away.values, 0), model=bloom)
    pads = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    with pytest.raises(NotImplementedError, match="a row of pads"), use_prefix(bloom, away):
        bloom(ids.expand(2, -1), attention_mask=pads)
    roformer = patch_model(make("roformer"), fallback="expand")
    away = learned(roformer)
    left = tiny.batch((4, 2))
    refused_left = pytest.raises(NotImplementedError, match="padding on the left")
    with use_prefix(roformer, away), refused_left:
        roformer(left[0], attention_mask=left[1])
    shorter = away.map(lambda x: x[:, 1:])
    shorter = PrefixKV(shorter.keys, shorter.values, P - 1)
    ragged = pytest.raises(NotImplementedError, match="rows: got prefixes of")
    with ragged, use_prefix(roformer, {"a": away, "b": shorter}, ["a", "b"]):
        pass


def windowed_cache():
    layer = transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=4)
    cache = DynamicCache()
    cache.layers = [layer, layer]
    return cache


def test_caches_of_other_texts_are_refused():
    model = patch_model(make("bloom"), fallback="expand")
    kv, other, ids = learned(model), learned(model, seed=1), tiny.prompt(4)
    bare = model(ids, use_cache=True).past_key_values
    with use_prefix(model, kv):
        ours = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="a text behind no prefix"):
            model(ids, past_key_values=bare)
    with use_prefix(model, other), pytest.raises(ValueError, match="behind another prefix"):
        model(ids, past_key_values=ours)
    with pytest.raises(ValueError, match="holds a prefix, and none is active"):
        model(ids, past_key_values=ours)
    with pytest.raises(RuntimeError, match="use_prefix block, which is closed"):
        unpatch_model(model)(ids, past_key_values=ours)


@pytest.mark.parametrize("name", ["roformer", "trocr", "bloom", "mpt", "falcon alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pads_that_take_positions_are_seen_with_any_weights(name, dtype):
    """Weights as they are made are so small that positions hardly matter to the results."""
    model_class, fields = MODELS[name]
    fields = {k: v for k, v in fields.items() if k not in ("initializer_range", "init_std")}
    cls = getattr(transformers, model_class)
    model = cls(cls.config_class(**fields)).to(dtype).eval()
    patch_model(model, fallback="expand")
    ids, mask = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    with use_prefix(model, learned(model)):
        if name in COUNT_PADS:
            with pytest.raises(NotImplementedError, match="padding on the left"):
                model(ids, attention_mask=mask)
        else:
            model(ids, attention_mask=mask)


def test_a_thread_in_no_block_is_refused():
    model, ids = patch_model(make("bloom"), fallback="expand"), tiny.prompt(4)
    with ThreadPoolExecutor(1) as pool, use_prefix(model, learned(model)):
        model(ids)
        with pytest.raises(RuntimeError, match="open in another thread"):
            pool.submit(model, ids).result()
