"""The share of the attention that a prefix takes, against eager attention weights."""

import pytest
import torch

from fastprefix import PrefixKV
from fastprefix.hf import is_patched
from fastprefix.hf.mass import attention_mass


@pytest.fixture
def eager(tiny, architecture):
    """The same weights with an attention that returns its weights."""
    model = tiny.build(architecture)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("side", ["left", "right", None])
def test_equals_the_weights_of_eager_attention(tiny, model, eager, side):
    kv = tiny.random_kv(model, 5)
    ids, mask = tiny.batch(side=side or "left")
    out = tiny.expanded_forward(eager, kv, ids, mask, output_attentions=True)
    model.train()
    got = attention_mass(model, kv, input_ids=ids, attention_mask=mask)
    assert model.training
    assert not is_patched(model)
    for slot, weights in enumerate(out.attentions):  # [B, Hq, L, P + L]
        shares = weights[..., :5].sum(-1).transpose(1, 2)[mask.bool()]  # real tokens, Hq
        torch.testing.assert_close(got[slot], shares.mean(0), rtol=1e-4, atol=1e-5)
        assert got[slot].min() > 0
        assert got[slot].max() < 1


def test_layers_without_a_prefix_have_none(tiny, model):
    kv = tiny.random_kv(model, 5)
    keys, values = (list(tensors) for tensors in (kv.keys, kv.values))
    keys[1], values[1] = keys[1][:, :0], values[1][:, :0]
    mass = attention_mass(model, PrefixKV(keys, values, 5), input_ids=tiny.prompt())
    assert not mass[1].any()
    assert mass[0].all()


def test_leaves_outputs_alone(tiny, model):
    kv, ids = tiny.random_kv(model, 5), tiny.prompt()
    before = model(ids).logits
    attention_mass(model, kv, input_ids=ids)
    assert torch.equal(model(ids).logits, before)
