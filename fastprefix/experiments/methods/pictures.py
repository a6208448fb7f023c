"""The comparison as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprefix.experiments.methods.plan import METHODS, Method
from fastprefix.experiments.methods.report import Comparison

_COLOURS = {
    "prefix": "tab:blue",
    "prompt": "tab:orange",
    "lora": "tab:green",
    "bottleneck": "tab:olive",
    "bitfit": "tab:purple",
    "full": "tab:red",
    "head": "tab:gray",
}


def _figure(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(5.2 * columns, height * rows), constrained_layout=True
    )


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


def compared(comparisons: Sequence[Comparison], file: Path) -> None:
    """Held-out loss by what must be stored, for each task, and by the length of a prefix."""
    figure, axes = _figure(1, len(comparisons) + 1, 4.2)
    for c, ax in zip(comparisons, axes, strict=False):
        for method in METHODS[c.task]:
            if method.name not in c.rates or method.kind == "none" or method.train_size:
                continue
            one, loss = c.of(method.name)[0], c.figure(method.name, "test_loss")
            ax.errorbar(one["stored"], loss.mean, loss.spread, fmt="o", color=_COLOURS[method.kind])
            ax.annotate(
                method.title,
                (one["stored"], loss.mean),
                fontsize=6,
                xytext=(4, 3),
                textcoords="offset points",
            )
        ax.set(xscale="log", xlabel="numbers stored for the task", ylabel="held-out loss")
        ax.set_title(c.task)
        ax.margins(x=0.25)
    c, ax = comparisons[0], axes[-1]
    methods = _lengths(c)
    losses = [c.figure(method.name, "test_loss") for method in methods]
    ax.errorbar(
        [method.options["num_virtual_tokens"] for method in methods],
        [loss.mean for loss in losses],
        [loss.spread for loss in losses],
        fmt="o-",
        color=_COLOURS["prefix"],
    )
    ax.set(xlabel="prefix length", ylabel="held-out loss", title=f"{c.task}: direct prefix")
    figure.savefig(file, dpi=120)


def stability(c: Comparison, file: Path) -> None:
    """The training loss of every step, seed and rate, direct beside the MLP."""
    figure, axes = _figure(1, 2, 4.0)
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
