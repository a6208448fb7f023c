"""Models that accelerate offloads or spreads run with fastprefix as they do without."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    patch_model,
    use_prefix,
)

CPU = torch.device("cpu")
PARTS = {
    "llama": ("model.embed_tokens", "model.layers.{}", "model.norm", "model.rotary_emb"),
    "gpt2": ("transformer.wte", "transformer.h.{}", "transformer.ln_f", "transformer.wpe"),
}


def spread(model, folder):
    """The first layer and the head on the disk, the rest in memory."""
    embedding, layer, norm, positions = PARTS[model.config.model_type]
    places = dict.fromkeys((embedding, norm, positions, layer.format(1)), "cpu")
    places |= dict.fromkeys((layer.format(0), layer.format(2), "lm_head"), "disk")
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, CPU),
    "dispatch_model": spread,
}


@pytest.fixture(params=["llama", "gpt2"])
def architecture(request):
    """Each by name."""
    return request.param


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def offloaded(request, architecture, tmp_path):
    """A model whose weights, or some of them, are on the meta device between calls."""
    model = tiny.build(architecture)
    request.param(model, str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


def run(model):
    ids, mask = tiny.batch()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    return logits, tiny.generate(model, ids, mask, max_new_tokens=4)


@pytest.mark.parametrize("lasting", [False, True])
def test_prompts_and_blocks(offloaded, bare, lasting):
    """It was "Cannot copy out of meta tensor", or "its weights are on the meta device"."""
    before = run(offloaded)
    if lasting:
        patch_model(offloaded)
    kv, expected = PrefixKV.prefill(offloaded, tiny.prompt()), PrefixKV.prefill(bare, tiny.prompt())
    assert all(torch.equal(*pair) for pair in zip(kv.keys, expected.keys, strict=True))
    with use_prefix(offloaded, kv), use_prefix(bare, kv):
        torch.testing.assert_close(run(offloaded), run(bare))
    names = {"a": kv, "b": tiny.random_kv(bare)}
    rows = ["a", None, "b"]
    with use_prefix(offloaded, names, rows), use_prefix(bare, names, rows):
        torch.testing.assert_close(run(offloaded), run(bare))
    torch.testing.assert_close(run(offloaded), before, rtol=1e-4, atol=1e-4)


def test_a_wrong_prefix_is_still_found(offloaded, caplog):
    """The checks of a patched model run: all weights are there while it does."""
    patch_model(offloaded)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_tuned_models_train_generate_and_are_saved(offloaded, bare, tmp_path, kind):
    config = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", "init": "vocab"}
    ids, mask = tiny.batch()
    found = []
    for base in (offloaded, bare):
        torch.manual_seed(3)
        if kind == "prefix":
            tuned = PrefixTuningModel(base, PrefixConfig(**config))
        else:
            tuned = PromptTuningModel(base, PromptConfig(**config))
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(2):
            loss = tuned(input_ids=ids, attention_mask=mask, labels=ids.where(mask > 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert losses[1] < losses[0]
        assert tuned.device == CPU
        text = tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
        found.append([torch.stack(losses), text, *(p for p in tuned.encoder.parameters())])
        tuned.save_pretrained(str(tmp_path / "adapter"))
        loaded = type(tuned).from_pretrained(base, str(tmp_path / "adapter"))
        assert torch.equal(
            loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3), text
        )
    torch.testing.assert_close(*found)


def test_heads_that_are_offloaded_are_not_trained_in_silence(architecture):
    """Their weights are made anew in each call: a gradient, or a file's numbers, would be lost."""
    model = tiny.build(architecture)
    cpu_offload(model, CPU)
    config = PrefixConfig(num_virtual_tokens=2, modules_to_save=["lm_head"])
    with pytest.raises(
        ValueError, match="modules_to_save: got 'lm_head', whose weights are offloaded"
    ):
        PrefixTuningModel(model, config)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_loaded_with_a_device_map(tmp_path, device_map):
    bare = tiny.build()
    bare.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    kv = tiny.random_kv(bare)
    with use_prefix(model, kv), use_prefix(bare, kv):
        torch.testing.assert_close(run(model), run(bare))


def test_loaded_onto_the_disk(tmp_path):
    bare = tiny.build()
    bare.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path / "o"
    )
    kv = tiny.random_kv(bare)
    with use_prefix(model, kv), use_prefix(bare, kv):
        torch.testing.assert_close(run(model), run(bare))
