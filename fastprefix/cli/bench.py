"""``fastprefix bench``: measures the suites, and draws what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from fastprefix.bench.measure import WrongResultError, measure
from fastprefix.bench.memory import MemoryMeter
from fastprefix.bench.pace import pace
from fastprefix.bench.records import FILE, about, append, newest, record
from fastprefix.bench.suites import cases
from fastprefix.bench.tables import markdown, origin, tables, write_into
from fastprefix.cli.console import console, progress, tell
from fastprefix.cli.errors import complain
from fastprefix.training.speed import fast_dtype

MARKDOWN = "bench.md"  # beside the records
TINY = "bench_tiny.jsonl"  # in place of FILE for what says nothing


def run_bench(
    suites: Sequence[str],
    *,
    device: str,
    output: Path,
    only: str = "",
    tiny: bool = False,
    dtype: str | None = None,
    rounds: int | None = None,
) -> int:
    """Measures cases one after the other, and adds each to the records at once.

    Args:
        suites: their names; all if there are none.
        device: "cpu" or "cuda".
        output: the folder of the records.
        only: a text that must be in the name of a case.
        tiny: a few cases that show that everything works.
        dtype: of SmolLM2's weights; None for bfloat16, or float32 on a CPU that is faster in it.
        rounds: how often each provider is timed; None for what fits into a case's time.

    Returns:
        The exit code: 1 if providers disagreed in a case, which then has no figures.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but PyTorch sees no GPU here; takes cpu")
    place = torch.device(device)
    dtype = dtype or str(fast_dtype(place)).removeprefix("torch.")
    chosen = cases(suites, tiny=tiny, only=only, dtype=dtype)
    facts = about(place)
    speed = pace(dtype, place)
    minutes = sum(case.expected_s(speed) for case in chosen) / 60
    tell(f"{len(chosen)} cases, about {minutes:.0f} minutes if nothing else runs here")
    file = output / (TINY if tiny else FILE)
    wrong: list[str] = []
    done = []
    with MemoryMeter(place) as meter, progress("cases", len(chosen)) as show:
        for i, case in enumerate(chosen):
            show(i, f"{case.suite}: {case.label}")
            try:
                line = record(case, measure(case, place, meter, rounds=rounds), facts)
            except WrongResultError as error:
                wrong.append(str(error))
                continue
            append(file, line)
            done.append(line)
        show(len(chosen), "")
    if done:
        _print(done)
    tell(f"{len(done)} records were added to {file}")
    for message in wrong:
        complain(message, 1)
    return int(bool(wrong))


def run_plot(
    suites: Sequence[str], output: Path, page: Path | None = None, *, tiny: bool = False
) -> None:
    """Draws the newest record of every case, and writes their tables.

    Args:
        suites: their names; all if there are none.
        output: the folder of the records; pictures and tables are written there.
        page: a page whose markers the tables are written between, too.
        tiny: the records of tiny cases.
    """
    from fastprefix.bench.plots import draw  # matplotlib is optional

    file = output / (TINY if tiny else FILE)
    records = [line for line in newest(file) if not suites or line["suite"] in suites]
    if not records:
        raise ValueError(f"suite: got {', '.join(suites)}, of which {file} has no record")
    text = markdown(records)
    (output / MARKDOWN).write_text(text, encoding="utf-8")
    if page is not None:
        write_into(page, text)
    for written in (*draw(records, output), output / MARKDOWN, *([] if page is None else [page])):
        tell(f"wrote {written}")
    _print(records)


def _print(records: list[dict]) -> None:
    if not console.is_terminal:  # tables for people do not fit into a file's 80 columns
        print(markdown(records))
        return
    for each in tables(records):
        shown = Table(title=each.title)
        for column in each.columns:
            shown.add_column(column, justify="left" if column == "case" else "right")
        for row in each.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
        for note in each.notes:
            console.print(Text(note))
    console.print(Text(origin(records[-1])))
