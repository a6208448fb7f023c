"""Adapters go to PEFT and come from it with equal logits."""

import copy

import peft
import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.kv import to_flat

P = 6
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=[False, True], ids=["direct", "projection"])
def projection(request):
    return request.param


@pytest.fixture
def config(projection):
    return PrefixConfig(num_virtual_tokens=P, prefix_projection=projection, init_std=1.0)


@pytest.fixture
def theirs(architecture, projection, bare):
    """A PEFT model with a prefix large enough to matter."""
    grouped = architecture != "gpt2"
    made = peft.get_peft_model(
        copy.deepcopy(bare),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            prefix_projection=projection,
            encoder_hidden_size=24 if projection else None,
            # PEFT derives the head size from the hidden size, which is not so in these models
            **({"token_dim": 32, "num_attention_heads": 2} if grouped else {}),
        ),
    ).eval()
    with torch.no_grad():
        for parameter in made.prompt_encoder.parameters():
            parameter.normal_(0, 0.7)
    return made


def test_peft_loads_what_we_save(model, bare, config, tmp_path):
    tuned = PrefixTuningModel(model, config).eval()
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    ids, mask = tiny.batch(side="right")
    expected = tuned(input_ids=ids, attention_mask=mask).logits
    got = loaded(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(loaded.base_model(ids, attention_mask=mask).logits, expected)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.peft
def test_peft_generates_as_we_do(model, bare, config, tmp_path):
    tuned = PrefixTuningModel(model, config).eval()
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    text, whole = tiny.batch((5, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
    ours = tuned.generate(input_ids=text, attention_mask=whole, **options)
    assert torch.equal(loaded.generate(input_ids=text, attention_mask=whole, **options), ours)


def test_we_load_what_peft_saves(theirs, model, tmp_path):
    theirs.save_pretrained(tmp_path)
    tuned = PrefixTuningModel.from_pretrained(model, tmp_path)
    ids, mask = tiny.batch(side="right")
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    got = tuned(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    labels = ids.masked_fill(mask == 0, -100)
    torch.testing.assert_close(
        tuned(input_ids=ids, attention_mask=mask, labels=labels).loss,
        theirs(input_ids=ids, attention_mask=mask, labels=labels).loss,
        **CLOSE,
    )


@pytest.mark.parametrize("projection", [False])  # PEFT saves no network to compare with
def test_gradients_equal_those_of_peft(theirs, model, tmp_path):
    theirs.save_pretrained(tmp_path)
    tuned = PrefixTuningModel.from_pretrained(model, tmp_path, is_trainable=True)
    ids, mask = tiny.batch(side="right")
    labels = ids.masked_fill(mask == 0, -100)
    for m in (theirs, tuned):
        m(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    expected = theirs.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(tuned.encoder.embedding.grad, expected, rtol=1e-3, atol=1e-6)


def test_there_and_back_changes_no_bit(theirs, model, bare, tmp_path):
    theirs.save_pretrained(tmp_path / "peft")
    tuned = PrefixTuningModel.from_pretrained(model, tmp_path / "peft")
    tuned.save_pretrained(tmp_path / "ours")
    again = PrefixTuningModel.from_pretrained(bare, tmp_path / "ours")
    assert torch.equal(to_flat(again.export()), to_flat(tuned.export()))
    flat = theirs.get_prompt_embedding_to_save("default")
    assert torch.equal(to_flat(again.export()), flat.cpu())


@pytest.mark.parametrize("projection", [False])  # PEFT's embedding has another width
def test_same_count_of_parameters_as_peft(theirs, model, capsys):
    theirs.print_trainable_parameters()
    PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=P)).print_trainable_parameters()
    expected, got = capsys.readouterr().out.splitlines()
    assert got == expected
