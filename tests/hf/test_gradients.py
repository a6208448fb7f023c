"""Gradients reach the right prefix, whenever the backward runs."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import patch_model, use_prefix

EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture
def model(architecture):
    return tiny.build(architecture, torch.float64).train()


@pytest.fixture
def loss(model):
    """The loss of a batch behind a prefix."""
    ids, mask = tiny.batch()
    labels = ids.masked_fill(~mask.bool(), -100)

    def run(kv):
        with use_prefix(model, kv):
            return model(ids, attention_mask=mask, labels=labels).loss

    return run


def enable_checkpointing(model, use_reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def test_checkpointing_changes_no_gradient(model, loss):
    patch_model(model)
    kv = tiny.random_kv(model, requires_grad=True)
    loss(kv).backward()
    expected = tiny.gradients(kv)
    assert all(gradient.abs().max() > 1e-6 for gradient in expected)
    enable_checkpointing(model)
    loss(kv).backward()
    torch.testing.assert_close(tiny.gradients(kv), expected, **EXACT)


def test_checkpointing_with_a_frozen_base(model, loss):
    """No input of the first layer needs a gradient then; only the prefix does."""
    patch_model(model.requires_grad_(False))
    kv = tiny.random_kv(model, requires_grad=True)
    loss(kv).backward()
    expected = tiny.gradients(kv)
    enable_checkpointing(model)
    loss(kv).backward()
    torch.testing.assert_close(tiny.gradients(kv), expected, **EXACT)


def test_reentrant_checkpointing_is_refused(model, loss):
    patch_model(model)
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant"):
        loss(tiny.random_kv(model, requires_grad=True))


def test_checkpointing_in_a_block_that_restores_the_model_is_refused(model, loss):
    enable_checkpointing(model)
    with pytest.raises(ValueError, match="patch_model"):
        loss(tiny.random_kv(model, requires_grad=True))


def test_checkpointing_in_a_nested_block_that_restores_the_model_is_refused(model, loss):
    """The inner block did not patch the model, yet it will not stay patched either."""
    enable_checkpointing(model)
    outer, inner = (tiny.random_kv(model, seed=seed, requires_grad=True) for seed in (0, 1))
    with use_prefix(model, outer), pytest.raises(ValueError, match="patch_model"):
        loss(inner)


def test_checkpointing_does_not_matter_where_nothing_is_trained(model, loss):
    kv = tiny.random_kv(model)
    expected = loss(kv)
    enable_checkpointing(model, use_reentrant=True)
    with torch.no_grad():
        torch.testing.assert_close(loss(kv), expected, **EXACT)
    model.eval()
    torch.testing.assert_close(loss(kv), expected, **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_after_the_block(model, loss, checkpointing):
    patch_model(model)
    kv = tiny.random_kv(model, requires_grad=True)
    ids, mask = tiny.batch()
    labels = ids.masked_fill(~mask.bool(), -100)
    with use_prefix(model, kv):
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    expected = tiny.gradients(kv)
    if checkpointing:
        enable_checkpointing(model)
    late = loss(kv)  # the block is over
    late.backward()
    torch.testing.assert_close(tiny.gradients(kv), expected, **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_with_two_prefixes_before_one_backward(model, loss, checkpointing):
    patch_model(model)
    prefixes = [tiny.random_kv(model, length, seed=length, requires_grad=True) for length in (3, 5)]
    expected = []
    for kv in prefixes:
        loss(kv).backward()
        expected.append(tiny.gradients(kv))
    if checkpointing:
        enable_checkpointing(model)
    one, other = map(loss, prefixes)
    with use_prefix(model, tiny.random_kv(model, seed=9)):  # a third one is active by then
        (one + other).backward()
    for kv, gradient in zip(prefixes, expected, strict=True):
        torch.testing.assert_close(tiny.gradients(kv), gradient, **EXACT)


def test_gradients_are_sums_over_rows(model):
    patch_model(model)
    kv = tiny.random_kv(model, requires_grad=True)
    ids, mask = tiny.batch()
    with use_prefix(model, kv):
        model(ids, attention_mask=mask).logits[mask.bool()].square().sum().backward()
        together = tiny.gradients(kv)
        for row in range(len(ids)):
            model(ids[row][mask[row].bool()][None]).logits.square().sum().backward()
    torch.testing.assert_close(tiny.gradients(kv), together, rtol=1e-9, atol=1e-9)


def test_gradients_against_finite_differences():
    """GPT-2 only: the others' norms round to float32 whatever the model's dtype."""
    model = patch_model(tiny.build("gpt2", torch.float64))
    kv = tiny.random_kv(model, requires_grad=True)
    ids, mask = tiny.batch()

    def energy():  # as the loss is in every model
        with use_prefix(model, kv):
            return model(ids, attention_mask=mask).logits[mask.bool()].logsumexp(-1).sum()

    energy().backward()
    step = 1e-6
    for tensor, gradient in zip((*kv.keys, *kv.values), tiny.gradients(kv), strict=True):
        direction = torch.randn_like(tensor)
        ends = []
        with torch.no_grad():
            for move in (step, -2 * step, step):
                tensor += move * direction
                ends.append(energy().item())
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_leaf_in_another_dtype_gets_its_gradient(model, loss):
    """A float32 prefix trains a float64 model, or a bfloat16 one: the cast is in the graph."""
    patch_model(model)
    kv = tiny.random_kv(model, requires_grad=True)
    loss(kv).backward()
    expected = tiny.gradients(kv)
    single = kv.to(dtype=torch.float32).detach()
    for tensor in (*single.keys, *single.values):
        tensor.requires_grad_()
    loss(single).backward()
    for got, want in zip(tiny.gradients(single), expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-5)


def test_checkpointing_every_other_layer(model, loss):
    """This is an option of transformers, and its Trainer passes it on."""
    patch_model(model)
    kv = tiny.random_kv(model, requires_grad=True)
    loss(kv).backward()
    expected = tiny.gradients(kv)
    model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    loss(kv).backward()
    torch.testing.assert_close(tiny.gradients(kv), expected, **EXACT)
