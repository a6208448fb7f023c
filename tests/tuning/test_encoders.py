"""Every encoder in a model: against plain attention over expanded prefixes, layer by layer."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, use_prefix

P = 6
ENCODERS = {
    "direct": {},
    "shared": {"share_layers": True},
    "mlp1": {"prefix_projection": True, "encoder_num_layers": 1},
    "mlp3": {"prefix_projection": True, "encoder_num_layers": 3, "encoder_hidden_size": 9},
    "per layer": {"prefix_projection": True, "encoder_per_layer": True, "encoder_hidden_size": 9},
    "lstm": {"prefix_projection": True, "encoder_reparameterization_type": "LSTM"},
}
LAYOUTS = {
    "even": ({}, (P, P, P)),
    "chosen": ({"layers": [2, 0]}, (P, 0, P)),
    "uneven": ({"layer_lengths": [2, 0, P]}, (2, 0, P)),
    "frozen": ({"num_frozen_tokens": 2}, (P, P, P)),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]


@pytest.fixture
def plain(bare):
    """The bare model under an attention function that puts a prefix in front of every layer."""

    def attend(module, query, key, value, attention_mask, scaling=None, prefix=None, **_):
        key, value = (
            torch.cat([front.expand(len(x), -1, -1, -1), x], dim=2)
            for front, x in zip(prefix.layer(module.layer_idx), (key, value), strict=True)
        )
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        length = key.shape[2] - attention_mask.shape[3]
        scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
        weights = (scores + torch.nn.functional.pad(attention_mask, (length, 0))).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("plain_prefix", attend)
    AttentionMaskInterface.register("plain_prefix", eager_mask)
    bare.set_attn_implementation("plain_prefix")
    return bare


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients(model, plain, encoder, layout):
    fields, lengths = LAYOUTS[layout]
    config = PrefixConfig(P, init_std=1.0, **encoder, **fields)
    tuned = PrefixTuningModel(model.double(), config).double()
    kv = tuned.encoder()
    assert tuple(key.shape[1] for key in kv.keys) == lengths
    # pads on the right: a row of the left ones sees nothing where a layer has no prefix
    ids, mask = tiny.batch(side="right")
    labels = ids.masked_fill(mask == 0, -100)
    positions = tiny.positions(mask) + P
    expected = plain.double()(
        ids, attention_mask=mask, position_ids=positions, labels=labels, prefix=kv
    ).loss
    parameters = list(tuned.encoder.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    loss = tuned(ids, mask, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for got, want in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_drops_the_encoder_and_gives_the_same_prefix(model, bare, encoder, layout):
    fields, _ = LAYOUTS[layout]
    config = PrefixConfig(P, init_std=1.0, dropout=0.3, **encoder, **fields)
    tuned = PrefixTuningModel(model, config).eval()
    computed, exported = tuned.encoder(), tuned.export()
    assert not exported.requires_grad
    for got, expected in zip(
        exported.keys + exported.values, computed.keys + computed.values, strict=True
    ):
        # torch has another LSTM kernel for when no gradient is wanted
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    ids, mask = tiny.batch()
    with use_prefix(bare, exported):
        logits = bare(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, tuned(ids, mask).logits, rtol=1e-5, atol=1e-5)
        generated = tiny.generate(bare, ids, mask)
    assert torch.equal(tiny.generate(tuned, ids, mask), generated)


@pytest.mark.parametrize("architecture", ["llama"])
def test_layers_that_the_model_does_not_have(model):
    for fields, message in (
        ({"layers": [0, 3]}, "layers: got 3, takes 0 to 2"),
        ({"layer_lengths": [P, P]}, "layer_lengths: got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            PrefixTuningModel(model, PrefixConfig(P, **fields))
        assert model.config._attn_implementation == "sdpa"
        assert all(parameter.requires_grad for parameter in model.parameters())
