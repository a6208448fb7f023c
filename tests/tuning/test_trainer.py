"""transformers.Trainer as it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, use_prefix


class Texts(torch.utils.data.Dataset):
    """Padded rows that repeat a few tokens, so that there is something to learn."""

    def __init__(self, count=8):
        rows = [(torch.arange(4 + row % 3) * 7 + 1) % tiny.VOCAB for row in range(count)]
        self.ids, self.mask = tiny.pad(rows, "right")

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        ids, mask = self.ids[row], self.mask[row]
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "row": row}


@pytest.fixture
def make(architecture, tmp_path):
    """A Trainer of a new model; everything but the options given is the same each time."""

    def build(prefix=(), **options):
        torch.manual_seed(0)
        config = PrefixConfig(num_virtual_tokens=4, **dict(prefix))
        arguments = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"),
                "report_to": [],
                "use_cpu": True,
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-2,
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                **options,
            }
        )
        return Trainer(
            PrefixTuningModel(tiny.build(architecture), config),
            arguments,
            train_dataset=Texts(),
            eval_dataset=Texts(5),
        )

    return build


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("projection", [False, True])
def test_loss_falls_and_evaluation_works(make, projection):
    trainer = make({"prefix_projection": projection})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert len(losses(trainer)) == 6
    assert after < before - 0.3


def test_columns_of_the_text_are_kept(make):
    trainer = make()
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_gradient_checkpointing_gives_the_same_losses(make):
    plain, saving = make(), make(gradient_checkpointing=True)
    also = make(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    for trainer in (plain, saving, also):
        trainer.train()
    assert any(getattr(m, "gradient_checkpointing", False) for m in saving.model.modules())
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(also) == pytest.approx(losses(plain), rel=1e-4)


def test_accumulated_batches_give_the_losses_of_whole_ones(make):
    whole = make(max_steps=3, per_device_train_batch_size=8)
    parts = make(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)


def test_resumed_training_ends_where_uninterrupted_training_does(make):
    saved = {"save_strategy": "steps", "save_steps": 3}
    whole = make(**saved)
    whole.train()
    folder = f"{whole.args.output_dir}/checkpoint-3"
    resumed = make(**saved)
    resumed.train(resume_from_checkpoint=folder)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert losses(resumed)[-3:] == losses(whole)[-3:]


@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize("projection", [False, True])
def test_resuming_draws_the_same_dropout(make, projection):
    """Bit for bit, with batches and dropout drawn at random and gradients accumulated."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    prefix = {"prefix_projection": projection, "dropout": 0.3}
    whole = make(prefix, **options)
    whole.train()
    resumed = make(prefix, **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_checkpoint_holds_the_encoder_and_its_optimizer_alone(make):
    trainer = make(save_strategy="steps", save_steps=6)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    held = load_file(folder / "model.safetensors")
    assert held.keys() == {"encoders.default.embedding", "_extra_state"}
    optimizer = torch.load(folder / "optimizer.pt")
    assert [state["exp_avg"].shape for state in optimizer["state"].values()] == [
        trainer.model.encoder.embedding.shape
    ]


@pytest.mark.parametrize("architecture", ["llama"])
def test_reentrant_checkpointing_is_refused(make):
    """It has two names, and both are refused."""
    trainer = make(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.raises(ValueError, match="use_reentrant"):
        trainer.train()
    tuned, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    for enable in (
        tuned.gradient_checkpointing_enable,
        tuned.activation_checkpointing_enable,
        tuned.base_model.gradient_checkpointing_enable,
    ):
        tuned.gradient_checkpointing_disable()
        tuned.train()(**batch)
        enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant"):
            tuned(**batch)


def test_seq2seq_trainer_generates(tmp_path):
    """It trains, evaluates by generating, and what it generates sees the prefix."""
    config = T5Config(
        vocab_size=tiny.VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, dropout_rate=0.0,
        initializer_factor=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    tuned = PrefixTuningModel(
        T5ForConditionalGeneration(config),
        PrefixConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM", init_std=1.0),
    )
    data = [
        {name: value for name, value in Texts()[row].items() if name != "row"} for row in range(8)
    ]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=6,
        learning_rate=0.3, logging_steps=1, save_strategy="no", predict_with_generate=True,
        generation_max_length=6,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(tuned, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    found = trainer.predict(data).predictions
    inputs = {
        name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")
    }
    with use_prefix(tuned.base_model, tuned.export()):
        expected = tuned.base_model.generate(**inputs, max_length=6)
    assert found[:, : expected.shape[1]].tolist() == expected.tolist()
    assert expected.tolist() != tuned.base_model.generate(**inputs, max_length=6).tolist()


def test_best_model_is_loaded_at_the_end(make):
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = make(**every, load_best_model_at_end=True, learning_rate=1e-2)
    trainer.train()
    best = min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama"])
def test_bfloat16_training(make):
    trainer = make(bf16=True)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
