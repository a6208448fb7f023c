"""Which layers get a prefix: the groups of encoder-decoders, and encoders."""

import json

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel, patch_model, use_prefix
from fastprefix.formats.peft_prefixes import load_adapter
from fastprefix.hf import patch_of
from fastprefix_testing import textbook, zoo

GROUPS = [None, ("encoder",), ("decoder",), ("cross",), ("encoder", "cross")]


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "MLP"])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_only_the_chosen_groups_are_trained(groups, projection):
    model = zoo.kind("t5", torch.float32)
    config = PrefixConfig(
        num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", groups=groups, prefix_projection=projection
    )
    tuned = PrefixTuningModel(model, config)
    chosen = [groups is None or group in groups for group in patch_of(model).groups]
    kv = tuned.export()
    assert [key.shape[1] == 3 for key in kv.keys] == chosen
    assert [key.shape[1] == 0 for key in kv.keys] != chosen
    assert kv.shapes == patch_of(model).shapes
    assert kv.position_offset == 0
    if not projection:
        width = sum(shape.width for shape, yes in zip(kv.shapes, chosen, strict=True) if yes)
        assert tuned.encoder.embedding.shape == (3, width)

    inputs, _ = zoo.kind_inputs(model)
    labels = inputs.pop("decoder_input_ids")
    tuned.train()
    before = tuned(**inputs, labels=labels).loss
    before.backward()
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter -= 0.1 * parameter.grad / parameter.grad.norm().clamp(min=1e-12)
    assert tuned(**inputs, labels=labels).loss < before


def test_layers_without_a_prefix_run_without_one():
    """The same logits as with a prefix for all layers, of which the oracle hides the others."""
    model, bare = patch_model(zoo.kind("bart")), zoo.kind("bart")
    inputs, real = zoo.kind_inputs(model)
    shapes = patch_of(model).shapes
    chosen = [layer for layer, group in enumerate(patch_of(model).groups) if group == "cross"]
    kv = tiny.kv_of_shapes(shapes).detach().select(chosen).spread(chosen, shapes)
    expected = textbook.concatenating(bare, kv, inputs)(**inputs).logits
    with use_prefix(model, kv):
        got = model(**inputs).logits
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-9)
    assert kv.num_virtual_tokens == 5


def test_a_prefix_with_gaps_is_saved_and_loaded(tmp_path):
    shapes = patch_of(patch_model(zoo.kind("t5"))).shapes
    kv = tiny.kv_of_shapes(shapes).detach().select([1, 4]).spread([1, 4], shapes)
    kv.save(tmp_path / "kv.safetensors")
    loaded = PrefixKV.load(tmp_path / "kv.safetensors")
    assert loaded.shapes == kv.shapes
    for ours, theirs in zip(loaded.keys + loaded.values, kv.keys + kv.values, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layers", [[0], [0, 0], [0, 5], [-1, 0]])
def test_layers_that_do_not_exist(layers):
    shapes = patch_of(patch_model(zoo.kind("bert"))).shapes
    with pytest.raises(ValueError, match="layers: got"):
        tiny.kv_of_shapes(shapes).spread(layers, shapes)


@pytest.mark.parametrize("groups", [(), ("middle",), ("encoder", "self")])
def test_groups_that_do_not_exist(groups):
    with pytest.raises(ValueError, match="groups: got"):
        PrefixConfig(groups=groups)


def test_groups_that_the_model_does_not_have():
    model = zoo.kind("bert")
    config = PrefixConfig(task_type="FEATURE_EXTRACTION", groups=("encoder", "cross"))
    with pytest.raises(ValueError, match=r"groups: got .*takes some of \('encoder',\)"):
        PrefixTuningModel(model, config)
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_start_from_text(name):
    """All groups start from what the bare model's own layers make of the text."""
    model, bare = zoo.kind(name, torch.float32), zoo.kind(name, torch.float32)
    task = "SEQ_2_SEQ_LM" if name == "t5" else "FEATURE_EXTRACTION"
    torch.manual_seed(3)
    tuned = PrefixTuningModel(
        model, PrefixConfig(num_virtual_tokens=4, task_type=task, init="vocab")
    )
    torch.manual_seed(3)
    ids = torch.randint(tiny.VOCAB, (1, 4))
    kv = tuned.export()
    encoder = bare.get_encoder() if name == "t5" else bare.base_model
    embedded = encoder.get_input_embeddings()(ids) if name == "t5" else encoder.embeddings(ids)
    if name == "t5":
        block = encoder.block[0].layer[0]
        key = block.SelfAttention.k(block.layer_norm(embedded))
    else:
        key = encoder.encoder.layer[0].attention.self.key(embedded)
    expected = key.view(4, 2, 16).transpose(0, 1)
    torch.testing.assert_close(kv.keys[0], expected.detach(), rtol=1e-5, atol=1e-5)


def test_images_have_no_text_to_start_from():
    config = PrefixConfig(task_type="FEATURE_EXTRACTION", init="vocab")
    with pytest.raises(ValueError, match="pixel_values"):
        PrefixTuningModel(zoo.kind("vit", torch.float32), config)


def test_an_encoder_is_saved_in_pefts_format(tmp_path):
    model, config = zoo.kind("bert", torch.float32), PrefixConfig(task_type="FEATURE_EXTRACTION")
    tuned = PrefixTuningModel(model, config)
    tuned.save_pretrained(tmp_path)
    loaded = PrefixTuningModel.from_pretrained(zoo.kind("bert", torch.float32), tmp_path)
    inputs, _ = zoo.kind_inputs(model)
    with torch.no_grad():
        assert torch.equal(tuned.eval()(**inputs).logits, loaded(**inputs).logits)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_groups_are_saved_and_loaded(groups, tmp_path):
    """They have a file of their own, since PEFT's format has no place for them."""
    config = PrefixConfig(
        num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", groups=groups, init_std=1.0
    )
    tuned = PrefixTuningModel(zoo.kind("t5", torch.float32), config).eval()
    tuned.save_pretrained(tmp_path)
    assert load_adapter(tmp_path).config["not_peft"]
    loaded = PrefixTuningModel.from_pretrained(zoo.kind("t5", torch.float32), tmp_path)
    assert loaded.encoder.layout == tuned.encoder.layout
    inputs, _ = zoo.kind_inputs(tuned.base_model)
    with torch.no_grad():
        assert torch.equal(tuned(**inputs).logits, loaded(**inputs).logits)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_training_starts_from_a_saved_prefix(tmp_path, groups):
    """This includes PEFT's format, which holds only a decoder's prefix."""
    config = {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM", "groups": groups}
    if groups == ("decoder",):
        config["position_offset"] = 3  # as PEFT's
    saved = PrefixTuningModel(zoo.kind("t5", torch.float32), PrefixConfig(**config))
    saved.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"] == "PREFIX_TUNING") == (groups == ("decoder",))
    start = PrefixConfig(**config, init="prefix", init_prefix=str(tmp_path))
    tuned = PrefixTuningModel(zoo.kind("t5", torch.float32), start)
    for got, want in zip(tuned.export().tensors, saved.export().tensors, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_prefix_that_slides_is_refused_before_anything_changes(kind):
    model = zoo.kind(kind, torch.float32)
    with pytest.raises(ValueError, match="prefix_in_window: got True"):
        PrefixTuningModel(model, PrefixConfig(3, prefix_in_window=True))
    assert all(p.requires_grad for p in model.parameters())
