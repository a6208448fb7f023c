"""The figures that papers report, from the libraries that papers use.

scikit-learn gives accuracy and F1, sacrebleu BLEU and chrF, rouge-score ROUGE. The rules of SQuAD
are its own, written out here: they are twenty lines.
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType

from fastprefix.arguments import nearest, refuses_unknown_arguments

References = Sequence[Sequence[str]]

# By the beginning of a metric's name: the module that computes it, and the package to install.
_LIBRARIES = {
    "accuracy": ("sklearn.metrics", "scikit-learn"),
    "f1": ("sklearn.metrics", "scikit-learn"),
    "bleu": ("sacrebleu.metrics", "sacrebleu"),
    "chrf": ("sacrebleu.metrics", "sacrebleu"),
    "rouge": ("rouge_score.rouge_scorer", "rouge-score"),
}


@refuses_unknown_arguments
def classification_scores(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """``accuracy`` and ``f1``, the mean of the classes' F1, from 0 to 1.

    Args:
        predicted: the class of each example that a model chose.
        labels: the right one.

    Raises:
        ValueError: none, or not equally many.
        ImportError: scikit-learn is not installed.
    """
    _check(predicted, labels)
    metrics = _needs(*_LIBRARIES["accuracy"])
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }


@refuses_unknown_arguments
def text_scores(
    texts: Sequence[str], references: References, names: Sequence[str]
) -> dict[str, float]:
    """Scores of written texts, each against one or several references.

    Args:
        texts: what a model wrote.
        references: the acceptable texts of each; several count as in the score's own definition.
        names: keys of :data:`TEXT_METRICS`.

    Raises:
        ValueError: no texts, not equally many references, a text without a reference, or a name
            that is not there.
        ImportError: the library of a score is not installed.
    """
    _check(texts, references)
    for i, some in enumerate(references):
        if not some:
            raise ValueError(f"references: got none for text {i}, takes at least one")
    for name in names:
        if name not in TEXT_METRICS:
            near = nearest(name, TEXT_METRICS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"names: got {name!r}, takes some of {list(TEXT_METRICS)}{hint}")
    return {name: TEXT_METRICS[name](texts, references) for name in names}


@refuses_unknown_arguments
def perplexity(loss: float) -> float:
    """The exponential of a mean cross entropy in nats; infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _check(got: Sequence[object], wanted: Sequence[object]) -> None:
    if not got or len(got) != len(wanted):
        raise ValueError(f"got {len(got)} predictions and {len(wanted)} references")


def _sacrebleu(name: str) -> Callable[[Sequence[str], References], float]:
    def score(texts: Sequence[str], references: References) -> float:
        metric = getattr(_needs(*_LIBRARIES["bleu"]), name)()
        # one list for the first references, one for the second ones, ...; None where there is none
        most = max(map(len, references))
        columns = [[some[i] if i < len(some) else None for some in references] for i in range(most)]
        return float(metric.corpus_score(list(texts), columns).score)

    return score


def _rouge(kind: str) -> Callable[[Sequence[str], References], float]:
    def score(texts: Sequence[str], references: References) -> float:
        module = _needs(*_LIBRARIES["rouge"])
        scorer = module.RougeScorer([kind], use_stemmer=True)
        best = [
            scorer.score_multi(list(some), text)[kind].fmeasure
            for text, some in zip(texts, references, strict=True)
        ]
        return 100 * sum(best) / len(best)

    return score


def _squad(score: Callable[[str, str], float]) -> Callable[[Sequence[str], References], float]:
    def mean(texts: Sequence[str], references: References) -> float:
        best = [
            max(score(text, reference) for reference in some)
            for text, some in zip(texts, references, strict=True)
        ]
        return 100 * sum(best) / len(best)

    return mean


def normalized_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation and articles.

    From the evaluation script of SQuAD 1.1 (Rajpurkar et al., 2016, arXiv:1606.05250).
    """
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _exact(text: str, reference: str) -> float:
    return float(normalized_answer(text) == normalized_answer(reference))


def _token_f1(text: str, reference: str) -> float:
    got, wanted = normalized_answer(text).split(), normalized_answer(reference).split()
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


# From 0 to 100, as papers print them.
TEXT_METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "bleu": _sacrebleu("BLEU"),
    "chrf": _sacrebleu("CHRF"),
    "rouge_1": _rouge("rouge1"),
    "rouge_2": _rouge("rouge2"),
    "rouge_l": _rouge("rougeL"),
    "rouge_lsum": _rouge("rougeLsum"),  # of texts with a sentence a line, as for CNN/DailyMail
    "squad_em": _squad(_exact),
    "squad_f1": _squad(_token_f1),
}


def _needs(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this metric needs the package {package} (pip install {package}, or fastprefix[tasks])"
        ) from error


def check_installed(names: Sequence[str]) -> None:
    """Refuses metrics whose library is missing, before the work that they would measure.

    Args:
        names: of metrics; those without a library are skipped.

    Raises:
        ImportError: a library is not installed; the message names its package.
    """
    for name in names:
        for start, library in _LIBRARIES.items():
            if name.startswith(start):
                _needs(*library)
