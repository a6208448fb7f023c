"""Prefixes go to PEFT and come from it with equal logits on every decoder that PEFT can tune."""

import copy
import warnings

import peft
import pytest
import torch
from transformers import MistralConfig

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel
from fastprefix.formats.peft_prefixes import load_adapter, save_adapter
from fastprefix.kv import to_flat
from fastprefix_testing import zoo

P = 4
CLOSE = {"rtol": 0, "atol": 2e-5}
# What PEFT needs to be otherwise than in the zoo: in some it takes a head to be as wide as
# hidden_size / num_attention_heads.
ARCHITECTURES = {
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 8},
    "mixtral": {"head_dim": 8},
    "qwen3": {},
    "gemma2": {"attn_implementation": "eager"},  # old transformers' SDPA leaves its soft cap out
    "gemma3": {},
    "phi3": {},
    "olmo2": {"head_dim": 8},
    "gpt_oss": {},
    "opt": {},
    "gpt_neox": {},
}
KINDS = {"PREFIX_TUNING": peft.PrefixTuningConfig, "CARTRIDGE": peft.CartridgeConfig}


def base(name):
    """A model of the zoo, with the same weights each time."""
    return zoo.kind(name, torch.float32, **ARCHITECTURES[name])


@pytest.fixture(params=ARCHITECTURES)
def build(request):
    return lambda: base(request.param)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def loud(theirs):
    """The same PEFT model with a prefix large enough to matter."""
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_(0, 0.7)
    return theirs.eval()


def logits(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).logits


def test_both_ways(build, kind, tmp_path):
    theirs = peft.get_peft_model(build(), KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=P))
    loud(theirs).save_pretrained(tmp_path / "theirs")
    ours = PrefixTuningModel.from_pretrained(build(), tmp_path / "theirs")
    ids, mask = tiny.batch((11, 5, 1), side="right")
    real = mask.bool()
    expected = logits(theirs, ids, mask)[real]
    torch.testing.assert_close(logits(ours, ids, mask)[real], expected, **CLOSE)
    assert (logits(build(), ids, mask)[real] - expected).abs().max() > 1e-2

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    assert again.active_peft_config.peft_type == kind
    torch.testing.assert_close(logits(again, ids, mask)[real], expected, **CLOSE)
    twice = PrefixTuningModel.from_pretrained(build(), tmp_path / "ours")
    assert torch.equal(to_flat(twice.export()), to_flat(ours.export()))
    assert twice.export().in_window is ours.export().in_window is True


@pytest.mark.peft
def test_a_classifier_comes_with_its_head(kind, tmp_path):
    def build():
        make = "LlamaForSequenceClassification"
        return zoo.kind("llama", torch.float32, make, head_dim=8, num_labels=3)

    theirs = peft.get_peft_model(build(), KINDS[kind](task_type="SEQ_CLS", num_virtual_tokens=P))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.7)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = PrefixTuningModel.from_pretrained(build(), tmp_path / "theirs")
    ids, mask = tiny.batch((6, 6))
    expected = logits(theirs, ids, mask)
    torch.testing.assert_close(logits(ours, ids, mask), expected, **CLOSE)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, ids, mask), expected, **CLOSE)
    assert again.active_peft_config.task_type == "SEQ_CLS"


@pytest.mark.parametrize(
    "task_type",
    ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"],
)
def test_task_types_round_trip(kind, task_type, tmp_path):
    kv = tiny.random_kv(tiny.build(), P)
    save_adapter(tmp_path, kv, {"task_type": task_type}, kind=kind)
    assert load_adapter(tmp_path).config["task_type"] == task_type
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type == task_type
    tuned = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path)
    tuned.save_pretrained(tmp_path / "again")
    assert peft.PeftConfig.from_pretrained(tmp_path / "again").task_type == task_type
    assert peft.PeftConfig.from_pretrained(tmp_path / "again").peft_type == kind


def test_a_cartridge_of_ours_is_one_of_theirs(tmp_path):
    """A prompt's own keys and values, which PEFT takes a cartridge to start from."""
    bare, model = tiny.build("gpt2"), tiny.build("gpt2")
    front, (ids, mask) = tiny.prompt(P), tiny.batch((5, 5))
    save_adapter(tmp_path, PrefixKV.prefill(model, front), {}, kind="CARTRIDGE")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    expected = tiny.concatenated_logits(bare, front, ids, mask)
    torch.testing.assert_close(logits(theirs, ids, mask), expected, **CLOSE)


def test_frozen_tokens_of_a_cartridge_stay_frozen(tmp_path):
    kv = tiny.random_kv(tiny.build(), P)
    save_adapter(tmp_path, kv, {"num_frozen_tokens": 1}, kind="CARTRIDGE")
    tuned = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path, is_trainable=True)
    optimizer = torch.optim.SGD(tuned.encoder.parameters(), lr=1.0)
    ids, mask = tiny.batch((7, 4))
    tuned(ids, attention_mask=mask, labels=ids).loss.backward()
    optimizer.step()
    for got, want in zip(tuned.export().keys, kv.keys, strict=True):
        assert torch.equal(got[:, :1], want[:, :1])
        assert not torch.equal(got[:, 1:], want[:, 1:])
    tuned.save_pretrained(tmp_path)
    again = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path)
    assert again.encoder.num_frozen_tokens == 1


def test_learned_prefixes_stay_visible_in_windows_unless_told_otherwise():
    config = MistralConfig(**{**tiny.GROUPED, "sliding_window": 3})
    ids, mask = tiny.batch((9,))
    got = []
    for slides in (False, True):
        torch.manual_seed(0)
        prefix = PrefixConfig(num_virtual_tokens=P, init_std=1.0, prefix_in_window=slides)
        got.append(logits(PrefixTuningModel(tiny.from_config(config), prefix).eval(), ids, mask))
    assert not torch.allclose(got[0][:, -1], got[1][:, -1], atol=1e-3)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "llama", "qwen3"])
def test_warns_where_peft_would_let_a_prefix_slide(name, tmp_path):
    model = base(name)
    for slides in (False, True):
        tuned = PrefixTuningModel(model, PrefixConfig(prefix_in_window=slides))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tuned.save_pretrained(tmp_path)
        warned = any("sliding windows" in str(warning.message) for warning in caught)
        assert warned == (not slides and name in ("mistral", "gemma2"))
