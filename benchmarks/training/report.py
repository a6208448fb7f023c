"""The comparison as tables, and what it says of the literature's claims."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import BUDGETS, METHODS, TaskName

Costs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and how far the farthest seed lies from it."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        """Of at least one value."""
        values = list(values)
        mean = statistics.fmean(values)
        return cls(mean, max(abs(value - mean) for value in values), len(values))

    def show(self, digits: int) -> str:
        """Mean, and ± spread where there is more than one seed."""
        around = f" ± {self.spread:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{around}"


@dataclass(frozen=True)
class Comparison:
    """A task's results.

    Attributes:
        task: its name.
        results: of all runs, as :func:`training.train.train` returns them.
        rates: the learning rate of each method.
        costs: seconds and megabytes of a training step, by method.
    """

    task: TaskName
    results: Sequence[Mapping[str, Any]]
    rates: Mapping[str, float]
    costs: Costs

    def of(self, method: str) -> list[Mapping[str, Any]]:
        """A method's runs at its learning rate."""
        rate = self.rates[method]
        return [r for r in self.results if r["method"] == method and r["learning_rate"] == rate]

    def figure(self, method: str, what: str) -> Figure:
        """`what` of a method over its seeds."""
        return Figure.of(result[what] for result in self.of(method))

    @property
    def score(self) -> tuple[str, str]:
        """The key of the task's score, and its title."""
        return ("bleu", "BLEU") if self.task == "e2e" else ("accuracy", "accuracy, %")


def table(c: Comparison, titles: bool = True) -> str:
    """A line for each method."""
    key, title = c.score
    lines = [
        f"| method | rate | held-out loss | {title} | trained | stored | bytes | step, s | "
        "step's memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS[c.task]:
        if method.name not in c.rates:
            continue
        one = c.of(method.name)[0]
        seconds, megabytes = (
            f"{c.costs[what][method.name]:.{digits}f}" if method.name in c.costs[what] else "–"
            for what, digits in (("seconds", 2), ("megabytes", 0))
        )
        rate = f"{c.rates[method.name]:g}" if one["trainable"] else "–"
        lines.append(
            f"| {method.title} | {rate} | "
            f"{c.figure(method.name, 'test_loss').show(3)} | "
            f"{c.figure(method.name, key).show(1)} | {one['trainable']:,d} | {one['stored']:,d} | "
            f"{one['bytes']:,d} | {seconds} | {megabytes} |"
        )
    return "\n".join(lines)


def rates_table(c: Comparison) -> str:
    """Loss on the part by which learning rates are chosen, at every rate that was tried."""
    lines = ["| method | rate: loss |", "|---|---|"]
    for method in METHODS[c.task]:
        if len(method.rates) < 2:
            continue
        cells = []
        for rate in method.rates:
            losses = [
                r["dev_loss"]
                for r in c.results
                if r["method"] == method.name and r["learning_rate"] == rate
            ]
            shown = f"{rate:g}: {Figure.of(losses).show(3)}"
            cells.append(f"**{shown}**" if rate == c.rates[method.name] else shown)
        lines.append(f"| {method.title} | {', '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Claim:
    """What papers say, and what is seen here.

    Attributes:
        claim: with its source.
        verdict: "holds here", "not decided" or "does not hold here".
        evidence: the figures.
    """

    claim: str
    verdict: str
    evidence: str


def _smaller(a: Figure, b: Figure) -> str:
    """Whether a is below b, by more than the seeds of either vary."""
    gap = b.mean - a.mean
    if abs(gap) <= max(a.spread, b.spread):
        return "not decided"
    return "holds here" if gap > 0 else "does not hold here"


def _all(*verdicts: str) -> str:
    worst = ("does not hold here", "not decided", "holds here")
    return min(verdicts, key=worst.index)


def claims(c: Comparison) -> list[Claim]:
    """Four claims of the literature, on E2E."""
    loss = {name: c.figure(name, "test_loss") for name in c.rates}

    def said(*names: str) -> str:
        titles = {method.name: method.title for method in METHODS[c.task]}
        return "; ".join(f"{titles[name]}: {loss[name].show(3)}" for name in names)

    start = c.figure("none", "dev_loss").mean
    stable = {name: _stability(c, name, start) for name in ("prefix", "prefix-mlp2")}
    direct, mlp = stable["prefix"], stable["prefix-mlp2"]
    gain = direct.gap - mlp.gap
    clear = abs(gain) > max(direct.spread, mlp.spread)
    gains = (direct.worse - mlp.worse, gain if clear else 0.0)
    if min(gains) < 0 < max(gains) or gains == (0, 0):
        helps = "not decided"
    else:
        helps = "holds here" if min(gains) >= 0 else "does not hold here"
    return [
        Claim(
            "A prefix in every layer beats virtual tokens in the embeddings alone (Li and Liang "
            "2021, section 7.2)",
            _all(
                _smaller(loss["prefix"], loss["embedding"]),
                _smaller(loss["prefix"], loss["prompt"]),
            ),
            said("prefix", "embedding", "prompt"),
        ),
        Claim(
            "In front of the text is better than within it (Li and Liang 2021, section 7.3)",
            _all(_smaller(loss["prompt"], loss["infix"]), _smaller(loss["prefix"], loss["infix"])),
            said("prompt", "infix", "prefix"),
        ),
        Claim(
            "An MLP makes training stable (Li and Liang 2021, section 4.3)",
            helps,
            "; ".join(
                f"{title}: {found.worse} of {len(_runs(c, name))} runs (three rates, three seeds) "
                f"ended above the untuned model's {start:.2f}, the worst rate's mean loss lies "
                f"{found.gap:.2f} above the best's, seeds up to {found.spread:.2f} from the mean"
                for (name, found), title in zip(
                    stable.items(), ("direct", "MLP of 2 layers"), strict=True
                )
            ),
        ),
        Claim(
            "With little data a start from a text beats a random one (Li and Liang 2021, section "
            "7.4)",
            _smaller(loss["small-text"], loss["small-random"]),
            said("small-text", "small-random", "prefix-text", "prefix"),
        ),
    ]


def _runs(c: Comparison, method: str) -> list[Mapping[str, Any]]:
    return [result for result in c.results if result["method"] == method]


@dataclass(frozen=True)
class _Stability:
    """A method's runs at all rates with all seeds, by held-out loss.

    Attributes:
        worse: how many ended worse than they would have begun.
        gap: the worst rate's mean less the best's.
        spread: how far any seed lies from its rate's mean.
    """

    worse: int
    gap: float
    spread: float


def _stability(c: Comparison, method: str, start: float) -> _Stability:
    by_rate: dict[float, list[float]] = {}
    for result in _runs(c, method):
        by_rate.setdefault(result["learning_rate"], []).append(result["dev_loss"])
    figures = [Figure.of(losses) for losses in by_rate.values()]
    means = [figure.mean for figure in figures]
    return _Stability(
        worse=sum(not result["dev_loss"] < start for result in _runs(c, method)),
        gap=max(means) - min(means),
        spread=max(figure.spread for figure in figures),
    )


def report(comparisons: Sequence[Comparison], about: Mapping[str, str]) -> str:
    """All of it in Markdown; the pictures are beside it."""
    by_task = {c.task: c for c in comparisons}
    lines = [
        "# Methods compared",
        "",
        f"Written by `{about['command']}`: {about['where']}.",
        "",
        "Every method gets the same budget, once for each seed: AdamW without weight decay, "
        "linear schedule, a tenth of the steps to warm up, gradients clipped to 1; on E2E "
        "bfloat16, but float32 for what is trained. Learning rates are chosen from those listed "
        "by the loss on held-out examples that are not reported, with the first seed or, for "
        "the direct prefix and the MLP of 2 layers on E2E, the mean of all; methods without a "
        "list take that of their nearest relative. Where the best is the first or the last of a "
        "list, a better one may lie beyond. ± is the farthest of the seeds: three, two for "
        "embeddings alone, infix and little data; no ±, one seed. Trained counts a classifier's "
        "head, stored is what a task needs beside the base. A step's seconds are medians on all "
        "cores, of all methods in turn and back in one process; its memory is the peak above "
        "the loaded model.",
    ]
    for task, title in (
        ("e2e", "E2E: attributes to a sentence, SmolLM2-135M-Instruct"),
        ("news", "BBC news: five classes, MiniLM-L6"),
    ):
        if task not in by_task:
            continue
        c, b = by_task[task], BUDGETS[task]
        lines += [
            "",
            f"## {title}",
            "",
            f"{b.steps} steps of {b.batch_size}, out of {b.train_size} examples; {b.dev_size} to "
            f"choose by, {b.test_size} reported.",
            "",
            table(c),
            "",
            rates_table(c),
        ]
        if task == "e2e":
            lines += [
                "",
                "SmolLM2 has no biases, so BitFit has nothing to train there.",
                "",
                "![Loss of every method with what it stores, and by prefix length](methods.png)",
                "",
                "## What the literature claims",
                "",
                '"Not decided" where the difference is within what seeds vary.',
                "",
            ]
            lines += [f"- {x.claim}: **{x.verdict}**. {x.evidence}." for x in claims(c)]
            lines += ["", "![Training curves, direct and through an MLP](stability.png)"]
    return "\n".join(lines) + "\n"
