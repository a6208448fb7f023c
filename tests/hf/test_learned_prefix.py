"""A prefix of no text equals the same numbers copied into every row's cache, as PEFT does it."""

from functools import partial

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, use_prefix

EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture
def model(architecture):
    return tiny.build(architecture, torch.float64)


@pytest.fixture
def bare(architecture):
    return tiny.build(architecture, torch.float64)


@pytest.fixture(params=["left", "right", "none"])
def text(request):
    if request.param == "none":
        return tiny.batch((6, 6, 6))
    return tiny.batch(side=request.param)


@pytest.mark.parametrize("position_offset", [None, 0, 11])
def test_logits(model, bare, text, position_offset):
    ids, mask = text
    kv = tiny.random_kv(model, position_offset=position_offset)
    expected = tiny.expanded_forward(bare, kv, ids, mask).logits
    with use_prefix(model, kv):
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **EXACT)


def test_loss_and_gradients(model, bare, text):
    ids, mask = text
    labels = ids.masked_fill(~mask.bool(), -100)
    labels[0, :2] = -100  # and some of the text counts for nothing
    kv = tiny.random_kv(model, requires_grad=True)

    expected = tiny.expanded_forward(bare, kv, ids, mask, labels=labels).loss
    expected.backward()
    plain_gradients = tiny.gradients(kv)
    with use_prefix(model, kv):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(tiny.gradients(kv), plain_gradients, **EXACT)
    plain, ours = (dict(m.named_parameters()) for m in (bare, model))
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, **EXACT, msg=name)


def test_layers_may_have_prefixes_of_different_lengths(model, bare, text):
    """The oracle hides the rest of the prefix by each layer's own attention mask."""
    ids, mask = text
    kv, lengths = tiny.random_kv(model, 4), (2, 4, 0)

    def hide(module, args, kwargs, visible):
        layer_mask = kwargs["attention_mask"].clone()
        layer_mask[..., visible:4] = False
        return args, {**kwargs, "attention_mask": layer_mask}

    attentions = [m for m in bare.modules() if type(m).__name__.endswith("Attention")]
    for module, visible in zip(attentions, lengths, strict=True):
        module.register_forward_pre_hook(partial(hide, visible=visible), with_kwargs=True)
    expected = tiny.expanded_forward(bare, kv, ids, mask).logits

    keys = [key[:, :length] for key, length in zip(kv.keys, lengths, strict=True)]
    values = [value[:, :length] for value, length in zip(kv.values, lengths, strict=True)]
    with use_prefix(model, PrefixKV(keys, values, 4)):
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **EXACT)
