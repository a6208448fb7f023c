"""The share of the attention that a prefix takes, against eager attention weights."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV
from fastprefix.hf import is_patched, patch_of
from fastprefix.hf.mass import attention_mass
from fastprefix.hf.patch.patching import patched
from fastprefix_testing import zoo


@pytest.fixture
def eager(architecture):
    """The same weights with an attention that returns its weights."""
    model = tiny.build(architecture)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("side", ["left", "right", None])
def test_equals_the_weights_of_eager_attention(model, eager, side):
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


def test_layers_without_a_prefix_have_none(model):
    kv = tiny.random_kv(model, 5)
    keys, values = (list(tensors) for tensors in (kv.keys, kv.values))
    keys[1], values[1] = keys[1][:, :0], values[1][:, :0]
    mass = attention_mass(model, PrefixKV(keys, values, 5), input_ids=tiny.prompt())
    assert not mass[1].any()
    assert mass[0].all()


def test_leaves_outputs_alone(model):
    kv, ids = tiny.random_kv(model, 5), tiny.prompt()
    before = model(ids).logits
    attention_mass(model, kv, input_ids=ids)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["bert", "albert", "t5", "bart"])
def test_encoders_and_encoder_decoders(name):
    """A mean over real tokens, each row by itself as in a padded batch; and a rough bound."""
    model = zoo.kind(name)
    inputs, _ = zoo.kind_inputs(model)
    with patched(model):
        shapes, groups = patch_of(model).shapes, patch_of(model).groups
    kv = tiny.kv_of_shapes(shapes).detach()
    whole = attention_mass(model, kv, **inputs)
    alone = []
    for row in range(2):
        one = {
            key: x[row : row + 1, inputs[key.replace("input_ids", "attention_mask")][row].bool()]
            for key, x in inputs.items()
        }
        alone.append((attention_mass(model, kv, **one), one))
    for slot, group in enumerate(groups):
        of_decoder = name in ("t5", "bart") and group != "encoder"
        key = "decoder_input_ids" if of_decoder else "input_ids"
        counts = [one[key].shape[1] for _, one in alone]
        sums = [mass[slot] * n for (mass, _), n in zip(alone, counts, strict=True)]
        torch.testing.assert_close(whole[slot], sum(sums) / sum(counts), rtol=1e-5, atol=1e-6)
        assert 0 < whole[slot].min() < whole[slot].max() < 1
