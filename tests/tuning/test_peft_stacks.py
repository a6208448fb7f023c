"""Encoders and encoder-decoders: PEFT's own semantics, both ways with equal outputs."""

import copy

import peft
import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    ElectraConfig,
    MBartConfig,
    MT5Config,
    RobertaConfig,
    T5Config,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.formats.peft_prefixes import load_adapter

P = 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
_SPECIAL = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_ENCODER = {
    **_SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
ENCODERS = {
    "bert": BertConfig(**_ENCODER),
    "roberta": RobertaConfig(**{**_ENCODER, "pad_token_id": 1}),
    "electra": ElectraConfig(**_ENCODER, embedding_size=32),
}


def bart(encoder_layers, decoder_layers, make=BartConfig):
    return make(
        **_SPECIAL,
        d_model=32,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        init_std=0.2,
        dropout=0.0,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    )


def t5(encoder_layers, decoder_layers, make=T5Config):
    return make(
        **_SPECIAL,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=2.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
    )


PAIRS = {
    "bart even": bart(4, 4),
    "bart odd": bart(3, 3),
    "bart shallow decoder": bart(4, 2),
    "mbart": bart(2, 2, MBartConfig),
    "t5 even": t5(4, 4),
    "t5 odd": t5(3, 2),
    "mt5": t5(2, 2, MT5Config),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def build(make, config):
    torch.manual_seed(0)
    model = make.from_config(copy.deepcopy(config)).double().eval()  # patching writes to a config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(0, 2.0)
    return model


def loud(theirs):
    """The same PEFT model with a prefix, and a head, large enough to matter."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.7)
    return theirs.eval()


def same(got, expected, mask=None):
    for name in ("logits", "start_logits", "end_logits"):
        if expected.get(name) is not None:
            assert got[name].shape == expected[name].shape
            keep = mask.bool() if mask is not None and got[name].dim() != 2 else slice(None)
            torch.testing.assert_close(got[name][keep], expected[name][keep], **CLOSE)


@pytest.mark.peft
@pytest.mark.parametrize("task_type", _TASKS)
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
def test_encoders_both_ways(name, task_type, kind, tmp_path):
    make, config = _TASKS[task_type], ENCODERS[name]
    configure = {"PREFIX_TUNING": peft.PrefixTuningConfig, "CARTRIDGE": peft.CartridgeConfig}[kind]
    theirs = loud(
        peft.get_peft_model(
            build(make, config), configure(task_type=task_type, num_virtual_tokens=P)
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ids, mask = tiny.batch((6, 6) if task_type == "QUESTION_ANS" else (6, 3), side="right")
    ids = torch.where(mask.bool(), ids.clamp(min=2), config.pad_token_id)
    expected = theirs(input_ids=ids, attention_mask=mask)
    ours = PrefixTuningModel.from_pretrained(build(make, config), tmp_path / "theirs")
    same(ours(input_ids=ids, attention_mask=mask), expected, mask)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(make, config), tmp_path / "ours").eval()
    assert again.active_peft_config.task_type == task_type
    same(again(input_ids=ids, attention_mask=mask), expected, mask)


def inputs():
    ids, mask = tiny.batch((6, 3), side="right")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": tiny.batch((20, 20))[0],
    }


@pytest.mark.peft
def test_encoder_decoders_as_peft_feeds_them(pair, tmp_path):
    """PEFT gives the decoder's own attention layers a prefix, some of them the same one."""
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    theirs = loud(peft.get_peft_model(build(AutoModelForSeq2SeqLM, pair), config))
    theirs.save_pretrained(tmp_path / "theirs")
    batch = inputs()
    expected = theirs(**batch)
    ours = PrefixTuningModel.from_pretrained(
        build(AutoModelForSeq2SeqLM, pair), tmp_path / "theirs"
    )
    same(ours(**batch), expected)
    assert (build(AutoModelForSeq2SeqLM, pair)(**batch).logits - expected.logits).abs().max() > 0.01
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}
    new = theirs.generate(**text, **options)
    assert torch.equal(ours.generate(**text, **options), new)
    static = ours.generate(**text, **options, cache_implementation="static")
    assert torch.equal(static, new), "distances to the prefix must not be those of the cache's end"

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(AutoModelForSeq2SeqLM, pair), tmp_path / "ours")
    assert again.active_peft_config.task_type == "SEQ_2_SEQ_LM"
    same(again.eval()(**batch), expected)


@pytest.mark.parametrize("config", [bart(2, 3), bart(2, 4), t5(2, 3), t5(1, 4)])
def test_decoders_deeper_than_the_encoder_go_to_peft_too(config, tmp_path):
    """Which PEFT itself cannot make: its prefixes have the encoder's depth."""
    prefix = PrefixConfig(
        num_virtual_tokens=P,
        task_type="SEQ_2_SEQ_LM",
        groups=("decoder",),
        position_offset=P,
        init_std=0.7,
    )
    ours = PrefixTuningModel(build(AutoModelForSeq2SeqLM, config), prefix).eval()
    ours.save_pretrained(tmp_path)
    batch = inputs()
    theirs = peft.PeftModel.from_pretrained(build(AutoModelForSeq2SeqLM, config), tmp_path).eval()
    same(theirs(**batch), ours(**batch))
    made = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    broken = peft.get_peft_model(build(AutoModelForSeq2SeqLM, config), made)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"adapter_config.*layers for a decoder of"):
        PrefixTuningModel.from_pretrained(build(AutoModelForSeq2SeqLM, config), tmp_path / "broken")


@pytest.mark.parametrize("config", [bart(2, 2), t5(2, 2)], ids=["bart", "t5"])
def test_richer_prefixes_keep_a_file_of_their_own(config, tmp_path):
    prefix = PrefixConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM", init_std=0.7)
    ours = PrefixTuningModel(build(AutoModelForSeq2SeqLM, config), prefix).eval()
    ours.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="FASTPREFIX_KV"):
        peft.PeftConfig.from_pretrained(tmp_path)
    assert (
        load_adapter(tmp_path).config["not_peft"]
        == "it has a prefix in the cross and encoder layers"
    )
    batch = inputs()
    again = PrefixTuningModel.from_pretrained(build(AutoModelForSeq2SeqLM, config), tmp_path)
    assert torch.equal(again(**batch).logits, ours(**batch).logits)
    assert again.prefix_config.task_type == "SEQ_2_SEQ_LM"
    for got, expected in zip(again.export().keys, ours.export().keys, strict=True):
        assert torch.equal(got, expected)


def test_adapters_of_the_wrong_kind_of_model_are_refused(tmp_path):
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    base = build(AutoModelForSeq2SeqLM, bart(2, 2))
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "pair")
    PrefixTuningModel(tiny.build(), PrefixConfig(num_virtual_tokens=P)).save_pretrained(
        tmp_path / "single"
    )
    with pytest.raises(ValueError, match="num_transformer_submodules 2, takes 1"):
        PrefixTuningModel.from_pretrained(tiny.build(), tmp_path / "pair")
    with pytest.raises(ValueError, match="num_transformer_submodules 1, takes 1, or 2"):
        PrefixTuningModel.from_pretrained(
            build(AutoModelForSeq2SeqLM, bart(2, 2)), tmp_path / "single"
        )
