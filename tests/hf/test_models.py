"""The tiny models notice everything that the other tests look for."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, use_prefix


@pytest.fixture
def ids(model):
    """What the model says to a text behind a prompt."""
    text, mask = tiny.batch()

    def say(kv):
        with use_prefix(model, kv):
            return tiny.generate(model, text, mask)

    return say


def test_prompt_decides_what_is_generated(model, ids):
    one = ids(PrefixKV.prefill(model, tiny.prompt(seed=1)))
    other = ids(PrefixKV.prefill(model, tiny.prompt(seed=2)))
    assert (one != other).float().mean() > 0.5
    text, mask = tiny.batch()
    assert (one != tiny.generate(model, text, mask)).float().mean() > 0.5


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_layer_of_the_prefix_counts(model, ids, layer):
    kv = PrefixKV.prefill(model, tiny.prompt())
    keys, values = list(kv.keys), list(kv.values)
    keys[layer], values[layer] = keys[layer][:, :0], values[layer][:, :0]
    assert not torch.equal(ids(kv), ids(PrefixKV(keys, values, kv.position_offset)))


@pytest.mark.parametrize("shift", [-1, 1])
def test_positions_count(model, ids, shift):
    kv = PrefixKV.prefill(model, tiny.prompt())
    moved = PrefixKV(kv.keys, kv.values, kv.position_offset + shift)
    assert not torch.equal(ids(kv), ids(moved))


def test_every_row_says_something_else(model, ids):
    said = ids(PrefixKV.prefill(model, tiny.prompt()))
    assert len({tuple(row.tolist()) for row in said}) == len(said)
