"""PrefixConfig's prefix_bias and gated: trained, saved, mixed, grown, refused."""

import json

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, use_prefix
from fastprefix.hf.patch.patch import patch_of
from fastprefix.tuning.accounting import count_parameters
from fastprefix.tuning.callbacks.growth import grow

BATCH = (torch.arange(1, 13).view(2, 6), torch.ones(2, 6, dtype=torch.long))
LEARNED = {"bias": {"prefix_bias": "learned"}, "gate": {"gated": True}}
ENCODERS = {
    "direct": {},
    "uneven": {"layer_lengths": [4, 2, 0]},
    "shared": {"share_layers": True},
    "frozen tokens": {"num_frozen_tokens": 1},
    "MLP": {"prefix_projection": True, "encoder_hidden_size": 8},
    "LSTM": {
        "prefix_projection": True,
        "encoder_hidden_size": 8,
        "encoder_reparameterization_type": "LSTM",
    },
}


def config(P=4, **options):
    return PrefixConfig(**{"num_virtual_tokens": P, "init_std": 1.0, **options})


def numbers(tuned, name="default"):
    return tuned.encoders[name].reweighting.numbers


def loss(tuned):
    ids, mask = BATCH
    return tuned(input_ids=ids, attention_mask=mask, labels=ids).loss


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("name", ENCODERS)
def test_trained_beside_every_encoder(tmp_path, name, kind):
    bare = tiny.build()
    tuned = PrefixTuningModel(tiny.build(), config(**ENCODERS[name], **LEARNED[kind]))
    lengths = ENCODERS[name].get("layer_lengths", [4] * 3)
    heads = [n if length else 0 for n, length in zip([8] * 3, lengths, strict=True)]
    assert numbers(tuned).shape == (sum(heads),)
    assert not numbers(tuned).any()
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert tuned.get_nb_trainable_parameters()[0] == trainable
    assert count_parameters(tuned).exported == sum(x.numel() for x in tuned.export().tensors)
    ids, mask = BATCH
    if kind == "gate":  # training starts from the bare model, to the bit
        assert torch.equal(tuned(ids, mask).logits, bare(ids, attention_mask=mask).logits)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 0.05)
    before = loss(tuned)
    for _ in range(3):
        optimizer.zero_grad()
        loss(tuned).backward()
        optimizer.step()
    assert loss(tuned) < before
    assert numbers(tuned).all()
    tuned.eval()
    exported = tuned.export()
    assert exported.reweighting.kind == kind
    assert torch.equal(torch.cat(exported.reweighting.heads), numbers(tuned))
    with torch.no_grad(), use_prefix(tuned.base_model, exported):
        assert torch.equal(tuned.base_model(ids).logits, tuned(ids).logits)

    tuned.save_pretrained(tmp_path)
    loaded = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded(ids, mask).logits, tuned(ids, mask).logits)
    assert numbers(loaded).requires_grad
    assert (loaded.prefix_config.prefix_bias, loaded.prefix_config.gated) == (
        ("learned", False) if kind == "bias" else (None, True)
    )
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["peft_type"] == "FASTPREFIX_KV"
    assert about["not_peft"] == f"its query heads have a {kind} each"
    state = tuned.state_dict()
    assert "encoders.default.reweighting.numbers" in state


def test_a_fixed_bias(tmp_path):
    """-log 2 for two copies of each token is one copy; it is no parameter."""
    plain = PrefixTuningModel(tiny.build(), config(position_offset=0)).eval()
    half = -torch.tensor(2.0).log().item()
    tuned = PrefixTuningModel(
        tiny.build(), config(8, position_offset=0, prefix_bias=half, task_type=None)
    ).eval()
    embedding = plain.encoder.embedding.detach()
    tuned.encoder.start_from(torch.cat([embedding, embedding]))
    ids, mask = BATCH
    expected = plain(ids, mask).logits
    torch.testing.assert_close(tuned(ids, mask).logits, expected, rtol=1e-4, atol=1e-4)
    assert not numbers(tuned).requires_grad
    assert tuned.get_nb_trainable_parameters()[0] == tuned.encoder.embedding.numel()
    assert "encoders.default.reweighting.numbers" in tuned.state_dict()
    tuned.save_pretrained(tmp_path)
    loaded = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path)
    assert loaded.prefix_config.prefix_bias == half
    assert torch.equal(loaded(ids, mask).logits, tuned(ids, mask).logits)


def test_named_adapters_in_one_batch(tmp_path):
    tuned = PrefixTuningModel(tiny.build(), config(prefix_bias="learned"))
    tuned.add_adapter("gated", config(3, gated=True))
    tuned.add_adapter("plain", config(5))
    with torch.no_grad():
        for name in ("default", "gated"):
            numbers(tuned, name).normal_()
    assert numbers(tuned).requires_grad
    assert not numbers(tuned, "gated").requires_grad
    tuned.set_requires_grad("gated")
    assert numbers(tuned, "gated").requires_grad
    names = ["gated", None, "default", "plain"]
    ids, mask = tiny.batch((6, 5, 3, 4))
    tuned.eval()
    mixed = tuned(ids, mask, prefix_names=names).logits
    for row, name in enumerate(names):
        alone = tuned(ids[row : row + 1], mask[row : row + 1], prefix_names=[name]).logits[0]
        real = mask[row].bool()
        torch.testing.assert_close(mixed[row][real], alone[real], rtol=1e-4, atol=1e-4)
    mixed.square().mean().backward()
    assert numbers(tuned).grad.all()
    assert numbers(tuned, "gated").grad.all()
    many = tuned.generate(input_ids=ids, attention_mask=mask, prefix_names=names, max_new_tokens=3)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row][None], "attention_mask": mask[row][None]}
        alone = tuned.generate(**one, prefix_names=[name], max_new_tokens=3)
        assert torch.equal(many[row], alone[0])
    tuned.save_pretrained(tmp_path)
    tuned.delete_adapter("gated")
    tuned.load_adapter(tmp_path / "gated", "gated")
    again = tuned(ids, mask, prefix_names=names).logits
    torch.testing.assert_close(again, mixed)


def test_survives_growth():
    tuned = PrefixTuningModel(tiny.build(), config(gated=True))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 0.05)
    for step in range(4):
        if step == 2:
            kept = numbers(tuned)
            grow(tuned.encoder, 2, optimizer)
            assert numbers(tuned) is kept
        optimizer.zero_grad()
        loss(tuned).backward()
        optimizer.step()
    kv = tuned.export()
    assert (kv.num_virtual_tokens, kv.position_offset) == (6, 0)
    assert numbers(tuned).all()


def test_layers_that_are_not_trained_yet():
    tuned = PrefixTuningModel(tiny.build(), config(prefix_bias="learned"))
    tuned.encoder.trained_slots = frozenset({2})
    loss(tuned).backward()
    first, second, third = numbers(tuned).grad.split(patch_of(tuned.base_model).query_heads)
    assert third.all()
    assert not first.any()
    assert not second.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_bias": "learn"}, "prefix_bias: got 'learn', takes a finite number"),
        ({"prefix_bias": float("nan")}, "prefix_bias: got nan"),
        ({"prefix_bias": True}, "prefix_bias: got True"),
        ({"prefix_bias": -1.0, "gated": True}, "prefix_bias: got -1.0 with gated=True"),
        ({"prefix_in_window": True, "gated": True}, "prefix_in_window: got True with gated=True"),
        ({"init": "zero", "gated": True}, "init: got 'zero' of zeros with gated=True"),
        ({"init_std": 0.0, "gated": True}, "init: got 'random' of zeros"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**options)


def test_prompts_have_none():
    with pytest.raises(TypeError, match="gated"):
        PromptConfig(gated=True)


def test_a_start_from_a_reweighted_prefix_is_refused(tmp_path):
    tuned = PrefixTuningModel(tiny.build(), config(gated=True))
    tuned.export().save(tmp_path / "kv.safetensors")
    start = config(init="prefix", init_prefix=str(tmp_path / "kv.safetensors"))
    with pytest.raises(ValueError, match=r"init_prefix: .* has a gate for each query head"):
        PrefixTuningModel(tiny.build(), start)
