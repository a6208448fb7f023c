"""The walk as a page: counts for each way, what is wrong, every class, and why not."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from walk.judge import Cell

TITLES = {
    "causal": "Causal language models",
    "image-text": "Models of images and text",
    "seq2seq": "Encoder-decoders",
    "masked": "Masked language models",
    "classification": "Classifiers",
    "answering": "Question answering",
}
MARKS = {
    "right": "✓",
    "expanded": "✓ₑ",
    "refused": "R",
    "wrong": "**✗**",
    "crash": "**!**",
    "n/a": "–",
    "blind": "?",
}
MEANINGS = (
    '✓ right, ✓ₑ right with `fallback="expand"` alone, R refused with a reason, **✗** a result '
    "came back and was not right, **!** an error that nobody meant to raise where the plain model "
    "works, – does not apply (the plain model does not do it, or is not built), ? no check here "
    "could fail."
)


def page(cells: list[Cell], versions: dict[str, str]) -> str:
    """The whole page."""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    classes = {cell.name for cell in cells}
    absent = {cell.name for cell in cells if cell.message.startswith("not built")}
    lines = [
        "# Every model class of transformers",
        "",
        f"Written by `python benchmarks/compatibility.py --all` with {packages}. "
        f"{len(classes)} classes are listed by transformers' auto classes, {len(absent)} of them "
        "cannot be built small here. Each is a tiny random model in float32 on a CPU, judged "
        "against plain transformers: a prompt against one sequence, a learned prefix against the "
        "same numbers in a cache, or in front of each layer's keys where no cache is.",
        "",
        MEANINGS,
        "",
    ]
    for task in _ordered(cell.task for cell in cells):
        mine = [cell for cell in cells if cell.task == task]
        lines += [f"## {TITLES[task]}", "", *_counts(mine), ""]
    lines += _bad(cells)
    for task in _ordered(cell.task for cell in cells):
        mine = [cell for cell in cells if cell.task == task]
        lines += [f"## {TITLES[task]}, each", "", *_table(mine), "", *_reasons(mine)]
    return "\n".join(lines).rstrip() + "\n"


def _counts(cells: list[Cell]) -> list[str]:
    shown = [s for s in MARKS if any(cell.status == s for cell in cells)]
    lines = ["| | " + " | ".join(shown) + " |", "|---|" + "--:|" * len(shown)]
    for way in _ordered(cell.way for cell in cells):
        counts = Counter(cell.status for cell in cells if cell.way == way)
        lines.append(f"| {way} | " + " | ".join(str(counts[s] or "") for s in shown) + " |")
    return lines


def _table(cells: list[Cell]) -> list[str]:
    ways = _ordered(cell.way for cell in cells)
    lines = ["| | " + " | ".join(ways) + " |", "|---|" + ":-:|" * len(ways)]
    for name in _ordered(cell.name for cell in cells):
        marks = {cell.way: MARKS[cell.status] for cell in cells if cell.name == name}
        lines.append(f"| {name} | " + " | ".join(marks.get(way, "") for way in ways) + " |")
    return lines


def _bad(cells: list[Cell]) -> list[str]:
    """Wrong and crash, each by itself: there should be none."""
    lines = []
    for status, title in (("wrong", "Wrong"), ("crash", "Errors that nobody meant to raise")):
        found = [cell for cell in cells if cell.status == status]
        if found:
            lines += [f"## {title}", ""]
            lines += [f"- {cell.name}, {cell.way}: {_inline(cell.message)}" for cell in found]
            lines.append("")
    return lines


def _reasons(cells: list[Cell]) -> list[str]:
    lines = []
    for status, title in (
        ("refused", "Refused"),
        ("expanded", "Right with the fallback alone, which the model needs since"),
        ("n/a", "Does not apply"),
        ("blind", "No check could fail"),
    ):
        same: dict[str, dict[str, None]] = defaultdict(dict)
        for cell in cells:
            if cell.status == status:
                same[_stable(cell)][cell.name] = None
        if same:
            lines += [f"{title}:", ""]
            for message, names in sorted(same.items(), key=lambda item: -len(item[1])):
                lines.append(f"- {_inline(message)}: {', '.join(names)}")
            lines.append("")
    return lines


def _stable(cell: Cell) -> str:
    """A reason without the class's own names and numbers, so that the same ones meet."""
    message = cell.message.replace(cell.name, "…")
    return re.sub(r"\b[A-Z]\w+(?:Attention|Decoder|Layer|Encoder|Model)\w*", "…", message)


def _inline(message: str) -> str:
    return "`" + message.replace("`", "'").replace("\n", " ") + "`"


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
