"""save_pretrained and from_pretrained: round trips, and errors that name the file."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel
from fastprefix.formats.peft_prefixes import load_adapter, save_adapter

P = 6
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """An adapter for the tiny Llama."""
    config = PrefixConfig(num_virtual_tokens=P, init_std=1.0)
    PrefixTuningModel(tiny.build(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("position_offset", [None, 0, 9])
def test_round_trip(architecture, tmp_path, projection, position_offset):
    config = PrefixConfig(
        num_virtual_tokens=P,
        prefix_projection=projection,
        position_offset=position_offset,
        init_std=1.0,
    )
    tuned = PrefixTuningModel(tiny.build(architecture), config).eval()
    tuned.save_pretrained(tmp_path / "new" / "adapter")
    loaded = PrefixTuningModel.from_pretrained(
        tiny.build(architecture), str(tmp_path / "new" / "adapter")
    )
    ids, mask = tiny.batch()
    assert torch.equal(loaded(ids, mask).logits, tuned(ids, mask).logits)
    assert loaded.export().position_offset == (P if position_offset is None else position_offset)
    files = sorted(file.name for file in (tmp_path / "new" / "adapter").iterdir())
    own = ["prefix_kv.safetensors"] if position_offset is not None else []
    assert files == ["README.md", CONFIG, WEIGHTS, *own], (
        "PEFT places the text right behind the prefix"
    )


@pytest.mark.parametrize("is_trainable", [False, True])
def test_is_trainable(folder, is_trainable):
    loaded = PrefixTuningModel.from_pretrained(tiny.build(), folder, is_trainable=is_trainable)
    assert loaded.training == is_trainable
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trainable == (["encoders.default.embedding"] if is_trainable else [])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_frozen_tokens_stay_frozen(tmp_path, peft_type, gated):
    """This holds in our format too, which holds what PEFT's cannot, and after a second saving."""
    config = PrefixConfig(P, num_frozen_tokens=2, peft_type=peft_type, gated=gated)
    tuned = PrefixTuningModel(tiny.build(), config)
    for i in range(2):
        tuned.save_pretrained(tmp_path / str(i))
        tuned = PrefixTuningModel.from_pretrained(
            tiny.build(), tmp_path / str(i), is_trainable=True
        )
        assert tuned.prefix_config.num_frozen_tokens == 2
        assert tuned.prefix_config.peft_type == peft_type
        assert tuned.encoder.embedding.shape[0] == P - 2


def test_bfloat16_adapters_load(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({n: t.bfloat16() for n, t in weights.items()}, folder / WEIGHTS)
    kv = PrefixTuningModel.from_pretrained(tiny.build(), folder).export()
    assert kv.position_offset == P, "a file without our metadata: as in PEFT"


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_missing_file(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PrefixTuningModel.from_pretrained(tiny.build(), tmp_path / "nowhere")


@pytest.mark.parametrize("architecture", ["gpt2"])
def test_adapter_for_another_model(model, folder):
    with pytest.raises(ValueError, match=rf"{CONFIG}: got num_attention_heads 2, takes 4"):
        PrefixTuningModel.from_pretrained(model, folder)


def test_adapter_for_fewer_layers(folder):
    with pytest.raises(ValueError, match=rf"{CONFIG}: got num_layers 3, takes 2"):
        PrefixTuningModel.from_pretrained(tiny.build(num_hidden_layers=2), folder)


def test_adapter_for_another_head_size(folder):
    with pytest.raises(ValueError, match=rf"{CONFIG}: got token_dim 32, takes 16"):
        PrefixTuningModel.from_pretrained(tiny.build(head_dim=8), folder)


def test_config_that_says_nothing_of_the_model_leaves_it_to_the_weights(folder):
    edit(folder, num_layers=None, num_attention_heads=None, token_dim=None)
    PrefixTuningModel.from_pretrained(tiny.build(), folder)
    with pytest.raises(ValueError, match=WEIGHTS):
        PrefixTuningModel.from_pretrained(tiny.build(num_hidden_layers=2), folder)


def test_weights_of_another_length_than_the_config(folder):
    edit(folder, num_virtual_tokens=P + 1)
    with pytest.raises(ValueError, match=f"num_virtual_tokens {P + 1}"):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(folder, value):
    weights = load_file(folder / WEIGHTS)
    weights["prompt_embeddings"][2, 3] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}.*NaN or infinity"):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


def test_a_lora_adapter(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(tiny.build(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{CONFIG}.*LORA.*'PREFIX_TUNING'"):
        PrefixTuningModel.from_pretrained(tiny.build(), tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not JSON"])
def test_config_that_is_not_json(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


@pytest.mark.parametrize("text", ["[]", "null", '"PREFIX_TUNING"'])
def test_config_that_is_not_an_object(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


def test_config_that_is_not_text(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=CONFIG):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_weights_cut_short(folder, keep):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=WEIGHTS):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"base_model.prompt": torch.zeros(P, 192)},
        {"prompt_embeddings": torch.zeros(P, 192), "more": torch.zeros(1)},
        {"prompt_embeddings": torch.zeros(P, 191)},
        {"prompt_embeddings": torch.zeros(P * 192)},
        {"prompt_embeddings": torch.zeros(())},
        {"prompt_embeddings": torch.zeros(P, 192, dtype=torch.int64)},
    ],
    ids=["other name", "more", "other width", "flat", "a number", "integers"],
)
def test_weights_that_are_no_prefix(folder, tensors):
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=WEIGHTS):
        PrefixTuningModel.from_pretrained(tiny.build(), folder)


def test_a_refused_adapter_leaves_the_model_as_it_was(folder):
    (folder / WEIGHTS).unlink()
    model = tiny.build()
    with pytest.raises(FileNotFoundError):
        PrefixTuningModel.from_pretrained(model, folder)
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def awkward():
    """Prefixes that PEFT's format cannot hold, and what of each it cannot."""

    def layers(*sizes):
        return [torch.randn(2, length, size) for length, size in sizes]

    whole, wide, short = (P, 16), (P, 8), (2, 16)
    return {
        "heads": PrefixKV(layers(whole, wide), layers(whole, wide), P),
        "16 wide and its values 8": PrefixKV(layers(whole), layers(wide), P),
        "length": PrefixKV(layers(whole, short), layers(whole, short), P),
        "position 0": PrefixKV(layers(whole), layers(whole), 0),
    }


@pytest.mark.parametrize("why", list(awkward()))
def test_what_peft_cannot_hold_goes_into_a_format_that_it_refuses(tmp_path, why):
    kv = awkward()[why]
    head = {"score.weight": torch.randn(2, 3)}
    save_adapter(tmp_path / "adapter", kv, {"task_type": "SEQ_CLS"}, heads=head)
    adapter = load_adapter(tmp_path / "adapter", kv.shapes)
    assert why in adapter.config["not_peft"]
    assert adapter.config["task_type"] == "SEQ_CLS"
    assert torch.equal(adapter.heads["score.weight"], head["score.weight"])
    assert adapter.kv.position_offset == kv.position_offset
    for got, expected in zip(
        (*adapter.kv.keys, *adapter.kv.values), (*kv.keys, *kv.values), strict=True
    ):
        assert torch.equal(got, expected)
    with pytest.raises(KeyError, match="FASTPREFIX_KV"):
        peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"prefix_kv.*takes 5 layers"):
        load_adapter(tmp_path / "adapter", kv.shapes[:1] * 5)


def test_save_adapter_keeps_the_fields_given(tmp_path):
    kv = PrefixKV([torch.randn(2, P, 16)], [torch.randn(2, P, 16)], P)
    save_adapter(tmp_path, kv, {"base_model_name_or_path": "some/model"})
    adapter = load_adapter(tmp_path, kv.shapes)
    assert adapter.config["base_model_name_or_path"] == "some/model"
    assert torch.equal(adapter.kv.keys[0], kv.keys[0])
    assert torch.equal(adapter.kv.values[0], kv.values[0])
