"""PrefixTuningModel: a frozen base, a trained encoder, and nothing else."""

import copy

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel, use_prefix
from fastprefix.encoders import DirectEncoder, MLPEncoder

P = 6


@pytest.fixture(params=[False, True], ids=["direct", "projection"])
def config(request):
    return PrefixConfig(num_virtual_tokens=P, prefix_projection=request.param, init_std=1.0)


@pytest.fixture
def tuned(model, config):
    return PrefixTuningModel(model, config)


@pytest.fixture
def inputs():
    ids, mask = tiny.batch()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def steps(tuned, inputs, count=5, lr=1e-2):
    """Losses of a few optimiser steps."""
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(count):
        loss = tuned(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_base_is_unchanged_by_training_and_the_loss_falls(tuned, bare, inputs):
    losses = steps(tuned.train(), inputs)
    assert losses[-1] < losses[0] - 0.1
    expected = bare.state_dict()
    assert tuned.base_model.state_dict().keys() == expected.keys()
    for name, tensor in tuned.base_model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_only_the_encoder_gets_gradients(tuned, inputs):
    tuned(**inputs).loss.backward()
    for name, parameter in tuned.named_parameters():
        if name.startswith("encoders.default."):
            assert parameter.requires_grad
            assert parameter.grad.abs().max() > 0, name
        else:
            assert not parameter.requires_grad
            assert parameter.grad is None, name


def test_loss_and_gradients_equal_those_of_an_expanded_prefix(tuned, bare, inputs):
    ids, mask, labels = inputs.values()
    tuned(**inputs).loss.backward()
    ours = [p.grad.clone() for p in tuned.encoder.parameters()]
    tuned.zero_grad()
    out = tiny.expanded_forward(bare, tuned.encoder(), ids, mask, labels=labels)
    out.loss.backward()
    plain = [p.grad for p in tuned.encoder.parameters()]
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_export_is_what_the_forward_used(tuned, bare, inputs):
    tuned.eval()
    exported = tuned.export()
    assert not exported.requires_grad
    assert exported.position_offset == P
    ids, mask, _ = inputs.values()
    got = tuned(input_ids=ids, attention_mask=mask).logits
    with use_prefix(bare, exported):
        assert torch.equal(bare(ids, attention_mask=mask).logits, got)


def test_generate_equals_use_prefix(tuned, bare, inputs):
    ids, mask, _ = inputs.values()
    got = tiny.generate(tuned, ids, mask)
    with use_prefix(bare, tuned.export()):
        assert torch.equal(tiny.generate(bare, ids, mask), got)


def test_forward_takes_what_the_base_takes(tuned, inputs):
    ids, mask, _ = inputs.values()
    expected = tuned(ids, mask).logits
    same = tuned(input_ids=ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits
    assert torch.equal(same[mask.bool()], expected[mask.bool()])
    embeds = tuned.base_model.get_input_embeddings()(ids)
    assert torch.equal(tuned(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    assert tuned(ids, mask, return_dict=False)[0].shape == expected.shape


def test_state_dict_holds_the_encoder_alone(tuned, inputs):
    state = tuned.state_dict()
    assert state
    assert all(name.startswith("encoders.default.") for name in state if name != "_extra_state")
    wrapped = torch.nn.ModuleDict({"inner": tuned})
    assert wrapped.state_dict().keys() == {f"inner.{name}" for name in state}


def test_load_state_dict_round_trips(architecture, tuned, config, inputs):
    steps(tuned, inputs, 2)
    other = PrefixTuningModel(tiny.build(architecture), config)
    assert not torch.equal(other(**inputs).logits, tuned(**inputs).logits)
    result = other.load_state_dict(copy.deepcopy(tuned.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(**inputs).logits, tuned(**inputs).logits)


def test_load_state_dict_still_misses_what_is_missing(tuned):
    state = tuned.state_dict()
    state.pop("encoders.default.embedding")
    with pytest.raises(RuntimeError, match=r"encoders\.default\.embedding"):
        tuned.load_state_dict(state)


def test_load_state_dict_inside_another_module(tuned):
    wrapped = torch.nn.ModuleDict({"inner": tuned})
    wrapped.load_state_dict(wrapped.state_dict())


def test_same_line_as_peft_prints(tuned, capsys):
    tuned.print_trainable_parameters()
    trainable = sum(p.numel() for p in tuned.encoder.parameters())
    total = trainable + sum(p.numel() for p in tuned.base_model.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}\n"
    )


def test_dropout_is_for_training_only(architecture, inputs):
    config = PrefixConfig(num_virtual_tokens=P, dropout=0.5, init_std=1.0)
    tuned = PrefixTuningModel(tiny.build(architecture), config).train()
    assert not torch.equal(tuned(**inputs).logits, tuned(**inputs).logits)
    assert all((key != 0).all() for key in tuned.export().keys)
    assert tuned.encoder.training, "export puts the encoder back in training"
    tuned.eval()
    assert torch.equal(tuned(**inputs).logits, tuned(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_encoder_stays_float32_whatever_the_base_is(architecture, config, inputs, dtype):
    tuned = PrefixTuningModel(tiny.build(architecture, dtype), config)
    assert tuned.dtype == dtype
    losses = steps(tuned, inputs)
    assert all(p.dtype == torch.float32 for p in tuned.encoder.parameters())
    assert losses[-1] < losses[0]


def test_sizes_of_the_encoders(model):
    direct = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=P)).encoder
    assert isinstance(direct, DirectEncoder)
    assert direct.embedding.shape[0] == P
    projected = PrefixConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=5)
    mlp = PrefixTuningModel(model, projected).encoder
    assert isinstance(mlp, MLPEncoder)
    assert mlp.embedding.shape == (P, 64)
    assert mlp.transform[0].weight.shape == (5, 64)
    assert mlp.transform[2].weight.shape == (direct.embedding.shape[1], 5)


def test_position_offset_zero_keeps_the_positions_of_the_text(model, bare, inputs):
    tuned = PrefixTuningModel(
        model, PrefixConfig(num_virtual_tokens=P, position_offset=0, init_std=1.0)
    ).eval()
    ids, mask, _ = inputs.values()
    exported = tuned.export()
    assert exported.position_offset == 0
    expected = tiny.expanded_forward(bare, exported, ids, mask).logits
    got = tuned(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-4)
    moved = PrefixKV(exported.keys, exported.values, P)
    with use_prefix(bare, moved):
        assert not torch.allclose(bare(ids, attention_mask=mask).logits, got)


@pytest.mark.parametrize(
    "options",
    [{"num_virtual_tokens": 1}, {"prefix_bias": "learned"}, {"gated": True}],
    ids=["one token", "bias", "gate"],
)
def test_what_was_exported_stays_while_training_goes_on(options):
    tuned = PrefixTuningModel(tiny.build(), PrefixConfig(**{"num_virtual_tokens": 4, **options}))
    kv = tuned.export()
    before = [tensor.clone() for tensor in kv.tensors]
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter += 1.0
    assert all(map(torch.equal, kv.tensors, before))
    assert not torch.equal(tuned.export().keys[0], before[0])
