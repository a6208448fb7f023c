"""A prefix and a LoRA on one model: both trained, saved by one call and loaded by one."""

import json

import peft
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft.functional import set_adapter
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, unpatch_model
from fastprefix.tuning.peft_base import find_base_adapter

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
P = 5


@pytest.fixture(params=["llama", "gpt2"])
def architecture(request):
    return request.param


@pytest.fixture
def lora(architecture):
    """A LoRA that matters from the start; its dropout must not."""
    modules = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=modules,
        init_lora_weights=False,
        fan_in_fan_out=architecture == "gpt2",
    )


@pytest.fixture
def theirs(bare, lora):
    """PEFT's own LoRA model, which nothing of fastprefix touches."""
    torch.manual_seed(7)
    return peft.get_peft_model(bare, lora)


def wrapped(model, lora):
    return PrefixTuningModel(peft.get_peft_model(model, lora), CONFIG)


def added_before(model, lora):
    peft.inject_adapter_in_model(lora, model)
    return PrefixTuningModel(model, CONFIG)


def added_after(model, lora):
    tuned = PrefixTuningModel(model, CONFIG)
    peft.inject_adapter_in_model(lora, tuned.base_model)
    return tuned


CONFIG = PrefixConfig(num_virtual_tokens=P, init_std=1.0)
WAYS = {way.__name__: way for way in (wrapped, added_before, added_after)}


@pytest.fixture(params=WAYS)
def tuned(request, model, lora, theirs):
    """A model whose LoRA has the weights of `theirs`."""
    tuned = WAYS[request.param](model, lora).train()
    state = theirs.get_base_model().state_dict()
    tuned.base_model.load_state_dict(state)
    return tuned


@pytest.fixture
def inputs():
    ids, mask = tiny.batch()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_loss_and_gradients_are_those_of_peft_with_the_prefix_in_its_cache(tuned, theirs, inputs):
    ids, mask, labels = inputs.values()
    tuned(**inputs).loss.backward()
    kv = tuned.encoder()
    embedding = tuned.encoder.embedding
    ours, embedding.grad = embedding.grad, None
    tiny.expanded_forward(theirs, kv, ids, mask, labels=labels).loss.backward()
    torch.testing.assert_close(ours, embedding.grad, rtol=1e-3, atol=1e-5)
    expected = {n: p.grad for n, p in theirs.get_base_model().named_parameters() if p.requires_grad}
    got = {n: p.grad for n, p in tuned.base_model.named_parameters() if p.requires_grad}
    assert got.keys() == expected.keys()
    assert all("lora_" in name for name in got)
    for name, gradient in got.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_both_train_and_the_base_does_not(tuned, inputs):
    before = {name: tensor.clone() for name, tensor in tuned.base_model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = tuned(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in tuned.base_model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


def test_one_call_saves_both_and_one_loads_both(architecture, tuned, inputs, tmp_path):
    tuned.eval().add_adapter("b", CONFIG)
    tuned.save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "default"), (tmp_path / "b", "b")):
        again = PrefixTuningModel.from_pretrained(tiny.build(architecture), folder)
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert not again.training
        tuned.set_adapter(name)
        assert torch.equal(again(**inputs).logits, tuned(**inputs).logits)
    again.load_adapter(tmp_path, "another")
    again.set_adapter("another")
    tuned.set_adapter("default")
    assert torch.equal(again(**inputs).logits, tuned(**inputs).logits)


def test_loaded_to_be_trained_both_are(architecture, tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    again = PrefixTuningModel.from_pretrained(tiny.build(architecture), tmp_path, is_trainable=True)
    expected = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    got = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert got == expected
    assert again.training


def test_peft_loads_each_alone(architecture, tuned, theirs, inputs, tmp_path):
    tuned.eval().save_pretrained(tmp_path)
    ids, mask, _ = inputs.values()
    alone = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path / "base_model")
    assert torch.equal(
        alone.eval()(ids, attention_mask=mask).logits,
        theirs.eval()(ids, attention_mask=mask).logits,
    )
    ids, mask = tiny.batch(side="right")
    both = peft.PeftModel.from_pretrained(alone.get_base_model(), tmp_path).eval()
    got, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (both, tuned))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


def test_checkpoints_hold_both_and_not_the_base(architecture, tuned, lora, inputs):
    state = tuned.state_dict()
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert state.keys() == {*trained, "_extra_state"}
    again = wrapped(tiny.build(architecture), lora)
    result = again.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(again.eval()(**inputs).logits, tuned.eval()(**inputs).logits)
    state.pop(next(name for name in state if "lora_A" in name))
    with pytest.raises(RuntimeError, match="lora_A"):
        again.load_state_dict(state)


def test_without_the_prefix_the_lora_stays(tuned, theirs, inputs):
    tuned.eval()
    theirs.eval()
    ids, mask, _ = inputs.values()
    with tuned.disable_adapter():
        got = tuned(ids, mask).logits
    expected = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    unpatch_model(tuned.base_model)
    assert torch.equal(tuned.base_model(ids, attention_mask=mask).logits, expected)


def test_rows_with_prefixes_of_their_own(tuned, theirs, inputs):
    tuned.eval().add_adapter("b", PrefixConfig(num_virtual_tokens=2, init_std=1.0))
    theirs.eval()
    ids, mask, _ = inputs.values()
    names = ["b", None, "default"]
    got = tuned(ids, mask, position_ids=tiny.positions(mask), prefix_names=names).logits
    for row, name in enumerate(names):
        real = mask[row].bool()
        text, ones = ids[row][real][None], mask[row][real][None]
        if name is None:
            expected = theirs(text).logits
        else:
            expected = tiny.expanded_forward(theirs, tuned.export(name), text, ones).logits
        torch.testing.assert_close(got[row][real], expected[0], **CLOSE)


class Items(torch.utils.data.Dataset):
    """Texts that differ little."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        ids = torch.arange(5) * 7 + item
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_trainer_resumes_both_and_checkpoints_activations(lora, theirs, tmp_path):
    def make(**options):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, max_steps=4, learning_rate=1e-2,
            per_device_train_batch_size=4, logging_steps=1, save_steps=2, disable_tqdm=True,
            **options,
        )  # fmt: skip
        tuned = wrapped(tiny.build(), lora)
        tuned.base_model.load_state_dict(theirs.get_base_model().state_dict())
        return Trainer(tuned, arguments, train_dataset=Items())

    whole, resumed = make(), make(gradient_checkpointing=True)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == got.keys()
    assert any("lora_A" in name for name in got)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def folder(lora, tmp_path):
    wrapped(tiny.build("llama"), lora).save_pretrained(tmp_path)
    return tmp_path


ONE = pytest.mark.parametrize("architecture", ["llama"])


@ONE
def test_a_prefix_without_its_lora_is_refused(folder):
    """Loaded beside other prefixes, it would silently run on a base that it was not trained on."""
    tuned = PrefixTuningModel(tiny.build(), CONFIG)
    with pytest.raises(ValueError, match="from_pretrained"):
        tuned.load_adapter(folder, "b")
    assert list(tuned.encoders) == ["default"]


@ONE
def test_a_prefix_beside_another_lora_is_refused(folder, lora):
    """The base has one, and of the same shapes, but not the numbers that it was trained with."""
    model = tiny.build()
    torch.manual_seed(8)
    peft.inject_adapter_in_model(lora, model)
    tuned = PrefixTuningModel(model, CONFIG)
    with pytest.raises(ValueError, match="other numbers"):
        tuned.load_adapter(folder, "b")
    assert list(tuned.encoders) == ["default"]


@ONE
def test_a_second_lora_is_refused(folder, lora):
    model = tiny.build()
    peft.inject_adapter_in_model(lora, model, "mine")
    with pytest.raises(ValueError, match=r"PEFT adapters \['mine'\] inside"):
        PrefixTuningModel.from_pretrained(model, folder)


@ONE
def test_a_lora_that_was_there_before_is_not_left_for_a_model_without(folder):
    with pytest.raises(ValueError, match=r"base_model holds an adapter.*another folder"):
        PrefixTuningModel(tiny.build(), CONFIG).save_pretrained(folder)


@ONE
def test_several_active_loras_cannot_be_saved(lora, tmp_path):
    model = tiny.build()
    peft.inject_adapter_in_model(lora, model, "one")
    peft.inject_adapter_in_model(lora, model, "two")
    tuned = PrefixTuningModel(model, CONFIG)
    set_adapter(model, ["one", "two"])
    with pytest.raises(ValueError, match=r"\['one', 'two'\] as active"):
        tuned.save_pretrained(tmp_path)
    set_adapter(model, "one")
    tuned.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "base_model" / "adapter_model.safetensors")
    one = peft.get_peft_model_state_dict(model, adapter_name="one")
    assert all(torch.equal(saved[f"base_model.model.{name}"], one[name]) for name in one)


@ONE
@pytest.mark.peft
def test_a_lora_that_transformers_put_in_is_one_of_peft(lora, inputs, tmp_path):
    """A LoRA that we loaded follows transformers' own switches."""
    model = tiny.build()
    model.add_adapter(lora)
    tuned = PrefixTuningModel(model, CONFIG).eval()
    tuned.save_pretrained(tmp_path)
    again = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path)
    expected = tuned(**inputs).logits
    assert torch.equal(again(**inputs).logits, expected)
    for each in (tuned, again):
        each.base_model.disable_adapters()
    assert torch.equal(again(**inputs).logits, tuned(**inputs).logits)
    assert (again(**inputs).logits - expected).abs().max() > 1e-3


def test_a_prompt_of_peft_is_refused():
    """Its inside would run without it."""
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = tiny.build()
    with pytest.raises(ValueError, match=r"model: got a PeftModel.* with PROMPT_TUNING"):
        PrefixTuningModel(peft.get_peft_model(model, prompt), CONFIG)


@ONE
@pytest.mark.parametrize("damage", ["missing", "cut", "nan", "shape", "name", "config"])
def test_damaged_lora_files_are_named_and_the_model_left(folder, damage):
    file = folder / "base_model" / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "config":
        place = folder / "base_model" / "adapter_config.json"
        fields = json.loads(place.read_text())
        place.write_text(json.dumps({**fields, "target_modules": ["nothing"]}))
    else:
        tensor = weights.pop(first)
        if damage == "nan":
            weights[first] = tensor.fill_(float("nan"))
        elif damage == "shape":
            weights[first] = tensor[:, :-1].contiguous()
        save_file(weights, file)
    model = tiny.build()
    ids, mask = tiny.batch()
    expected, names = model(ids, attention_mask=mask).logits, dict(model.named_modules()).keys()
    with pytest.raises((ValueError, FileNotFoundError), match="base_model"):
        PrefixTuningModel.from_pretrained(model, folder)
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert dict(model.named_modules()).keys() == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_repository_on_the_hub_is_asked_for_its_lora(tmp_path, monkeypatch):
    """Files as the hub's client would have put them; a repository without one has none."""
    asked = []

    def download(repository, file):
        asked.append(f"{repository}/{file}")
        if repository == "some/prefix":
            raise LocalEntryNotFoundError("no such file")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_base_adapter("some/prefix") is None
    assert find_base_adapter("some/both") == tmp_path / "base_model"
    assert asked[-1] == "some/both/base_model/adapter_model.safetensors"
