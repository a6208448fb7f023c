"""The results as a table, short and long, and as a picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from compat.capabilities import CAPABILITIES
from compat.cells import Cell

BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
SYMBOLS = {"passes": "✓", "wrong": "**✗**", "refused": "R", "does not apply": "–"}


def short_table(cells: list[Cell], versions: dict[str, str]) -> str:
    """A line for each capability: on how many architectures it passes, is wrong, is refused."""
    libraries = _ordered(cell.library for cell in cells)
    lines = [
        "| | " + " | ".join(f"{name} {versions[name]}" for name in libraries) + " |",
        "|---|" + "---|" * len(libraries),
    ]
    for key in _ordered(cell.capability for cell in cells):
        row = [CAPABILITIES[key].title]
        for library in libraries:
            counts = Counter(
                cell.status for cell in cells if cell.capability == key and cell.library == library
            )
            row.append(_counted(counts))
        lines.append("| " + " | ".join(row) + " |")
    total = [_counted(Counter(c.status for c in cells if c.library == name)) for name in libraries]
    lines.append("| **all** | " + " | ".join(total) + " |")
    return "\n".join(lines)


def _counted(counts: Counter[str]) -> str:
    applies = counts["passes"] + counts["wrong"] + counts["refused"]
    if not applies:
        return "–"
    parts = [f"{counts['passes']} of {applies}"]
    if counts["wrong"]:
        parts.append(f"**{counts['wrong']} wrong**")
    if counts["refused"]:
        parts.append(f"{counts['refused']} refused")
    return ", ".join(parts)


def long_report(cells: list[Cell], versions: dict[str, str], short: str) -> str:
    """The short table, one of all cells for each library, and why cells do not pass."""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    architectures = _ordered(cell.architecture for cell in cells)
    keys = _ordered(cell.capability for cell in cells)
    by_place = {(c.library, c.architecture, c.capability): c for c in cells}
    lines = [
        "# Compatibility",
        "",
        f"Written by `python benchmarks/compatibility.py` with {packages}. Tiny random models on a "
        "CPU; every cell is checked against plain transformers, one unpadded row at a time, with "
        "the prefix concatenated.",
        "",
        short,
        "",
    ]
    for library in _ordered(cell.library for cell in cells):
        lines += [
            f"## {library} {versions[library]}",
            "",
            "✓ right, **✗** a result came back and was wrong, R refused (an error), – does not "
            "apply.",
            "",
            "| | " + " | ".join(key.replace("_", " ") for key in keys) + " |",
            "|---|" + ":-:|" * len(keys),
        ]
        for name in architectures:
            marks = [SYMBOLS[by_place[library, name, key].status] for key in keys]
            lines.append(f"| {name} | " + " | ".join(marks) + " |")
        lines += ["", *_reasons([cell for cell in cells if cell.library == library])]
    return "\n".join(lines).rstrip() + "\n"


def _reasons(cells: list[Cell]) -> list[str]:
    lines = []
    for status, title in (
        ("wrong", "Wrong"),
        ("refused", "Refused"),
        ("does not apply", "Does not apply, for the bare model does not do it without a prefix"),
    ):
        same: dict[tuple[str, str], list[str]] = defaultdict(list)
        for cell in cells:
            family = CAPABILITIES[cell.capability].why_not  # goes without saying
            if cell.status == status and not (family and cell.message == family):
                same[CAPABILITIES[cell.capability].title, _stable(cell)].append(cell.architecture)
        if same:
            lines += [f"{title}:", ""]
            lines += [
                f"- {capability}: {', '.join(names)}" + (f": `{message}`" if message else "")
                for (capability, message), names in same.items()
            ]
            lines.append("")
    notes: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        if cell.note and cell.status != "does not apply":
            label = f"{cell.architecture} ({CAPABILITIES[cell.capability].title})"
            notes[cell.note].append(label)
    if notes:
        lines += ["How it got this far:", ""]
        lines += [f"- {note}: {', '.join(_shortened(names))}" for note, names in notes.items()]
        lines.append("")
    return lines


def _stable(cell: Cell) -> str:
    """Errors of one kind on one line: the numbers are in the JSON."""
    message = cell.message.replace("`", "'").replace("|", "/").removeprefix("the bare model: ")
    return "" if cell.status == "wrong" and message.startswith("relative error") else message


def _shortened(names: list[str], most: int = 6) -> list[str]:
    return names if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]


def insert(page: Path, text: str) -> None:
    """Replaces what stands between the two marker comments.

    Raises:
        ValueError: the file does not have each marker once, in order.
    """
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{page}: takes {BEGIN} and then {END}, each once")
    head, tail = old.split(BEGIN)[0], old.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def picture(cells: list[Cell], versions: dict[str, str], file: Path) -> None:
    """A heat map: architectures by capabilities, a panel for each library."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    libraries = _ordered(cell.library for cell in cells)
    architectures = _ordered(cell.architecture for cell in cells)
    keys = _ordered(cell.capability for cell in cells)
    colours = {
        "passes": "#3a9d5d",
        "wrong": "#c8102e",
        "refused": "#f2b134",
        "does not apply": "#ececec",
    }
    codes = {status: code for code, status in enumerate(colours)}
    figure, axes = plt.subplots(
        1,
        len(libraries),
        figsize=(2.4 + 0.24 * len(keys) * len(libraries), 2.6 + 0.22 * len(architectures)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, library in zip(axes[0], libraries, strict=True):
        status = {
            (c.architecture, c.capability): codes[c.status] for c in cells if c.library == library
        }
        values = [[status[name, key] for key in keys] for name in architectures]
        axis.imshow(values, cmap=ListedColormap(list(colours.values())), vmin=0, vmax=3)
        axis.set_title(f"{library} {versions[library]}")
        axis.set_xticks(range(len(keys)), [CAPABILITIES[key].title for key in keys], rotation=90)
        axis.set_yticks(range(len(architectures)), architectures)
        axis.set_xticks([x - 0.5 for x in range(1, len(keys))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(architectures))], minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="both", length=0, labelsize=7)
    names = {"wrong": "wrong result, no error", "refused": "error"}
    figure.legend(
        handles=[Patch(color=colour, label=names.get(s, s)) for s, colour in colours.items()],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(file, dpi=110)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
