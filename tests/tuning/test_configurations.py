"""Configurations as PEFT's: dictionaries, files, tasks as enums, and PEFT's own objects."""

import dataclasses
import json

import peft
import pytest
import torch
from peft import TaskType
from transformers import BertConfig, BertForSequenceClassification

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel

CONFIG = "adapter_config.json"
PLAIN = {
    "direct": PrefixConfig(6, task_type="SEQ_CLS", modules_to_save=["score"]),
    "network": PrefixConfig(6, prefix_projection=True, encoder_hidden_size=24),
    "zero": PrefixConfig(6, init="zero"),
    "cartridge": PrefixConfig(6, peft_type="CARTRIDGE", num_frozen_tokens=2),
    "frozen": PrefixConfig(6, inference_mode=True, task_type=None),
    "prompt": PromptConfig(6, task_type="SEQ_CLS"),
    "vocabulary": PromptConfig(6, init="vocab", inference_mode=True),
    "p-tuning": PromptConfig(6, encoder_reparameterization_type="MLP", encoder_hidden_size=24),
    "lstm": PromptConfig(
        6, encoder_reparameterization_type="LSTM", encoder_num_layers=1, encoder_dropout=0.1
    ),
}
OURS = {
    "frozen tokens": PrefixConfig(6, num_frozen_tokens=2),
    "groups": PrefixConfig(6, groups=("encoder", "cross"), position_offset=3),
    "lengths": PrefixConfig(6, layer_lengths=[6, 0, 2], dropout=0.1),
    "bias": PrefixConfig(6, prefix_bias=-1.5, prefix_in_window=True, init="text", init_text="a b"),
    "gate": PrefixConfig(6, gated=True, layers=[0, 2], fallback="expand"),
    "deep network": PrefixConfig(
        6, prefix_projection=True, encoder_num_layers=3, encoder_per_layer=True
    ),
    "text": PromptConfig(6, init="text", init_text="a b"),
    "spread": PromptConfig(6, init_std=0.5),
}
INFIX = PromptConfig(6, placement="infix")


def round_trip(config, folder):
    config.save_pretrained(folder)
    return type(config).from_pretrained(folder)


@pytest.mark.parametrize("name", [*PLAIN, *OURS, "infix"])
def test_round_trips(name, tmp_path):
    config = {**PLAIN, **OURS, "infix": INFIX}[name]
    assert round_trip(config, tmp_path / "new") == config
    assert type(config)(**{k: v for k, v in config.to_dict().items() if k in fields(config)}) == (
        config
    )
    json.dumps(config.to_dict())


def fields(config):
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("name", PLAIN)
def test_peft_reads_our_files_without_a_word(name, tmp_path, recwarn):
    config = PLAIN[name]
    config.save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]
    assert theirs.peft_type.value == config.peft_type
    for field in ("num_virtual_tokens", "task_type", "modules_to_save", "inference_mode"):
        assert getattr(theirs, field) == getattr(config, field)
    assert type(config).from_peft(theirs) == config


@pytest.mark.parametrize("name", OURS)
def test_peft_says_what_it_leaves_out(name, tmp_path):
    OURS[name].save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['fastprefix'\]"):
        peft.PeftConfig.from_pretrained(str(tmp_path))


def test_peft_refuses_an_infix(tmp_path):
    INFIX.save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "theirs",
    [
        peft.PrefixTuningConfig(
            num_virtual_tokens=5,
            task_type=TaskType.CAUSAL_LM,
            prefix_projection=True,
            encoder_hidden_size=16,
        ),
        peft.PrefixTuningConfig(num_virtual_tokens=5, encoder_hidden_size=16, init_weights="zero"),
        peft.CartridgeConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", inference_mode=True),
        peft.PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"),
        peft.PromptEncoderConfig(
            num_virtual_tokens=5,
            encoder_reparameterization_type="LSTM",
            encoder_num_layers=1,
            encoder_dropout=0.1,
            task_type="TOKEN_CLS",
        ),
    ],
    ids=lambda config: f"{type(config).__name__} {config.task_type}",
)
def test_peft_s_objects_and_files_are_taken(theirs, tmp_path):
    kind = (
        PrefixConfig if "PREFIX CARTRIDGE".find(theirs.peft_type.value[:6]) >= 0 else PromptConfig
    )
    ours = kind.from_peft(theirs)
    assert ours.peft_type == theirs.peft_type.value
    for name in ("num_virtual_tokens", "task_type", "inference_mode"):
        assert getattr(ours, name) == getattr(theirs, name)
    if theirs.peft_type == "PREFIX_TUNING":
        assert ours.prefix_projection == theirs.prefix_projection
        assert ours.encoder_hidden_size == (16 if theirs.prefix_projection else None)
        assert ours.init == ("zero" if theirs.init_weights else "random")
    elif theirs.peft_type == "CARTRIDGE":
        assert ours.num_frozen_tokens == theirs.num_frozen_tokens == 1
    elif theirs.peft_type == "PROMPT_TUNING":
        assert ours.init == "vocab"
    else:
        assert ours.encoder_reparameterization_type == "LSTM"
        assert (ours.encoder_num_layers, ours.encoder_dropout) == (1, 0.1)
    theirs.save_pretrained(str(tmp_path))
    assert kind.from_pretrained(tmp_path) == ours


def test_what_is_not_taken_of_peft_s_is_named():
    for kind, theirs, message in [
        (PrefixConfig, peft.LoraConfig(), "got LoraConfig of peft_type 'LORA', takes 'PREFIX_TU"),
        (PrefixConfig, peft.PromptTuningConfig(num_virtual_tokens=4), "takes 'PREFIX_TUNING' or"),
        (PromptConfig, peft.CartridgeConfig(num_virtual_tokens=4), "for PromptTuningModel"),
        (PrefixConfig, peft.PrefixTuningConfig(), r"config\.num_virtual_tokens: got None, takes"),
        (
            PrefixConfig,
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "new_trick": 3},
            r"config\.new_trick: got 3, which PrefixTuningModel lacks",
        ),
        (
            PromptConfig,
            peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_num_layers=3),
            "encoder_num_layers",
        ),
        (
            PromptConfig,
            peft.MultitaskPromptTuningConfig(num_virtual_tokens=4),
            "MULTITASK_PROMPT_TUNING",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            kind.from_peft(theirs)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        PrefixConfig.from_pretrained(tmp_path)
    for text, message in [
        ("{", "not JSON"),
        ('{"peft_type": "LORA"}', "got peft_type 'LORA', takes"),
        ('{"peft_type": "CARTRIDGE", "fastprefix": {"no_such": 1}}', "no_such"),
        ('{"peft_type": "CARTRIDGE", "num_virtual_tokens": -1}', "num_virtual_tokens: got -1"),
    ]:
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
            PrefixConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_directory: got the file"):
        PrefixConfig().save_pretrained(tmp_path / CONFIG)


def test_an_adapter_s_folder_tells_its_configuration(tmp_path):
    config = PrefixConfig(6, num_frozen_tokens=2, task_type="CAUSAL_LM")
    PrefixTuningModel(tiny.build("llama"), config).save_pretrained(tmp_path)
    found = PrefixConfig.from_pretrained(tmp_path)
    assert (found.num_virtual_tokens, found.num_frozen_tokens) == (6, 2)
    assert found.inference_mode, "as PEFT writes it"
    again = PrefixTuningModel.from_pretrained(tiny.build("llama"), tmp_path, config=found)
    assert again.prefix_config.num_frozen_tokens == 2


def test_models_take_peft_s_objects():
    theirs = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    tuned = PrefixTuningModel(tiny.build("llama"), peft.PrefixTuningConfig(**theirs))
    tuned.add_adapter("long", peft.CartridgeConfig(num_virtual_tokens=7))
    assert [x.num_virtual_tokens for x in tuned.peft_config.values()] == [4, 7]
    ids = tiny.prompt()
    tuned(ids, labels=ids).loss.backward()
    assert tuned.encoder.embedding.grad.abs().sum() > 0
    prompted = PromptTuningModel(tiny.build("llama"), peft.PromptTuningConfig(**theirs))
    prompted(ids, labels=ids).loss.backward()
    assert prompted.encoder.embedding.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="LORA"):
        tuned.add_adapter("lora", peft.LoraConfig())
    with pytest.raises(TypeError, match="config: got PrefixConfig, takes a PromptConfig"):
        PromptTuningModel(tiny.build("llama"), PrefixConfig())
    with pytest.raises(TypeError, match="config: got int, takes a PrefixConfig"):
        PrefixTuningModel(tiny.build("llama"), 20)


def test_a_text_of_peft_s_comes_with_its_tokenizer(monkeypatch):
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return lambda text: {"input_ids": [5, 6, 7]}

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    config = peft.PromptTuningConfig(
        num_virtual_tokens=5,
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="be brief",
        tokenizer_name_or_path="some/llama",
        tokenizer_kwargs={"use_fast": True},
    )
    tuned = PromptTuningModel(tiny.build("llama"), config)
    assert asked == [("some/llama", {"use_fast": True})]
    expected = tuned.get_input_embeddings()(torch.tensor([5, 6, 7, 5, 6]))
    assert torch.equal(tuned.export_embeddings(), expected)


@pytest.mark.parametrize("kind", [PrefixConfig, PromptConfig])
def test_tasks_are_strings_or_peft_s_enum(kind):
    config = kind(4, task_type=TaskType.SEQ_CLS)
    assert type(config.task_type) is str
    assert config == kind(4, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="task_type: got 'CHAT', takes one of"):
        kind(4, task_type="CHAT")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_inference_mode_trains_nothing(kind):
    wrapper, config = {
        "prefix": (PrefixTuningModel, PrefixConfig),
        "prompt": (PromptTuningModel, PromptConfig),
    }[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}

    def build(**options):
        torch.manual_seed(0)
        base = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4))
        return wrapper(base, config(4, task_type="SEQ_CLS", **options))

    trained = {name for name, p in build().named_parameters() if p.requires_grad}
    assert len(trained) == 3, "a prefix, and a head's weight and bias"
    frozen = build(inference_mode=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    if kind == "prefix":
        frozen.set_adapter("default")
        assert frozen.encoder.embedding.requires_grad, "as in PEFT"


def test_inference_mode_leaves_a_lora_inside_the_base_alone():
    inside = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    tuned = PrefixTuningModel(inside, PrefixConfig(4, inference_mode=True))
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)


def test_groups_are_checked_once_and_well():
    with pytest.raises(ValueError, match=r"groups: got .*layers or layer_lengths"):
        PrefixConfig(4, groups=("encoder",), layers=[0])
