"""What PEFT's own tests hold its models to, held of both libraries: files and adapters by name.

Where PEFT fails a cell that is written beside the test, and the cell is held to fail.
"""

import json
import warnings

import pytest
import torch
import yaml

CLOSE = {"rtol": 0, "atol": 2e-5}
SEQ2SEQ = ("bart", "t5")
CLASSIFIERS = ("bert_cls", "roberta_cls", "llama_cls")
PREFIXES = ("prefix", "projection", "cartridge")
NAME = "someone/a-model"


@pytest.fixture
def named(cell, monkeypatch):
    """A base with a name, as from the hub, which nobody asks the hub for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = cell.base()
    base.name_or_path = base.config._name_or_path = NAME
    return base


def same(cell, tuned, again):
    inputs = cell.batch()
    torch.testing.assert_close(
        cell.logits(again, **inputs), cell.logits(tuned, **inputs), rtol=0, atol=2e-5
    )


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# One adapter


def test_saves_what_it_loads(cell, tmp_path):
    tuned = cell.make()
    saved = cell.saved(tuned, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files(tmp_path)
    assert not {"model.safetensors", "config.json"} & files(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = cell.load(tmp_path)
    assert not again.training
    same(cell, tuned, again)
    got = cell.saved(again, tmp_path / "again")
    assert got.keys() == saved.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in saved.items())


def test_the_configuration_says_what_the_adapter_is(cell, named, tmp_path):
    tuned = cell.make(named, **cell.exchanged())
    tuned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == NAME
    assert config["peft_type"] == cell.peft_type
    assert config["task_type"] == cell.task_type
    assert config["num_virtual_tokens"] == cell.P
    assert config["inference_mode"] is True
    assert not tuned.peft_config["default"].inference_mode


def test_writes_a_model_card(cell, named, tmp_path):
    cell.make(named, **cell.exchanged()).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    card = yaml.safe_load(text.split("---\n")[1])
    assert card["library_name"] == "peft"
    assert card["base_model"] == NAME
    assert f"base_model:adapter:{NAME}" in card["tags"]
    assert (card.get("pipeline_tag") == "text-generation") == (cell.task_type == "CAUSAL_LM")


def test_a_card_keeps_what_a_person_wrote(cell, named, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    cell.make(named).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# Mine" in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "mit"


def test_writes_bin_and_reads_it(cell, tmp_path):
    tuned = cell.make(**cell.exchanged())
    expected = cell.saved(tuned, tmp_path / "safe")
    tuned.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert "adapter_model.bin" in files(tmp_path / "bin")
    assert "adapter_model.safetensors" not in files(tmp_path / "bin")
    got = torch.load(tmp_path / "bin" / "adapter_model.bin", weights_only=True)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    same(cell, tuned, cell.load(tmp_path / "bin"))


def test_only_the_main_process_writes(cell, tmp_path):
    cell.make().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not files(tmp_path)


def test_loads_with_a_configuration_given(cell, tmp_path):
    tuned = cell.make()
    tuned.save_pretrained(tmp_path)
    again = cell.load(tmp_path, is_trainable=False, config=cell.config())
    assert again.peft_config["default"].inference_mode
    assert again.peft_config["default"].num_virtual_tokens == cell.P
    same(cell, tuned, again)


def test_loads_to_a_device_with_little_memory(cell, tmp_path):
    tuned = cell.make()
    tuned.save_pretrained(tmp_path)
    again = cell.load(tmp_path, torch_device="cpu", low_cpu_mem_usage=True)
    same(cell, tuned, again)
    again.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    again.set_adapter("other")
    assert {parameter.device.type for parameter in again.parameters()} == {"cpu"}
    same(cell, tuned, again)


@pytest.mark.peft_fails(
    AssertionError,
    reason="prompts and prefixes still require gradients",
    methods=("prefix", "projection", "prompt", "p_tuning"),
)
def test_what_is_loaded_is_frozen(cell, tmp_path):
    cell.make().save_pretrained(tmp_path)
    again = cell.load(tmp_path)
    assert not [name for name, x in again.named_parameters() if x.requires_grad]
    assert again.peft_config["default"].inference_mode


@pytest.mark.peft_fails(ValueError, reason="refused")
def test_training_goes_on(cell, tmp_path):
    tuned = cell.make()
    tuned.save_pretrained(tmp_path)
    again = cell.load(tmp_path, is_trainable=True)
    assert again.training
    assert not again.peft_config["default"].inference_mode
    same(cell, tuned, again.eval())
    inputs = cell.labelled()
    trained = [x for x in again.parameters() if x.requires_grad]
    loss = again(**inputs).loss
    loss.backward()
    torch.optim.SGD(trained, lr=1e-2).step()
    assert again(**inputs).loss < loss


@pytest.mark.peft_fails(
    AssertionError,
    reason="prompts and prefixes still require gradients",
    methods=("prefix", "projection", "prompt", "p_tuning"),
)
def test_inference_mode_in_the_configuration_trains_nothing(cell):
    tuned = cell.make(inference_mode=True)
    assert not [name for name, x in tuned.named_parameters() if x.requires_grad]
    assert tuned.peft_config["default"].inference_mode
    inputs = cell.batch()
    bare = cell.logits(cell.base(), **inputs)
    assert (cell.logits(tuned, **inputs) - bare).abs().max() > 1e-2


@pytest.mark.cells(models=CLASSIFIERS)
def test_a_head_is_saved_with_its_adapter(cell, tmp_path):
    base = cell.base()
    tuned = cell.make(base)  # which fills heads with other numbers, too
    saved = cell.saved(tuned, tmp_path)
    heads = [name for name in saved if "classifier" in name or "score" in name]
    assert heads
    part = "score" if cell.model == "llama_cls" else "classifier"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert part in config["modules_to_save"]
    again = cell.load(tmp_path)
    same(cell, tuned, again)
    assert all(
        saved[name].shape == cell.base().state_dict()[name.removeprefix("base_model.")].shape
        for name in heads
    )


@pytest.mark.cells(models=("llama", "bert_cls"))
def test_modules_to_save_are_saved(cell, tmp_path):
    name = "norm" if cell.model == "llama" else "pooler"
    tuned = cell.make(modules_to_save=[name])
    saved = cell.saved(tuned, tmp_path)
    assert any(f"{name}." in key for key in saved)
    same(cell, tuned, cell.load(tmp_path))


# Several adapters


def test_selected_adapters(cell, tmp_path):
    tuned = cell.make()
    cell.add(tuned, "other", seed=1)
    inputs = cell.batch()
    expected = cell.logits(tuned, **inputs)
    tuned.save_pretrained(tmp_path / "all")
    for folder in (tmp_path / "all", tmp_path / "all" / "other"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files(folder)
    again = cell.load(tmp_path / "all")
    assert list(again.peft_config) == ["default"]
    again.load_adapter(tmp_path / "all" / "other", "other")
    assert list(again.peft_config) == ["default", "other"]
    assert again.active_adapters == ["default"]
    torch.testing.assert_close(cell.logits(again, **inputs), expected, **CLOSE)
    for model in (tuned, again):
        model.set_adapter("other")
    assert (cell.logits(tuned, **inputs) - expected).abs().max() > 1e-2
    same(cell, tuned, again)

    tuned.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert not (tmp_path / "one" / "other").exists()
    torch.testing.assert_close(
        cell.logits(cell.load(tmp_path / "one"), **inputs), expected, **CLOSE
    )
    with pytest.raises(ValueError, match="selected_adapters"):
        tuned.save_pretrained(tmp_path / "none", selected_adapters=["unknown"])


def test_loads_one_folder_several_times(cell, tmp_path):
    tuned = cell.make()
    tuned.save_pretrained(tmp_path)
    again = cell.load(tmp_path)
    again.load_adapter(tmp_path, adapter_name="other")
    again.load_adapter(tmp_path, adapter_name="yet-another")
    assert list(again.peft_config) == ["default", "other", "yet-another"]
    for name in ("yet-another", "other", "default"):
        again.set_adapter(name)
        assert again.active_adapter == name
        same(cell, tuned, again)


def test_names_that_are_parts_of_names(cell, tmp_path):
    tuned = cell.make()
    expected = cell.saved(tuned, tmp_path / "alone")
    for seed, name in enumerate(("default2", "other_default", "foodefault_bar", "efaul"), 1):
        cell.add(tuned, name, seed)
    got = cell.saved(tuned, tmp_path / "one", selected_adapters=["default"])
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.peft_fails(TypeError, reason="the base is asked to delete it", before="0.21")
def test_deletes_an_inactive_adapter(cell):
    tuned = cell.make()
    cell.add(tuned, "delete_me", seed=1)
    expected = cell.logits(tuned, **cell.batch())
    tuned.delete_adapter("delete_me")
    assert list(tuned.peft_config) == ["default"]
    assert tuned.active_adapters == ["default"]
    assert not any("delete_me" in name for name, _ in tuned.named_parameters())
    torch.testing.assert_close(cell.logits(tuned, **cell.batch()), expected, **CLOSE)


@pytest.mark.peft_fails(
    pytest.fail.Exception, reason="the base is asked to delete it", before="0.21"
)
def test_deletes_the_active_adapter_and_the_last(cell):
    base = cell.base()
    inputs = cell.batch()
    bare = cell.logits(base, **inputs)
    tuned = cell.make(base)
    expected = cell.logits(tuned, **inputs)
    cell.add(tuned, "delete_me", seed=1)
    tuned.set_adapter("delete_me")
    with pytest.warns(UserWarning, match="delete_me"):
        tuned.delete_adapter("delete_me")
    assert tuned.active_adapters == ["default"]
    torch.testing.assert_close(cell.logits(tuned, **inputs), expected, **CLOSE)
    tuned.delete_adapter("default")
    assert list(tuned.peft_config) == []
    assert tuned.active_adapters == []
    torch.testing.assert_close(cell.logits(tuned.base_model, **inputs), bare, **CLOSE)


@pytest.mark.peft_fails(
    pytest.fail.Exception, reason="the base is asked to delete it", before="0.21"
)
def test_there_is_no_unknown_adapter(cell):
    tuned = cell.make()
    for call in (tuned.delete_adapter, tuned.set_adapter):
        with pytest.raises(ValueError, match="unknown-adapter"):
            call("unknown-adapter")
    with pytest.raises(ValueError, match="default"):
        tuned.add_adapter("default", cell.config())
    assert list(tuned.peft_config) == ["default"]


# From one library to the other


@pytest.mark.peft
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_the_other_library_loads_it(cell, other, safe, tmp_path):
    tuned = cell.make(**cell.exchanged())
    tuned.save_pretrained(tmp_path, safe_serialization=safe)
    again = other.load(tmp_path)
    inputs = cell.labelled()
    if cell.task_type == "CAUSAL_LM":
        inputs["labels"][:, 0] = inputs["input_ids"][:, 0]  # a prompt predicts that one, too
    with torch.no_grad():
        expected, got = tuned(**inputs), again(**inputs)
    mask = inputs["attention_mask"]
    torch.testing.assert_close(
        cell.real(got.logits, mask), cell.real(expected.logits, mask), **CLOSE
    )
    torch.testing.assert_close(got.loss, expected.loss, **CLOSE)
    assert again.peft_config["default"].peft_type == other.loaded_type


@pytest.mark.only("fastprefix")
@pytest.mark.cells(models=SEQ2SEQ, methods=PREFIXES)
def test_a_prefix_of_an_encoder_is_nothing_that_peft_would_misread(cell, other, tmp_path):
    """PEFT has only a decoder's prefixes: ``groups=["decoder"], position_offset=P`` here."""
    cell.make().save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="FASTPREFIX"):
        other.load(tmp_path)


@pytest.mark.only("fastprefix")
def test_takes_the_configuration_of_peft(cell, other):
    config = other.config()
    base = cell.base()
    tuned = cell.wrap(base, config, "default")
    assert tuned.peft_config["default"].peft_type == cell.peft_type
    assert tuned.peft_config["default"].num_virtual_tokens == cell.P
    mine = cell.wrap(cell.base(), cell.config(), "default")
    shapes = [[p.shape for p in model.parameters() if p.requires_grad] for model in (tuned, mine)]
    assert shapes[0] == shapes[1]
