"""The metrics against their libraries called directly, and against published figures."""

from __future__ import annotations

import math

import pytest

from fastprefix.tasks import classification_scores, perplexity, text_scores
from fastprefix.tasks.metrics import TEXT_METRICS, normalized_answer

# The example of sacrebleu's documentation: its figures are 48.53 and 59.73.
WRITTEN = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
FIRST = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
SECOND = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
BOTH = list(zip(FIRST, SECOND, strict=True))


def test_published_figures_of_bleu_and_chrf():
    pytest.importorskip("sacrebleu")
    scores = text_scores(WRITTEN, BOTH, ["bleu", "chrf"])
    assert scores == pytest.approx({"bleu": 48.530827, "chrf": 59.73}, abs=0.005)


def test_references_may_be_more_for_one_text_than_for_another():
    sacrebleu = pytest.importorskip("sacrebleu")
    references = [BOTH[0], FIRST[1:2], (*BOTH[2], "He was bitten.")]
    columns = [FIRST, [SECOND[0], None, SECOND[2]], [None, None, "He was bitten."]]
    found = text_scores(WRITTEN, references, ["bleu", "chrf"])
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(WRITTEN, columns).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(WRITTEN, columns).score)
    # neither the order of the references nor that of the texts counts
    other = [tuple(reversed(some)) for some in reversed(references)]
    assert text_scores(WRITTEN[::-1], other, ["bleu"])["bleu"] == pytest.approx(found["bleu"])
    assert text_scores(WRITTEN, [(one,) for one in FIRST], ["bleu"])["bleu"] < found["bleu"]


def test_published_figures_of_rouge():
    """The example of rouge-score's documentation; the best of several references counts."""
    pytest.importorskip("rouge_score")
    text, reference = (
        "The quick brown dog jumps on the log.",
        "The quick brown fox jumps over the lazy dog",
    )
    scores = text_scores([text], [[reference]], ["rouge_1", "rouge_l"])
    assert scores == pytest.approx({"rouge_1": 100 * 12 / 17, "rouge_l": 100 * 10 / 17})
    best = text_scores([text, text], [[reference, text], [reference]], ["rouge_l"])["rouge_l"]
    assert best == pytest.approx((100 + 100 * 10 / 17) / 2)


def test_rouge_of_summaries_goes_sentence_by_sentence():
    pytest.importorskip("rouge_score")
    lines = ["The cat sat on the mat.\nA dog ran by."], [["A dog ran by.\nThe cat sat on the mat."]]
    found = text_scores(*lines, ["rouge_l", "rouge_lsum"])
    assert found["rouge_lsum"] == pytest.approx(100)
    assert found["rouge_l"] < 70


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("the Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "Panthers"], 0, 2 / 3),
        ("a  Santa Clara, California", ["Santa Clara"], 0, 2 * 2 / (3 + 2)),
        ("Levi's Stadium in Santa Clara", ["Levis Stadium"], 0, 2 * 2 / (5 + 2)),
        ("gold gold", ["gold"], 0, 2 * 1 / (2 + 1)),
        ("black", ["gold"], 0, 0),
        ("", ["gold"], 0, 0),
    ],
)
def test_rules_of_squad(text, answers, exact, f1):
    """Lower case, without punctuation and articles; F1 over the words, the best answer counts."""
    found = text_scores([text, "x"], [answers, ["x"]], ["squad_em", "squad_f1"])
    assert found == pytest.approx({"squad_em": 50 * (exact + 1), "squad_f1": 50 * (f1 + 1)})


def test_what_squad_compares():
    assert normalized_answer(" The  cat's\tMEOW, an another! ") == "cats meow another"


def test_classes():
    pytest.importorskip("sklearn")
    # class 0: 2 of 3 found, none wrong, F1 0.8; class 1: 1 of 1 and one wrong, 2/3; class 2: 0
    found = classification_scores([0, 0, 1, 1, 0], [0, 0, 0, 1, 2])
    f1 = (2 * 2 / (3 + 3) + 2 * 1 / (2 + 1) + 0) / 3
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": f1})


def test_perplexity():
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert perplexity(1e4) == math.inf


def test_wrong_inputs():
    with pytest.raises(ValueError, match="got 0 predictions and 0 references"):
        classification_scores([], [])
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        text_scores(["a"], [["a"], ["b"]], ["squad_em"])
    with pytest.raises(ValueError, match="references: got none for text 1"):
        text_scores(["a", "b"], [["a"], []], ["squad_em"])
    with pytest.raises(ValueError, match=r"names: got 'blue', takes some of .*did you mean 'bleu'"):
        text_scores(["a"], [["a"]], ["blue"])


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_every_metric_goes_from_nothing_to_a_hundred(name):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    same = "the old house near the river has four rooms"
    assert text_scores([same], [["zzz", same]], [name])[name] == pytest.approx(100)
    assert text_scores(["qqq"], [["zzz yyy"]], [name])[name] == pytest.approx(0)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"needs the package sacrebleu \(pip install sacrebleu\)"):
        text_scores(["a"], [["a"]], ["bleu"])
