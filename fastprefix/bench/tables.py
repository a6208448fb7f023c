"""Tables of records, each case with its ratio against the best peer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprefix.bench.case import OURS
from fastprefix.bench.train_suite import largest_batch

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
BUDGET = 4 * 10**9  # bytes beyond the weights, for the largest batch
Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One figure of a suite.

    Attributes:
        title: suite and figure.
        columns: their heads, the case first.
        rows: texts.
        notes: what the rows leave out.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]

    def markdown(self) -> str:
        """As a page includes it."""
        lines = [f"**{self.title}**", ""]
        lines.append(f"| {' | '.join(self.columns)} |")
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def median(line: Record, provider: str, figure: str) -> float | None:
    """Milliseconds, or None without a figure."""
    found = line["providers"].get(provider)
    return None if found is None else found["figures"][figure]["median"]


def peers(line: Record) -> list[str]:
    """The providers that are compared with fastprefix: neither our own, nor the bound."""
    return [n for n in line["providers"] if not n.startswith(OURS) and n != line["bound"]]


def best_peer(line: Record, figure: str) -> str | None:
    """The fastest peer, or None if there is none."""
    return min(peers(line), key=lambda name: median(line, name, figure) or 0.0, default=None)


def ratio(line: Record, figure: str) -> float | None:
    """The best peer's time over ours: above 1 where fastprefix is faster."""
    best, ours = best_peer(line, figure), median(line, OURS, figure)
    theirs = best and median(line, best, figure)
    return theirs / ours if theirs and ours else None


def tables(records: Sequence[Record]) -> list[Table]:
    """For each suite and figure a table, in the order of the records."""
    found = []
    for suite in dict.fromkeys(line["suite"] for line in records):
        lines = [line for line in records if line["suite"] == suite]
        for figure, title in lines[0]["figures"].items():
            columns = ["case", "fastprefix", "best peer", "", "ratio"]
            columns += [lines[0]["bound"]] * bool(lines[0]["bound"])
            columns += ["tokens/s"] * any(line["tokens"] for line in lines)
            columns += ["peak MB", "peer's"]
            columns += ["variants"] * any(map(_variants, lines))
            rows = [_row(line, figure, columns) for line in lines]
            last = figure == list(lines[0]["figures"])[-1]
            notes = [*_notes(lines), *_batches(lines)] if last else []
            found.append(Table(f"{suite}: {title}", tuple(columns), rows, notes))
    return found


def _row(line: Record, figure: str, columns: Sequence[str]) -> tuple[str, ...]:
    best, ours, times = best_peer(line, figure), median(line, OURS, figure), ratio(line, figure)
    theirs = best and median(line, best, figure)
    row = [line["case"], _ms(ours), best or "-", _ms(theirs or None)]
    row.append("-" if times is None else f"{times:.2f}x")
    if line["bound"]:
        row.append(_ms(median(line, line["bound"], figure)))
    if "tokens/s" in columns:
        made = line["tokens"].get(figure)
        row.append(f"{1e3 * made / ours:.0f}" if made and ours else "-")
    row += [_mb(line, OURS), _mb(line, best)]
    if "variants" in columns:
        told = (
            f"{name.removeprefix(OURS + ', ')} {_ms(median(line, name, figure))} ms, "
            f"{_mb(line, name)} MB"
            for name in _variants(line)
        )
        row.append("; ".join(told))
    return tuple(row)


def _variants(line: Record) -> list[str]:
    return [name for name in line["providers"] if name.startswith(f"{OURS}, ")]


def _notes(lines: Iterable[Record]) -> list[str]:
    """Who cannot do a case: it does not fit, or the library refuses it."""
    cases: dict[str, list[str]] = {}
    for line in lines:
        for name, why in line["left_out"].items():
            if why.startswith("does not fit") or "Error: " in why:
                cases.setdefault(f"{name}: {why}", []).append(line["case"])
    return [f"{why} ({', '.join(names)})" for why, names in cases.items()]


def _batches(lines: Iterable[Record]) -> list[str]:
    """The largest batch of a training step, where two batches were measured."""
    peaks: dict[tuple[int, int], dict[str, dict[int, int]]] = {}
    for line in lines:
        fields = line["fields"]
        if line["suite"] != "train":
            continue
        here = peaks.setdefault((fields["P"], fields["L"]), {})
        for name, found in line["providers"].items():
            if found.get("peak_bytes") is not None:
                here.setdefault(name, {})[fields["B"]] = found["peak_bytes"]
    notes = []
    for (P, L), here in peaks.items():
        told = ((name, largest_batch(found, BUDGET)) for name, found in here.items())
        known = [f"{name} {batch}" for name, batch in told if batch is not None]
        if known:
            notes.append(
                f"largest batch of P{P} text {L} in {BUDGET / 1e9:g} GB beyond the weights, by a "
                f"line through measured peaks: {', '.join(known)}"
            )
    return notes


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mb(line: Record, provider: str | None) -> str:
    peak = line["providers"].get(provider, {}).get("peak_bytes")
    return "-" if peak is None else f"{peak / 1e6:.0f}"


def origin(line: Record) -> str:
    """Machine, versions, commit and date in one line."""
    facts = line["about"]
    names = ("torch", "transformers", "peft")
    versions = ", ".join(f"{n} {facts['versions'][n]}" for n in names if facts["versions"].get(n))
    commit = (facts["commit"] or "unknown")[:7] + (" with changes" if facts["changed"] else "")
    return (
        f"{facts['machine']}, {facts['threads']} threads, {versions}, commit {commit}, "
        f"{facts['date'][:10]}"
    )


def markdown(records: Sequence[Record]) -> str:
    """All tables, and what they were measured on."""
    said = f"Medians in milliseconds. {origin(records[-1])}."
    return "\n\n".join([said, *(table.markdown() for table in tables(records))]) + "\n"


def write_into(page: Path, text: str) -> None:
    """Replaces what stands between :data:`BEGIN` and :data:`END` in a page.

    Raises:
        ValueError: the page lacks a marker.
    """
    before = page.read_text(encoding="utf-8")
    start, _, rest = before.partition(BEGIN)
    _, marked, end = rest.partition(END)
    if not marked:
        raise ValueError(f"page: got {page}, which lacks {BEGIN} or {END}")
    page.write_text(f"{start}{BEGIN}\n{text}{END}{end}", encoding="utf-8")
