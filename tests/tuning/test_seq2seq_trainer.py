"""Trainer and Seq2SeqTrainer on tuned models: PEFT's losses, and what generate() generates."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel


def build(kind):
    """A model with weights so large that other tokens come out without the prefix."""
    model = plain(kind)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def plain(kind, vocabulary=101):
    if kind == "t5":
        config = T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, dropout_rate=0.0,
            initializer_factor=0.5,
        )  # fmt: skip
        return T5ForConditionalGeneration(config)
    config = BartConfig(
        vocab_size=vocabulary, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, decoder_start_token_id=0, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, forced_eos_token_id=None, dropout=0.0, init_std=0.2,
        max_position_embeddings=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def rows(decoder=True):
    made = []
    for row in range(4):
        text = tiny.prompt(4 + row % 3, seed=row)[0].tolist()
        made.append({"input_ids": text, "attention_mask": [1] * len(text)})
        made[-1]["labels"] = (
            tiny.prompt(3 + row % 2, seed=50 + row)[0].tolist() if decoder else text
        )
    return made


class Pads:
    """All that DataCollatorForSeq2Seq asks of a tokenizer."""

    padding_side = "right"

    def pad(self, features, **_):
        longest = max(len(row["input_ids"]) for row in features)
        return {
            name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in features])
            for name in ("input_ids", "attention_mask")
        }


def collate(features):
    longest = max(len(row["labels"]) for row in features)
    batch = Pads().pad(features)
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in features]
    return {**batch, "labels": torch.tensor(labels)}


def trainer(model, folder, kind="t5", collator=collate):
    decoder = kind != "llama"
    make, arguments = (Trainer, TrainingArguments)
    more = {}
    if decoder:
        make, arguments = Seq2SeqTrainer, Seq2SeqTrainingArguments
        more = {"predict_with_generate": True, "generation_max_length": 6}
    given = arguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, logging_steps=1,
        learning_rate=0.05, save_strategy="no", seed=3, per_device_train_batch_size=2, **more,
    )  # fmt: skip
    data = rows(decoder)
    return make(model, given, train_dataset=data, eval_dataset=data, data_collator=collator)


def logged(one, name):
    return [log[name] for log in one.state.log_history if name in log]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_predictions_are_what_generate_gives(tmp_path, kind):
    config = PrefixConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM", init_std=1.0)
    tuned = PrefixTuningModel(build(kind), config)
    collator = DataCollatorForSeq2Seq(Pads(), model=tuned)  # asks for the decoder's inputs
    one = trainer(tuned, tmp_path, collator=collator)
    before = one.evaluate()["eval_loss"]
    one.train()
    assert one.evaluate()["eval_loss"] < before
    batch = collate(rows())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = torch.tensor(one.predict(rows()).predictions)
    want = tuned.eval().generate(**inputs, max_length=6)
    assert torch.equal(found[:, : want.shape[1]], want)
    assert not torch.equal(tuned.base_model.generate(**inputs, max_length=6), want)


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_losses_and_predictions_are_pefts(tmp_path, kind):
    """The same adapter, which PEFT made.

    That of an encoder-decoder is not trained: PEFT gives several layers the same numbers, which for
    us are numbers of each layer, and so the two go apart with the first step.
    """
    import peft

    def base():
        return tiny.build("llama", num_hidden_layers=2) if kind == "llama" else build(kind)

    task = "CAUSAL_LM" if kind == "llama" else "SEQ_2_SEQ_LM"
    theirs = peft.get_peft_model(
        base(), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)
    )
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_(0.0, 1.0)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = PrefixTuningModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    want, got = (trainer(model, tmp_path, kind) for model in (theirs, ours))
    if kind == "t5":
        losses = [one.evaluate()["eval_loss"] for one in (want, got)]
        expected, found = (one.predict(rows()).predictions.tolist() for one in (want, got))
        assert found == expected
    else:
        for one in (want, got):
            one.train()
        assert len(set(logged(want, "loss"))) == 3
        losses = [logged(one, "loss") for one in (want, got)]
        assert logged(got, "grad_norm") == pytest.approx(logged(want, "grad_norm"), rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
