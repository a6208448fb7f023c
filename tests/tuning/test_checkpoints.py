"""A checkpoint of transformers' own Trainer is a source of from_pretrained, and still resumes."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel
from fastprefix.formats.peft_files import json_as_tensor, json_of_tensor
from fastprefix.hf.patch.patch import is_patched
from fastprefix.tuning.callbacks import ProgressiveLength

P = 4
KINDS = {
    "direct": (PrefixTuningModel, PrefixConfig(P, init="vocab")),
    "frozen tokens": (PrefixTuningModel, PrefixConfig(P, num_frozen_tokens=2, dropout=0.1)),
    "network": (PrefixTuningModel, PrefixConfig(P, prefix_projection=True, encoder_hidden_size=8)),
    "gated": (PrefixTuningModel, PrefixConfig(P, gated=True, layer_lengths=[P, 0, 2])),
    "prompt": (PromptTuningModel, PromptConfig(P, init="vocab")),
    "p-tuning": (PromptTuningModel, PromptConfig(P, encoder_reparameterization_type="LSTM")),
}


def data():
    ids = torch.randint(3, tiny.VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(tuned, folder, rows, **options):
    """Two steps of transformers' Trainer, with a checkpoint after each."""
    common = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1}
    common |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4, "seed": 3}
    callbacks = options.pop("callbacks", None)
    trainer = Trainer(
        tuned,
        TrainingArguments(str(folder), **{**common, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=callbacks,
    )
    trainer.train()
    tuned.eval()
    return trainer


def same(one, other):
    ids, mask = tiny.batch()
    with torch.no_grad():
        return torch.equal(one(ids, mask).logits, other(ids, mask).logits)


@pytest.mark.parametrize("kind", ["direct", "prompt"])
def test_the_trainer_s_checkpoints_load(kind, tmp_path):
    wrapper, config = KINDS[kind]
    tuned = wrapper(tiny.build("llama"), config)
    train(tuned, tmp_path, data())
    loaded = wrapper.from_pretrained(tiny.build("llama"), tmp_path / "checkpoint-2")
    assert same(loaded, tuned)
    earlier = wrapper.from_pretrained(tiny.build("llama"), tmp_path, subfolder="checkpoint-1")
    assert not same(earlier, tuned)
    with pytest.raises(FileNotFoundError, match="its checkpoint-1, checkpoint-2 may be what is me"):
        wrapper.from_pretrained(tiny.build("llama"), tmp_path)
    if kind == "direct":
        with pytest.raises(ValueError, match="got a Trainer's checkpoint, takes an adapter's fold"):
            loaded.load_adapter(tmp_path / "checkpoint-2", "b")


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_load(kind, tmp_path):
    wrapper, config = KINDS[kind]
    tuned = wrapper(tiny.build("llama"), config).eval()
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")  # as the Trainer does
    loaded = wrapper.from_pretrained(tiny.build("llama"), tmp_path)
    assert same(loaded, tuned)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    further = wrapper.from_pretrained(tiny.build("llama"), tmp_path, is_trainable=True)
    trained = {name for name, p in further.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert further.active_peft_config == config, "its network, its dropout, what it started from"


def test_all_adapters_of_a_checkpoint_load(tmp_path):
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(P), adapter_name="a")
    tuned.add_adapter("b", PrefixConfig(3, init_std=1.0))
    tuned.eval().set_adapter("b")
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")
    loaded = PrefixTuningModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert list(loaded.peft_config) == ["a", "b"]
    assert loaded.active_adapter == "b"
    assert same(loaded, tuned)
    tuned.set_adapter("a")
    loaded.set_adapter("a")
    assert same(loaded, tuned)


def test_the_only_adapter_is_called_as_asked(tmp_path):
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(P, init_std=1.0), adapter_name="a")
    save_file(tuned.eval().state_dict(), tmp_path / "model.safetensors")
    for name in ("a", "default", "b"):
        loaded = PrefixTuningModel.from_pretrained(tiny.build("llama"), tmp_path, name)
        assert list(loaded.peft_config) == [name]
        assert same(loaded, tuned)


def test_a_checkpoint_with_a_head(tmp_path):
    def base():
        torch.manual_seed(1)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4))

    tuned = PrefixTuningModel(base(), PrefixConfig(P, task_type="SEQ_CLS"))
    rows = [{"input_ids": torch.tensor([5, n, 7]), "labels": n % 2} for n in range(8)]
    train(tuned, tmp_path, rows)
    loaded = PrefixTuningModel.from_pretrained(base(), tmp_path / "checkpoint-2")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tuned(ids).logits)
    head = loaded.adapter_heads["default"].classifier
    assert not torch.equal(head.weight, base().classifier.weight)


def test_a_checkpoint_with_a_lora_inside_the_base(tmp_path):
    def inside():
        torch.manual_seed(5)
        return peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(target_modules=["q_proj"]))

    tuned = PrefixTuningModel(inside(), PrefixConfig(P, init_std=1.0)).eval()
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")
    loaded = PrefixTuningModel.from_pretrained(inside(), tmp_path)
    assert same(loaded, tuned)
    bare = tiny.build("llama")
    with pytest.raises(ValueError, match=r"model\.safetensors: does not fit this model .*LoRA"):
        PrefixTuningModel.from_pretrained(bare, tmp_path)
    assert not is_patched(bare)
    assert all(p.requires_grad for p in bare.parameters())


def test_a_grown_prefix_loads(tmp_path):
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(2))
    grow = ProgressiveLength(maximum=5, step=3, patience=1, threshold=0.9)
    train(tuned, tmp_path, data(), max_steps=4, logging_steps=1, callbacks=[grow])
    assert tuned.export().num_virtual_tokens == 5
    loaded = PrefixTuningModel.from_pretrained(tiny.build("llama"), tmp_path / "checkpoint-4")
    assert same(loaded, tuned)


def test_the_best_checkpoint_comes_back_and_training_resumes(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(P))
    trainer = train(tuned, tmp_path / "best", data(), learning_rate=30.0, **best)
    step = trainer.state.best_model_checkpoint
    loaded = PrefixTuningModel.from_pretrained(tiny.build("llama"), step)
    assert same(loaded, tuned)

    whole = PrefixTuningModel(tiny.build("llama"), PrefixConfig(P))
    start = {name: x.clone() for name, x in whole.state_dict().items()}
    train(whole, tmp_path / "whole", data())
    half = PrefixTuningModel(tiny.build("llama"), PrefixConfig(P))
    half.load_state_dict(start)
    again = Trainer(
        half,
        TrainingArguments(
            str(tmp_path / "half"), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=2,
            per_device_train_batch_size=4, learning_rate=0.1, seed=3,
        ),
        train_dataset=data(),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, x in whole.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], x, msg=name)


def test_older_checkpoints_still_resume():
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(P))
    state = tuned.state_dict()
    del state["_extra_state"]
    result = tuned.load_state_dict(state)
    assert not result.missing_keys


def test_what_is_no_checkpoint_of_ours_is_told_so(tmp_path):
    base = tiny.build("llama")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"without a configuration of fastprefix, takes an adapt"):
        PrefixTuningModel.from_pretrained(tiny.build("llama"), tmp_path / "base")
    tuned = PromptTuningModel(tiny.build("llama"), PromptConfig(P))
    (tmp_path / "prompt").mkdir()
    save_file(tuned.state_dict(), tmp_path / "prompt" / "model.safetensors")
    with pytest.raises(ValueError, match="got a checkpoint of a PromptTuningModel, takes one of a"):
        PrefixTuningModel.from_pretrained(tiny.build("llama"), tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"config\.num_virtual_tokens: got 5, takes 4 as in"):
        PromptTuningModel.from_pretrained(
            tiny.build("llama"), tmp_path / "prompt", config=PromptConfig(5)
        )
    file = tmp_path / "prompt" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        PromptTuningModel.from_pretrained(tiny.build("llama"), tmp_path / "prompt")
    settings = json_of_tensor(tuned.get_extra_state())
    for name, change, message in [
        ("encoder.embedding", torch.full((P, 64), torch.nan), "encoder.embedding holds a NaN"),
        (
            "_extra_state",
            json_as_tensor({**settings, "adapters": {}}),
            "got a checkpoint without adapt",
        ),
        ("_extra_state", json_as_tensor({"x": 1}), "model_class"),
        ("_extra_state", torch.tensor([1, 2, 3], dtype=torch.uint8), "Expecting value"),
        (
            "_extra_state",
            json_as_tensor({**settings, "adapters": {"default": {"num_virtual_tokens": 0}}}),
            "num_virtual_tokens: got 0, takes 1 or more",
        ),
        (
            "_extra_state",
            json_as_tensor({**settings, "adapters": {"default": {"no_such": 0}}}),
            "no_such",
        ),
    ]:
        save_file({**tuned.state_dict(), name: change}, file)
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
            PromptTuningModel.from_pretrained(tiny.build("llama"), tmp_path / "prompt")
    file.write_bytes(whole)
    assert load_file(file)["_extra_state"].dtype == torch.uint8
    file.unlink()
    torch.save(tuned.state_dict(), tmp_path / "prompt" / "pytorch_model.bin")
    loaded = PromptTuningModel.from_pretrained(tiny.build("llama"), tmp_path / "prompt")
    assert torch.equal(loaded.export_embeddings(), tuned.export_embeddings())
