"""PrefixTrainer and PrefixSeq2SeqTrainer: their defaults, and what they save."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTrainer, PrefixTuningModel
from fastprefix.tuning.trainer import (
    PrefixSeq2SeqTrainer,
    PrefixSeq2SeqTrainingArguments,
    PrefixTrainingArguments,
)

KINDS = {
    "trainer": (PrefixTrainer, PrefixTrainingArguments),
    "seq2seq": (PrefixSeq2SeqTrainer, PrefixSeq2SeqTrainingArguments),
}


@pytest.fixture(params=KINDS)
def make(request, tmp_path):
    """A function that makes a trainer."""
    trainer, arguments = KINDS[request.param]

    def build(prefix=(), **options):
        torch.manual_seed(0)
        tuned = PrefixTuningModel(tiny.build(), PrefixConfig(4, **dict(prefix)))
        ids = (torch.arange(8)[:, None] % 3 + torch.arange(6) * 7 + 1) % tiny.VOCAB
        rows = [{"input_ids": row, "labels": row} for row in ids]
        common = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 4}
        args = arguments(str(tmp_path / "out"), **{**common, "save_strategy": "no", **options})
        return trainer(tuned, args, train_dataset=rows, eval_dataset=rows)

    return build


def test_defaults(make):
    trainer = make(max_steps=100)
    trainer.create_optimizer_and_scheduler(100)
    (group,) = [g for g in trainer.optimizer.param_groups if g["params"]]
    assert {id(p) for p in group["params"]} == {id(trainer.model.encoder.embedding)}
    assert group["weight_decay"] == 0.0
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    rates = []
    for _ in range(100):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == 0.0
    assert rates.index(max(rates)) == 6, "a warm-up"
    assert max(rates) == 1e-2
    assert rates[-1] < 2e-4
    assert trainer.args.max_grad_norm == 1.0


def test_given_values_stand(make):
    trainer = make(learning_rate=3e-3, warmup_steps=2, lr_scheduler_type="cosine")
    assert trainer.args.learning_rate == 3e-3
    assert trainer.args.warmup_steps == 2
    assert trainer.args.lr_scheduler_type == "cosine"


def test_makes_its_own_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for trainer, arguments in KINDS.values():
        made = trainer(PrefixTuningModel(tiny.build(), PrefixConfig(4)))
        assert type(made.args) is arguments


@pytest.mark.parametrize("projection", [False, True])
def test_saves_the_adapter_alone(make, projection, tmp_path):
    trainer = make({"prefix_projection": projection})
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    ids = tiny.prompt()
    expected = trainer.model.eval()(ids).logits
    loaded = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, expected)
    theirs = peft.PeftModel.from_pretrained(tiny.build(), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_checkpoints_hold_the_adapter_and_the_encoder(make, projection):
    trainer = make({"prefix_projection": projection}, save_strategy="steps", save_steps=2)
    trainer.train()
    for step in (2, 4):
        folder = f"{trainer.args.output_dir}/checkpoint-{step}"
        state = load_file(f"{folder}/model.safetensors")
        assert state.keys() == trainer.model.state_dict().keys()
        assert load_file(f"{folder}/adapter_model.safetensors")["prompt_embeddings"].shape[0] == 4
    resumed = make({"prefix_projection": projection}, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, msg=name)


def test_leaves_the_base_as_it_was(make):
    trainer = make()
    trainer.train()
    assert trainer.model.config.use_cache is True
    for name, tensor in tiny.build().state_dict().items():
        assert torch.equal(trainer.model.base_model.state_dict()[name], tensor), name


def test_trains_as_transformers_own_trainer_does(make):
    ours = make()
    ours.train()
    other = make()
    plain = Trainer(
        other.model,
        TrainingArguments(
            other.args.output_dir,
            learning_rate=1e-2,
            warmup_steps=0.06,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            max_steps=4,
            save_strategy="no",
        ),
        train_dataset=other.train_dataset,
    )
    plain.train()
    for got, want in zip(ours.model.export().keys, plain.model.export().keys, strict=True):
        assert torch.equal(got, want)
