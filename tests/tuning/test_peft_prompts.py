"""Prompts go to PEFT and come from it with equal outputs, for every task that PEFT knows."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

import fastprefix_testing.models as tiny
from fastprefix import PromptConfig, PromptTuningModel
from fastprefix.formats.peft_prompts import load_prompt, save_prompt

P = 4
CLOSE = {"rtol": 0, "atol": 2e-5}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SPECIAL = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_LOUD = {**_SIZES, **_SPECIAL, "initializer_range": 0.2}
_SEQ2SEQ = {**_SPECIAL, "d_model": 32, "decoder_start_token_id": 0}
CASES = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**_LOUD), "CAUSAL_LM"),
    "gpt2": (
        AutoModelForCausalLM,
        GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **_SPECIAL),
        "CAUSAL_LM",
    ),
    "opt": (
        AutoModelForCausalLM,
        OPTConfig(**{**_SIZES, **_SPECIAL}, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2),
        "CAUSAL_LM",
    ),
    "gemma2": (
        AutoModelForCausalLM,
        Gemma2Config(**_LOUD, num_key_value_heads=2, head_dim=16),
        "CAUSAL_LM",
    ),
    "llama classifies": (AutoModelForSequenceClassification, LlamaConfig(**_LOUD), "SEQ_CLS"),
    "bert classifies": (AutoModelForSequenceClassification, BertConfig(**_LOUD), "SEQ_CLS"),
    "roberta classifies": (
        AutoModelForSequenceClassification,
        RobertaConfig(**{**_LOUD, "pad_token_id": 1}),
        "SEQ_CLS",
    ),
    "bert labels tokens": (AutoModelForTokenClassification, BertConfig(**_LOUD), "TOKEN_CLS"),
    "bert answers": (AutoModelForQuestionAnswering, BertConfig(**_LOUD), "QUESTION_ANS"),
    "bert": (AutoModel, BertConfig(**_LOUD), "FEATURE_EXTRACTION"),
    "t5": (
        AutoModelForSeq2SeqLM,
        T5Config(**_SEQ2SEQ, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=2.0),
        "SEQ_2_SEQ_LM",
    ),
    "bart": (
        AutoModelForSeq2SeqLM,
        BartConfig(
            **_SEQ2SEQ,
            init_std=0.2,
            dropout=0.0,
            forced_eos_token_id=None,
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
        ),
        "SEQ_2_SEQ_LM",
    ),
}
KINDS = {
    "PROMPT_TUNING": lambda **fields: peft.PromptTuningConfig(**fields),
    "P_TUNING": lambda **fields: peft.PromptEncoderConfig(**fields),
    "P_TUNING by LSTM": lambda **fields: peft.PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", encoder_hidden_size=8, **fields
    ),
}


@pytest.fixture(params=CASES)
def task(request):
    return CASES[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def build(make, config):
    torch.manual_seed(0)
    return make.from_config(config).eval()


def outputs(model, ids, mask, labels):
    """Per-token outputs as lists of rows, so that the prompt's own can be cut off."""
    out = model(input_ids=ids, attention_mask=mask, **labels)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return {name: out[name] for name in names if out.get(name) is not None}


def same(ours, theirs, mask, task_type):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        if got.shape != expected.shape:
            expected = expected[:, P:]
        if got.shape[:2] == mask.shape and task_type != "SEQ_2_SEQ_LM":
            got, expected = got[mask.bool()], expected[mask.bool()]
        torch.testing.assert_close(got, expected, **CLOSE)


def inputs(task_type):
    causal_classifier = task_type == "SEQ_CLS"  # PEFT's reads padding on the right
    ids, mask = tiny.batch((6, 6) if causal_classifier else (6, 3, 2), side="right")
    ids = ids.clamp(min=2)
    more = {"labels": ids[:, :2].contiguous()} if task_type == "SEQ_2_SEQ_LM" else {}
    return ids, mask, more


def test_both_ways(task, kind, tmp_path):
    make, config, task_type = task
    theirs = peft.get_peft_model(
        build(make, config), KINDS[kind](task_type=task_type, num_virtual_tokens=P)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PromptTuningModel.from_pretrained(build(make, config), tmp_path / "theirs")
    batch = inputs(task_type)
    expected = outputs(theirs, *batch)
    same(outputs(ours, *batch), expected, batch[1], task_type)
    plain = outputs(build(make, config), *batch)
    name = next(iter(expected))
    moved = plain[name] - outputs(ours, *batch)[name]
    assert moved.abs().max() > 1e-2

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(make, config), tmp_path / "ours").eval()
    assert again.active_peft_config.task_type == task_type
    same(outputs(ours, *batch), outputs(again, *batch), batch[1], task_type)


@pytest.mark.parametrize("network", ["MLP", "LSTM"])
def test_a_network_of_ours_is_dropped_as_theirs(network, tmp_path):
    fields = {"encoder_reparameterization_type": network, "encoder_hidden_size": 8}
    ours = PromptTuningModel(tiny.build(), PromptConfig(num_virtual_tokens=P, **fields)).eval()
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert again.active_peft_config.peft_type == "P_TUNING"
    assert again.active_peft_config.encoder_reparameterization_type == network
    ids, mask = tiny.batch(side="right")
    expected = ours(ids, attention_mask=mask).logits[mask.bool()]
    got = again(input_ids=ids, attention_mask=mask).logits[:, P:][mask.bool()]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.peft
def test_generates_as_peft_does(tmp_path):
    ours = PromptTuningModel(tiny.build(), PromptConfig(num_virtual_tokens=P, init_std=1.0)).eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    ids, mask = tiny.batch((5, 5))
    assert torch.equal(tiny.generate(ours, ids, mask), tiny.generate(theirs, ids, mask))


def test_gradients_are_those_of_peft(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(tiny.build(), config)
    theirs.save_pretrained(tmp_path)
    ours = PromptTuningModel.from_pretrained(tiny.build(), tmp_path, is_trainable=True)
    ids, mask = tiny.batch(side="right")
    labels = ids.masked_fill(mask == 0, -100)
    for model in (theirs, ours):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    expected = theirs.prompt_encoder.default.embedding.weight.grad
    torch.testing.assert_close(ours.encoder.embedding.grad, expected, rtol=1e-3, atol=1e-6)
    assert ours.training
    assert not PromptTuningModel.from_pretrained(tiny.build(), tmp_path).training


def test_an_infix_is_nothing_that_peft_would_misread(tmp_path):
    config = PromptConfig(num_virtual_tokens=P, placement="infix", init_std=1.0)
    ours = PromptTuningModel(tiny.build(), config).eval()
    ours.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="FASTPREFIX_INFIX"):
        peft.PeftConfig.from_pretrained(tmp_path)
    again = PromptTuningModel.from_pretrained(tiny.build(), tmp_path)
    assert again.prompt_config.placement == "infix"
    ids, mask = tiny.batch((4, 4))
    at = torch.tensor([1, 3])
    expected = ours(ids, attention_mask=mask, infix_positions=at).logits
    assert torch.equal(again(ids, attention_mask=mask, infix_positions=at).logits, expected)


@pytest.mark.parametrize("task_type", [*(case[2] for case in CASES.values()), None])
@pytest.mark.parametrize("name", ["PROMPT_TUNING", "P_TUNING"])
def test_task_types_round_trip(tmp_path, name, task_type):
    save_prompt(tmp_path, torch.zeros(P, 8), {"task_type": task_type}, kind=name)
    assert load_prompt(tmp_path).config["task_type"] == task_type
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.task_type, config.peft_type) == (task_type, name)


def test_mistakes_name_the_file(tmp_path):
    save_prompt(tmp_path, torch.zeros(P, 8), {})
    with pytest.raises(ValueError, match=r"adapter_model.*8 wide, takes 64"):
        PromptTuningModel.from_pretrained(tiny.build(), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_virtual_tokens": P + 1}))
    with pytest.raises(ValueError, match=f"adapter_config.*num_virtual_tokens {P + 1}"):
        load_prompt(tmp_path)
    file.write_text(json.dumps({**config, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ValueError, match=r"PREFIX_TUNING.*takes.*PROMPT_TUNING"):
        load_prompt(tmp_path)


def test_a_head_for_another_model_is_refused_and_nothing_changes(tmp_path):
    make, config, task_type = CASES["bert classifies"]
    tuned = PromptTuningModel(
        build(make, config), PromptConfig(num_virtual_tokens=P, task_type=task_type)
    )
    tuned.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights["base_model.classifier.bias"] = torch.zeros(9)
    weights["base_model.classifier.weight"] += 1
    save_file(weights, tmp_path / "adapter_model.safetensors")
    base = build(make, config)
    with pytest.raises(ValueError, match=r"classifier\.bias \[9\]"):
        PromptTuningModel.from_pretrained(base, tmp_path)
    for name, tensor in build(make, config).state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor)
