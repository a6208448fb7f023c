"""What transformers.Trainer reads of a model: columns it keeps, the loss it logs, labels."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GenerationConfig,
    Trainer,
)

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixTrainer,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
)
from fastprefix.tuning.trainer import (
    PrefixSeq2SeqTrainer,
    PrefixSeq2SeqTrainingArguments,
    PrefixTrainingArguments,
)

KINDS = {"prefix": (PrefixTuningModel, PrefixConfig), "prompt": (PromptTuningModel, PromptConfig)}


@pytest.fixture(params=KINDS)
def wrap(request):
    """A function that puts a prefix or a prompt in front of a base."""
    kind, config = KINDS[request.param]

    def build(base, task_type="CAUSAL_LM"):
        return kind(base.eval(), config(num_virtual_tokens=4, task_type=task_type))

    return build


def bert(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sure = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    loud = {"vocab_size": 97, "num_attention_heads": 4, "initializer_range": 0.2}
    return kind(BertConfig(**sizes, **sure, **loud))


def arguments(folder, kind=PrefixTrainingArguments, **options):
    common = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    return kind(str(folder), **{**common, "save_strategy": "no", "logging_steps": 1, **options})


def data_of(**columns):
    """Four rows, and all of them as one batch."""
    ids = torch.randint(3, 97, (4, 6))
    batch = {"input_ids": ids} | {name: torch.tensor(column) for name, column in columns.items()}
    return [{name: column[row] for name, column in batch.items()} for row in range(4)], batch


def test_columns_that_the_base_takes_reach_it(wrap, tmp_path):
    tuned = wrap(bert(BertForSequenceClassification), "SEQ_CLS")
    types = [[0, 0, 0, 1, 1, 1]] * 4
    data, batch = data_of(token_type_ids=types, labels=[0, 1, 0, 1], unknown=[0] * 4)
    trainer = Trainer(tuned, arguments(tmp_path), eval_dataset=data)
    got = torch.from_numpy(trainer.predict(data).predictions)
    with torch.no_grad():
        expected = tuned.eval()(
            input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"]
        ).logits
        without = tuned(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(got, expected)
    assert (expected - without).abs().max() > 1e-3


def test_question_answering_is_trained_and_evaluated(wrap, tmp_path):
    tuned = wrap(bert(BertForQuestionAnswering), "QUESTION_ANS")
    data, batch = data_of(start_positions=[0, 1, 2, 3], end_positions=[1, 2, 3, 4])
    trainer = PrefixTrainer(tuned, arguments(tmp_path), train_dataset=data, eval_dataset=data)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert loss == pytest.approx(tuned.eval()(**batch).loss.item(), rel=1e-5)
    assert len(trainer.predict(data).label_ids) == 2


@pytest.mark.parametrize("trainer_class", [Trainer, PrefixTrainer])
def test_the_logged_loss_is_the_models(wrap, tmp_path, trainer_class):
    """A first token may have a label: a prompt predicts that token, a prefix does not."""
    tuned = wrap(tiny.build())
    ids = torch.randint(0, tiny.VOCAB, (8, 4))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with torch.no_grad():
        expected = tuned.eval()(input_ids=ids, labels=ids).loss.item()
    args = arguments(tmp_path, learning_rate=0.0, per_device_train_batch_size=8)
    trainer = trainer_class(tuned, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("trainer_class", [Trainer, PrefixTrainer])
def test_a_smoothed_loss_is_the_next_tokens(wrap, tmp_path, trainer_class):
    tuned = wrap(tiny.build()).eval()
    ids = torch.randint(0, tiny.VOCAB, (4, 6))
    trainer = trainer_class(tuned, arguments(tmp_path, label_smoothing_factor=1e-9))
    with torch.no_grad():
        got = trainer.compute_loss(tuned, {"input_ids": ids, "labels": ids})
        logits = tuned(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(got, expected)
    assert repr(tuned).startswith(f"{type(tuned).__name__}(")


def test_seq2seq_arguments_may_name_a_generation_config(wrap, tmp_path):
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 97}
    config = BartConfig(**heads, **sizes, **layers, dropout=0.0, forced_eos_token_id=None)
    base = BartForConditionalGeneration(config)
    tuned = wrap(base, "SEQ_2_SEQ_LM")
    ids = torch.randint(3, 97, (4, 6))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = arguments(
        tmp_path,
        PrefixSeq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_config=GenerationConfig(
            max_new_tokens=3, decoder_start_token_id=2, pad_token_id=1
        ),
    )
    trainer = PrefixSeq2SeqTrainer(tuned, args, eval_dataset=rows)
    assert base.generation_config.max_new_tokens == 3
    assert trainer.predict(rows).predictions.shape[0] == 4


def test_noise_on_the_embeddings(wrap, tmp_path):
    """neftune_noise_alpha hooks the module that embeds tokens."""
    tuned = wrap(tiny.build())
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, tiny.VOCAB, (4, 6))]
    Trainer(tuned, arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=rows).train()
    assert not tuned.get_input_embeddings()._forward_hooks
