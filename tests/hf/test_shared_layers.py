"""Layers that see another layer's keys and values of the text, in files of PEFT's.

PEFT puts a prefix into the cache, where such layers find that of the other layer. The oracle is
plain transformers with the prefix in a DynamicCache, which is what PEFT hands it.
"""

import json

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, patch_model
from fastprefix.formats.peft_prefixes import load_adapter, save_adapter
from fastprefix.hf import patch_of
from fastprefix_testing import zoo

P = 5
# one number and size of heads in all layers: PEFT's format holds no others
GEMMA4 = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16,
    "num_global_key_value_heads": 2, "num_kv_shared_layers": 2, "sliding_window": 16,
    "max_position_embeddings": 64, "vocab_size_per_layer_input": 101,
    "hidden_size_per_layer_input": 8, "pad_token_id": 0, "bos_token_id": None,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "eos_token_id": None,
}  # fmt: skip


def build(name):
    if name == "gemma3n":
        return zoo.kind(name, sliding_window=16)
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**GEMMA4))
        for parameter in model.parameters():
            mean = parameter.mean().item() if parameter.dim() == 1 else 0.0
            torch.nn.init.normal_(parameter, mean, 0.2)
    return model.double().eval()


NAMES = ["gemma3n", "gemma4"]


def behind(bare, kv, ids):
    """What transformers makes of a prefix in its cache, which is what PEFT hands it."""
    with torch.no_grad():
        return tiny.expanded_forward(bare, kv, ids, torch.ones_like(ids)).logits


def prefix(model):
    kv = tiny.kv_of_shapes(patch_of(model).shapes, P, position_offset=P)
    return kv.detach()


@pytest.mark.parametrize("name", NAMES)
def test_which_layers_share(name):
    assert patch_of(patch_model(build(name))).sources == (0, 1, 0, 1)
    assert patch_of(patch_model(zoo.kind("llama"))).sources == (0, 1)
    assert patch_of(patch_model(zoo.kind("albert"))).sources == tuple(range(8))


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_texts(name, side, kept):
    """Gemma 4 takes rows of its masks, where no more than the last logits are wanted."""
    model, bare = patch_model(build(name)), build(name)
    ids, mask = tiny.batch((7, 4), side)
    options = {"attention_mask": mask, "logits_to_keep": kept}
    real = mask[:, -kept:].bool()
    with torch.no_grad():
        got, expected = (each(ids, **options).logits[real] for each in (model, bare))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_saved_is_what_we_load(name, tmp_path):
    """Saved again, it is a file of PEFT's that gives the same logits there."""
    base, bare, ids = build(name), build(name), tiny.prompt(7)
    theirs = prefix(patch_model(build(name)))
    save_adapter(tmp_path / "theirs", theirs, {})  # layer by layer, as PEFT writes it
    expected = behind(bare, theirs, ids)
    tuned = PrefixTuningModel.from_pretrained(base, tmp_path / "theirs").double().eval()
    with torch.no_grad():
        got = tuned(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # files hold float32 as given

    tuned.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["peft_type"] == (
        "PREFIX_TUNING"
    )
    again = load_adapter(tmp_path / "ours").kv
    torch.testing.assert_close(behind(bare, again, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_other_prefixes_go_into_a_file_that_peft_refuses(name, tmp_path):
    config = PrefixConfig(num_virtual_tokens=P, init_std=0.7)
    tuned, ids = PrefixTuningModel(build(name), config).double().eval(), tiny.prompt(7)
    tuned.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "FASTPREFIX_KV"
    assert "layer 2 sees the text's keys of layer 0" in saved["not_peft"]
    again = PrefixTuningModel.from_pretrained(build(name), tmp_path).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, tuned(ids).logits, rtol=0, atol=1e-9)


def test_a_start_from_peft_is_what_peft_sees(tmp_path):
    theirs = prefix(patch_model(build("gemma3n")))
    save_adapter(tmp_path, theirs, {})
    config = PrefixConfig(num_virtual_tokens=P, init="prefix", init_prefix=str(tmp_path))
    kv = PrefixTuningModel(build("gemma3n"), config).export()
    torch.testing.assert_close(kv.keys[2], kv.keys[0], rtol=0, atol=0)
    torch.testing.assert_close(kv.values[3], kv.values[1], rtol=0, atol=0)


def test_the_same_keys_with_other_values(tmp_path):
    """DiffLlama: of one layer in PEFT's cache fastprefix makes two."""
    model = zoo.kind("diffllama")
    tuned = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=P))
    assert patch_of(model).sources == (0, -1, 2, -1)
    tuned.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "FASTPREFIX_KV"
    assert "attends several times" in saved["not_peft"]
