"""Patching and unpatching leave nothing behind; without a prefix nothing changes."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, unpatch_model, use_prefix
from fastprefix.hf import is_patched, patch_of
from fastprefix.kv import LayerShape


def state_of(model):
    """All that patching could touch: attributes, hooks and flags of every module."""
    return [
        (
            type(module),
            sorted(vars(module)),
            module.training,
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
            len(module._forward_hooks),
            module.forward.__func__,
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unpatching_restores_everything(architecture, attention):
    model = tiny.build(architecture, attn_implementation=attention).train()
    model.base_model.eval()
    ids, mask = tiny.batch()
    before, logits = state_of(model), model(ids, attention_mask=mask).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()

    assert patch_model(model) is model
    assert is_patched(model)
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt())):
        tiny.generate(model, ids, mask)
    assert unpatch_model(model) is model

    assert not is_patched(model)
    assert state_of(model) == before
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


def test_patching_adds_no_weights(model, bare):
    patch_model(model)
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in bare.named_buffers()]


def test_patching_twice_only_sets_the_backend(model):
    ids, mask = tiny.batch()
    kv = tiny.random_kv(model)
    before = state_of(model)
    patch_model(model, backend="composed")
    once = state_of(model)
    assert patch_model(model, backend="reference") is model
    assert state_of(model) == once
    with use_prefix(model, kv):
        model(ids, attention_mask=mask)
    unpatch_model(model)
    assert state_of(model) == before


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_prefix_a_patched_model_is_the_bare_one(model, bare, side):
    ids, mask = tiny.batch(side=side)
    patch_model(model)
    options = {"attention_mask": mask, "position_ids": tiny.positions(mask)}
    got, expected = model(ids, **options).logits, bare(ids, **options).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    if side == "left":
        assert torch.equal(tiny.generate(model, ids, mask), tiny.generate(bare, ids, mask))


def test_an_empty_prefix_is_none(model, bare):
    ids, mask = tiny.batch()
    with use_prefix(model, tiny.random_kv(model, 0)):
        got = tiny.generate(model, ids, mask)
    assert torch.equal(got, tiny.generate(bare, ids, mask))


def test_backends_agree(architecture):
    model = tiny.build(architecture, torch.float64)
    ids, mask = tiny.batch()
    kv = tiny.random_kv(model)
    found = []
    for backend in ("reference", "composed", "auto"):
        patch_model(model, backend=backend)
        with use_prefix(model, kv):
            found.append(model(ids, attention_mask=mask).logits)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    assert torch.equal(found[1], found[2]), "auto is composed on the CPU"


def test_the_named_backend_is_the_one_that_runs(model, monkeypatch):
    from fastprefix.attention.backends import reference

    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    ids, mask = tiny.batch()
    kv = tiny.random_kv(model)
    for backend, expected in (("composed", 0), ("reference", model.config.num_hidden_layers)):
        patch_model(model, backend=backend)
        calls.clear()
        with use_prefix(model, kv):
            model(ids, attention_mask=mask)
        assert len(calls) == expected


def test_unknown_backend_is_refused_and_nothing_patched(model):
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'quick'.*'composed'"):
        patch_model(model, backend="quick")
    assert state_of(model) == before


def test_layer_shapes_are_those_of_the_key_value_heads(architecture, model):
    shapes = patch_of(patch_model(model)).shapes
    heads = 4 if architecture == "gpt2" else 2
    assert shapes == (LayerShape(heads, 16, 16),) * 3


@pytest.mark.parametrize("function", [unpatch_model, patch_of])
def test_what_needs_a_patched_model_says_so(function):
    with pytest.raises(ValueError, match="patch_model"):
        function(tiny.build())


def test_a_patched_model_saves_a_plain_one(model, bare, tmp_path):
    ids, mask = tiny.batch()
    patch_model(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(
        again(ids, attention_mask=mask).logits, bare(ids, attention_mask=mask).logits
    )


def test_a_patched_model_pickles(model, bare):
    try:
        torch.save(bare, io.BytesIO())
    except AttributeError as error:  # some layers of transformers 5.20
        pytest.skip(f"nor does a bare model of this release: {error}")
    ids, mask = tiny.batch()
    kv = tiny.random_kv(model)
    patch_model(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with use_prefix(model, kv):
        expected = model(ids, attention_mask=mask).logits
    with use_prefix(again, kv):
        assert torch.equal(again(ids, attention_mask=mask).logits, expected)
