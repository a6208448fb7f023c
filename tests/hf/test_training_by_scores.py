"""Real models in training with dropout and soft caps, which composed computes from its scores.

Reference computes the same, with the weights that composed drops.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import patch_model, use_prefix
from fastprefix.attention import philox
from fastprefix.attention.backends import reference
from fastprefix.attention.backends.composed import chunks, scores
from fastprefix_testing.prompts import bert

DROPPED = 0.3
MODELS = {
    "bert": lambda: bert(attention_probs_dropout_prob=DROPPED, hidden_dropout_prob=0.1),
    "gpt2": lambda: tiny.build("gpt2", attn_pdrop=DROPPED, resid_pdrop=0.1),
    "gemma2": lambda: tiny.windowed("gemma2"),
    "gemma2 with dropout": lambda: tiny.windowed("gemma2", attention_dropout=DROPPED),
}
CLOSE = {"rtol": 1e-4, "atol": 3e-5}


@pytest.fixture(autouse=True)
def _short_chunks():
    """Texts here are short, so their chunks are, too."""
    with mock.patch.multiple(chunks, _SCORES=600, _QUERIES=4):
        yield


def step(name, backend="auto", checkpointing=False):
    """The logits of a training step, and the gradients of the prefix."""
    model = patch_model(MODELS[name](), backend=backend).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    (ids, mask), offset = tiny.batch((20, 13)), 0 if name == "bert" else None
    kv = tiny.random_kv(model, 6, position_offset=offset, requires_grad=True)
    torch.manual_seed(5)
    with use_prefix(model, kv):
        logits = model(ids % 100, attention_mask=mask).logits
    torch.manual_seed(6)
    (logits.log_softmax(-1)[..., 0] ** 2).sum().backward()
    return logits.detach(), tiny.gradients(kv)


@pytest.mark.parametrize("name", MODELS)
def test_equals_reference_with_the_same_weights_dropped(name):
    kept, compute = [], scores.forward

    def recorded(*args):
        options = args[-1]
        if options.dropout_p is not None:
            kept.append(scores.kept(args[0], args[1], args[3], options))
        return compute(*args)

    with (
        mock.patch.object(scores, "forward", side_effect=recorded) as forward,
        mock.patch.object(reference, "forward", side_effect=AssertionError),
    ):
        found = step(name)
    assert forward.called
    layers = MODELS[name]().config.num_hidden_layers
    assert len(kept) == (0 if name == "gemma2" else layers)
    with mock.patch.object(philox, "keep", side_effect=kept):
        expected = step(name, "reference")
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name):
    torch.testing.assert_close(step(name, checkpointing=True), step(name), rtol=0, atol=0)
