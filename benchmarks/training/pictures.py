"""The comparison as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plan import METHODS, Method
from .report import Comparison

_COLOURS = {
    "prefix": "tab:blue",
    "prompt": "tab:orange",
    "lora": "tab:green",
    "bottleneck": "tab:olive",
    "bitfit": "tab:purple",
    "full": "tab:red",
    "head": "tab:gray",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _lengths(c: Comparison) -> list[Method]:
    """Direct prefixes that differ in length alone, shortest first."""
    chosen = [
        method
        for method in METHODS[c.task]
        if method.name in c.rates
        and method.kind == "prefix"
        and set(method.options) == {"num_virtual_tokens"}
        and method.train_size is None
    ]
    return sorted(chosen, key=lambda method: method.options["num_virtual_tokens"])


def _trained(c: Comparison) -> list[Method]:
    """Methods that learn from all the records, the worst first."""
    chosen = [
        method
        for method in METHODS[c.task]
        if method.name in c.rates and method.kind != "none" and not method.train_size
    ]
    return sorted(chosen, key=lambda m: c.figure(m.name, "test_loss").mean, reverse=True)


def compared(comparisons: Sequence[Comparison], file: Path) -> None:
    """Held-out loss of each method, a line for each, for each task; and by a prefix's length."""
    rows = [_trained(c) for c in comparisons]
    figure = _pyplot().figure(figsize=(13, 5.6), constrained_layout=True)
    # The first task beside all others, which share a column with the lengths.
    left, right = figure.add_gridspec(1, 2)
    below = right.subgridspec(len(rows), 1, height_ratios=[*map(len, rows[1:]), 6])
    places = [left, *(below[i] for i in range(len(rows)))]
    for c, methods, place in zip(comparisons, rows, places, strict=False):
        ax = figure.add_subplot(place)
        for row, method in enumerate(methods):
            loss = c.figure(method.name, "test_loss")
            colour = _COLOURS[method.kind]
            ax.errorbar(loss.mean, row, xerr=loss.spread, fmt="o", color=colour, capsize=2)
        titles = [f"{m.title}  ({_short(c.of(m.name)[0]['stored'])})" for m in methods]
        ax.set_yticks(range(len(methods)), titles, fontsize=8)
        ax.set(xlabel="held-out loss", title=f"{c.task}: method (numbers stored)")
        ax.grid(axis="y", alpha=0.3)
    c, ax = comparisons[0], figure.add_subplot(places[-1])
    methods = _lengths(c)
    losses = [c.figure(method.name, "test_loss") for method in methods]
    ax.errorbar(
        [method.options["num_virtual_tokens"] for method in methods],
        [loss.mean for loss in losses],
        [loss.spread for loss in losses],
        fmt="o-",
        color=_COLOURS["prefix"],
        capsize=2,
    )
    ax.set(xlabel="prefix length", ylabel="held-out loss", title=f"{c.task}: direct prefix")
    figure.savefig(file, dpi=120)


def _short(count: int) -> str:
    """230,400 as 230 K."""
    for size, letter in ((10**6, "M"), (10**3, "K")):
        if count >= size:
            number = count / size
            return f"{number:.1f} {letter}" if number < 10 else f"{number:.0f} {letter}"
    return str(count)


def stability(c: Comparison, file: Path) -> None:
    """The training loss of every step, seed and rate, direct beside the MLP."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(10.4, 4.0), constrained_layout=True)
    for ax, name in zip(axes, ("prefix", "prefix-mlp2"), strict=True):
        method = next(m for m in METHODS[c.task] if m.name == name)
        for colour, rate in enumerate(method.rates):
            runs = [r for r in c.results if r["method"] == name and r["learning_rate"] == rate]
            for i, run in enumerate(runs):
                label = f"rate {rate:g}" if i == 0 else None
                ax.plot(_smooth(run), color=f"C{colour}", lw=1, alpha=0.8, label=label)
        ax.set(title=method.title, xlabel="step", ylabel="training loss, mean of 5 steps")
        ax.legend(fontsize=8)
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
    figure.savefig(file, dpi=120)


def _smooth(run: Mapping[str, Any], window: int = 5) -> list[float]:
    losses = run["train_losses"]
    return [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
