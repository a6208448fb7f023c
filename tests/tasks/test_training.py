"""Batches for a Trainer: packed rows, and data that is read while training goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixTrainer,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
)
from fastprefix.tasks import Encoding, StreamedItems, WrittenText, load_examples
from fastprefix_testing.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def encoding():
    tokenizer = byte_tokenizer(eos_token="<eos>", pad_token="<pad>")
    return Encoding("descriptions", tokenizer, "CAUSAL_LM", 160, 80)


@pytest.fixture(scope="module")
def items(encoding):
    return list(encoding.items(load_examples("descriptions", limit=6)))


def llama(tokenizer):
    return tiny.build("llama", vocab_size=len(tokenizer))


def gpt2(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=200, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def test_a_packed_row(encoding, items):
    batch = encoding.collator(packing=True)(items)
    lengths = [len(item["input_ids"]) for item in items]
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (1, sum(lengths))
    )
    assert batch["position_ids"][0].tolist() == [i for length in lengths for i in range(length)]
    assert batch["labels"].ne(-100).sum() == sum(
        label != -100 for item in items for label in item["labels"]
    )


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("prefix", [False, True])
def test_packed_items_see_themselves_and_the_prefix(encoding, items, build, prefix):
    """Loss and gradients of the padded batch, without its padding."""
    model = build(encoding.tokenizer)
    model.config.use_cache = False  # as a Trainer sets it
    if prefix:
        model = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=5))
    found = []
    for packing in (False, True):
        model.zero_grad()
        batch = encoding.collator(packing=packing)(copy.deepcopy(items))
        loss = model(**batch).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (padded, one), (packed, other) = found
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert one.keys() == other.keys()
    assert one
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_trainer_takes_the_same_steps_packed(encoding, items, prefix, tmp_path):
    losses = []
    for packing in (False, True):
        model = llama(encoding.tokenizer)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        kind = Trainer
        if prefix:
            torch.manual_seed(0)
            model = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=5))
            kind = PrefixTrainer
        trainer = kind(
            model, arguments, train_dataset=items, data_collator=encoding.collator(packing=packing)
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 3


def test_what_cannot_be_packed(encoding, items):
    with pytest.raises(ValueError, match="packing: got True for SEQ_CLS, takes it for CAUSAL_LM"):
        Encoding("bbc", encoding.tokenizer, "SEQ_CLS").collator(packing=True)
    with pytest.raises(TypeError, match="packing: got 'yes'"):
        encoding.collator(packing="yes")
    prompt = PromptTuningModel(llama(encoding.tokenizer), PromptConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="got packed sequences"):
        prompt(**encoding.collator(packing=True)(items))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"name : n{i}||It is n{i}.\n" for i in range(40)))
    return {"train": path, "validation": path}


def read(items):
    return [tuple(item["input_ids"]) for item in items]


def test_a_stream_has_every_item_once_in_an_order_that_each_pass_changes(encoding, file):
    whole = read(encoding.items(load_examples("descriptions", data_files=file)))
    stream = StreamedItems(encoding, data_files=file, buffer_size=10)
    first = read(stream)
    assert sorted(first) == sorted(whole)
    assert first != whole
    assert read(stream) == first
    stream.set_epoch(1)
    assert sorted(read(stream)) == sorted(whole)
    assert read(stream) not in (first, whole)
    assert read(StreamedItems(encoding, data_files=file, buffer_size=1)) == whole
    # far from where it stands in the file
    assert read(StreamedItems(encoding, data_files=file)).index(whole[0]) > 0


def test_workers_share_a_stream(encoding, file):
    stream = StreamedItems(encoding, data_files=file, buffer_size=4)
    loaded = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=dict)
    assert sorted(read(loaded)) == sorted(read(stream))


def test_a_trainer_reads_a_stream(encoding, file, tmp_path):
    model = PrefixTuningModel(llama(encoding.tokenizer), PrefixConfig(num_virtual_tokens=2))
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    stream = StreamedItems(encoding, data_files=file)
    trainer = PrefixTrainer(
        model, arguments, train_dataset=stream, data_collator=encoding.collator()
    )
    trainer.train()  # more than two passes over the data
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0]


def test_an_empty_stream(encoding, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    stream = StreamedItems(encoding, data_files={"train": tmp_path / "none.txt"})
    with pytest.raises(ValueError, match="split: train of descriptions has no examples"):
        next(iter(stream))


def test_a_stream_reads_no_more_than_it_needs(encoding, tmp_path):
    """A mistake behind the buffer is not met yet."""
    path = tmp_path / "rows.jsonl"
    row = '{"sentence": "a fine film", "label": 1}\n'
    path.write_text(row * 3000 + '{"sentence": "", "label": 1}\n')
    encoding = Encoding("sst2", encoding.tokenizer, "SEQ_CLS")
    files = {"train": path, "validation": path}
    stream = iter(StreamedItems(encoding, data_files=files, buffer_size=100))
    assert next(stream)["labels"] == 1
    with pytest.raises(ValueError, match="row 3001: sentence: got an empty text"):
        list(stream)


def test_a_task_of_ones_own_goes_wherever_a_name_goes(encoding, file):
    task = encoding.task
    assert load_examples(task, data_files=file) == load_examples("descriptions", data_files=file)
    assert Encoding("descriptions", encoding.tokenizer, "CAUSAL_LM").task is task
    assert isinstance(load_examples(task, "test")[0], WrittenText)
