"""Forward mode through patched models: refused by the fused backends, right with reference."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp

import fastprefix_testing.models as tiny
from fastprefix import patch_model, use_prefix
from fastprefix.hf.versions import set_attention


def logits_of(model, **options):
    def run(embeddings):
        return model(inputs_embeds=embeddings, use_cache=False, **options).logits

    return run


@pytest.fixture
def embeddings(model):
    return model.get_input_embeddings()(tiny.prompt(4)).detach()


@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_patched_model_loses_no_tangent(model, embeddings, with_prefix):
    """It was 11.3 off where it was 18.8; under sdpa transformers' own model refuses as well."""
    patch_model(model)
    kv = tiny.random_kv(model) if with_prefix else None
    with use_prefix(model, kv), pytest.raises(NotImplementedError, match="takes 'reference'"):
        jvp(logits_of(model), (embeddings,), (torch.randn_like(embeddings),))


@pytest.mark.parametrize("block", [False, True])
def test_reference_gives_a_model_forward_mode(model, bare, embeddings, block):
    """Without a prefix, in a block for no prefix and in none, it was the default that ran."""
    set_attention(bare, "eager")
    tangent = torch.randn_like(embeddings)
    expected = jvp(logits_of(bare), (embeddings,), (tangent,))
    patch_model(model, backend="reference")
    if block:
        with use_prefix(model, None):
            got = jvp(logits_of(model), (embeddings,), (tangent,))
    else:
        got = jvp(logits_of(model), (embeddings,), (tangent,))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_reference_does_so_behind_a_prefix(model, bare, embeddings):
    """The oracle holds the prefix in its cache."""
    set_attention(bare, "eager")
    patch_model(model, backend="reference")
    kv, tangent = tiny.random_kv(model), torch.randn_like(embeddings)
    places = torch.arange(4)[None] + kv.position_offset

    def cached(embeddings):
        cache = tiny.expanded(kv, 1)
        return bare(inputs_embeds=embeddings, position_ids=places, past_key_values=cache).logits

    expected = jvp(cached, (embeddings,), (tangent,))
    with use_prefix(model, kv):
        got = jvp(logits_of(model), (embeddings,), (tangent,))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_torch_func_are_autograds():
    model = patch_model(tiny.build("llama"))
    embeddings = model.get_input_embeddings()(tiny.prompt(4)).detach()
    with use_prefix(model, tiny.random_kv(model)):
        run = logits_of(model)
        got = grad(lambda x: run(x).square().sum())(embeddings)
        leaf = embeddings.clone().requires_grad_()
        run(leaf).square().sum().backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-3)
