"""A language model on the device: what it generates and learns is what the concatenation gives.

In float32, so that ids are equal. The model is SmolLM2 if its package is installed.
"""

from __future__ import annotations

import os

import pytest
import torch

from device.records import SUITE_ON
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.bench import language_model as lm

pytestmark = pytest.mark.gpu
PLACE = os.environ.get(SUITE_ON, "")
CHECK = PLACE in ("", "cpu")  # a simulated device gives no right results
LENGTHS = (7, 4, 1, 5)
ROWS = ["long", None, "short", "long"]
NEW = 3 if PLACE == "cpu" else 24
CACHES = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, compiled": {"cache_implementation": "static"},
}


@pytest.fixture(scope="module")
def model(device):
    return lm.build(device, torch.float32, PLACE)


@pytest.fixture(scope="module")
def texts(model):
    return [lm.tokens(model, length, seed=row) for row, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def fronts(model):
    sizes = (9, 5) if PLACE == "cpu" else (200, 90)
    return {n: lm.tokens(model, P, seed=9) for n, P in zip(("long", "short"), sizes, strict=True)}


def using(model, kv, rows):
    """Rows of one name have one prefix, which needs no names."""
    if len(set(rows)) == 1:
        return use_prefix(model, kv[rows[0]], check=CHECK)
    return use_prefix(model, kv, rows, check=CHECK)


def concatenated(fronts, rows, texts):
    return lm.padded(
        [
            text if name is None else torch.cat([fronts[name], text])
            for name, text in zip(rows, texts, strict=True)
        ]
    )


@pytest.mark.parametrize("prefixes", ["one prefix", "several prefixes"])
@pytest.mark.parametrize("cache", CACHES)
def test_generated_ids_are_those_of_the_concatenation(
    device, real, model, texts, fronts, cache, prefixes
):
    compiles = not CACHES[cache].get("disable_compile", "static" not in cache)
    if compiles and device.type != "cuda":
        pytest.skip("transformers compiles by itself on a GPU only")
    # compilation takes seconds for every layer, and four of them show what thirty would
    served = lm.build(device, torch.float32, PLACE, layers=4) if compiles else model
    rows = ROWS if prefixes == "several prefixes" else ["long"] * len(ROWS)
    expected = lm.generate(served, *concatenated(fronts, rows, texts), new=NEW)
    kv = {n: PrefixKV.prefill(served, front[None], check=CHECK) for n, front in fronts.items()}
    with using(served, kv, rows):
        got = lm.generate(served, *lm.padded(texts), new=NEW, **CACHES[cache])
        if compiles:  # the graphs of the first call, replayed on another batch
            other = [text.flip(0) for text in texts]
            again = lm.generate(served, *lm.padded(other), new=NEW, **CACHES[cache])
    real()
    assert torch.equal(got, expected)
    without = lm.generate(served, *lm.padded(texts), new=NEW)
    assert not torch.equal(got, without), "the prefix changes nothing: this test shows nothing"
    if compiles:
        assert hasattr(served, "_compiled_call"), "transformers compiled nothing"
        assert torch.equal(again, lm.generate(served, *concatenated(fronts, rows, other), new=NEW))


@pytest.mark.parametrize("prefixes", ["one prefix", "several prefixes"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_training_step_is_that_of_the_expanded_prefix(device, real, checkpointing, prefixes):
    length, text = (5, 12) if PLACE == "cpu" else (20, 64)
    model, bare = (lm.build(device, torch.float32, PLACE, layers=4) for _ in range(2))
    ids = lm.tokens(model, 4, text)
    names = ["a", "b", "a", "b"] if prefixes == "several prefixes" else ["a"] * 4
    kv = {name: lm.random_prefix(model, length, seed) for seed, name in enumerate("ab")}
    patch_model(model, check=CHECK)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with using(model, kv, names):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    found = gradients(kv, names)
    real()
    expected = lm.expanded_loss(bare, [kv[name] for name in names], ids)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(found, gradients(kv, names), strict=True):
        assert want.norm() > 0
        assert (got - want).norm() < 1e-3 * want.norm()


def gradients(kv, names):
    """Of all keys and values of the prefixes in use, which forget them."""
    tensors = [x for name in sorted(set(names)) for x in (*kv[name].keys, *kv[name].values)]
    found = [x.grad for x in tensors]
    for x in tensors:
        x.grad = None
    return found
