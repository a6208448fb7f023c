"""The report on a comparison: one HTML file that needs no other, and the same in Markdown."""

from __future__ import annotations

import base64
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from fastprefix.files import read_json, written_whole
from fastprefix.tasks.registry import get_task
from fastprefix.training.compare import RUNS, Comparison
from fastprefix.training.plots import Picture, draw
from fastprefix.training.run import ENVIRONMENT
from fastprefix.training.tables import (
    Figure,
    Table,
    best_cell,
    costs_table,
    digits_of,
    failed_table,
    level_with,
    metric_title,
    rates_table,
    results_of,
    runs_table,
    scores_table,
    value_of,
)

HTML, MARKDOWN, PICTURES = "report.html", "report.md", "pictures"
_SAMPLES = 3  # texts that are shown of each method
_MARKED = re.compile(r"([\\`*_\[\]|#~$])")


@dataclass(frozen=True)
class Sample:
    """What the methods wrote for one source.

    Attributes:
        source: that they read.
        references: what they might have written.
        written: the text of each cell, by its label.
    """

    source: str
    references: Sequence[str]
    written: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the report; its contents follow one another in this order.

    Attributes:
        title: its heading.
        text: paragraphs.
        table: or None.
        pictures: of :func:`fastprefix.training.plots.draw`.
        samples: texts side by side.
        code: lines as they are.
        folded: whether the HTML shows it only when asked.
        wrong: whether it tells of something that went wrong.
    """

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    samples: Sequence[Sample] = ()
    code: str = ""
    folded: bool = False
    wrong: bool = False


@dataclass(frozen=True)
class Report:
    """All that both formats say."""

    title: str
    notes: Sequence[str]
    summary: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)


def write_report(comparison: Comparison, folder: Path, *, command: str | None = None) -> Path:
    """Writes ``report.html``, and ``report.md`` with its ``pictures`` beside it.

    Args:
        comparison: what :func:`fastprefix.training.compare.run_compare` returned.
        folder: where; that of the comparison.
        command: that makes the report; None for the one that started this process.

    Returns:
        The HTML file.

    Raises:
        OSError: a file cannot be written.
    """
    report = _report(comparison, command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PICTURES).mkdir(exist_ok=True)
    for section in report.sections:
        for picture in section.pictures:
            with written_whole(folder / PICTURES / f"{picture.name}.png") as partial:
                partial.write_bytes(picture.png)
    for name, text in ((MARKDOWN, _markdown(report)), (HTML, _html(report))):
        with written_whole(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / HTML


def _report(comparison: Comparison, command: str) -> Report:
    config = comparison.config
    environments = _environments(comparison)
    machines = sorted({str(each.get("machine", "?")) for each in environments})
    pictures = draw(comparison, "; ".join(machines)) if environments else {}
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", config.notes)]
    sections = [
        *_failures(comparison),
        *_results(comparison, pictures),
        *_grid(pictures),
        *_losses(comparison, pictures),
        *_texts(comparison),
        Section("All runs", (f"Folders are in {RUNS}/.",), runs_table(comparison), folded=True),
        *_made(comparison, command, environments),
    ]
    return Report(
        config.title,
        [text for text in paragraphs if text],
        _summary(comparison, machines),
        sections,
    )


def _summary(comparison: Comparison, machines: Sequence[str]) -> list[str]:
    config, metric = comparison.config, comparison.config.deciding_metric
    outcomes = comparison.outcomes
    models = sorted({outcome.run.config.model for outcome in outcomes})
    finished = len(outcomes) - len(comparison.failed)
    lines = []
    best = best_cell(comparison)
    if best is not None:
        figure = Figure.of(value_of(result, metric) for result in results_of(comparison, best))
        shown = f"{metric_title(metric)} {figure.show(digits_of(metric))}"
        lines.append(f"Best: {best.label}, {shown}.")
        level = [cell.label for cell in level_with(comparison, best)]
        if level and figure.count > 1:
            lines.append(f"Within what seeds vary: {'; '.join(level)}.")
    lines.append(
        f"Task {config.task} ({get_task(config.task).doc}), model {', '.join(models)}. "
        f"{finished} of {len(outcomes)} runs finished, seeds {', '.join(map(str, config.seeds))}."
    )
    if machines:
        lines.append(f"Measured on {'; '.join(machines)}.")
    return lines


def _failures(comparison: Comparison) -> Iterator[Section]:
    if comparison.failed:
        what = "1 run" if len(comparison.failed) == 1 else f"{len(comparison.failed)} runs"
        text = (
            f"{what} failed, and the figures below are without. What a run printed is in log.txt "
            "of its folder. The same command tries again what failed, and nothing else."
        )
        yield Section("Failed runs", (text,), failed_table(comparison.failed), wrong=True)


def _results(comparison: Comparison, pictures: Mapping[str, Picture]) -> Iterator[Section]:
    results = [outcome.result for outcome in comparison.outcomes if outcome.result is not None]
    if not results:
        return
    where = "the test set" if all(r["test"] for r in results) else "held-out examples"
    text = f"Metrics are of {where}: means over seeds ± their standard deviation (n − 1)."
    shown = [pictures[name] for name in ("methods", "parameters") if name in pictures]
    yield Section("Results", (text,), scores_table(comparison), shown)
    text = (
        "Share is that of the trained parameters in all; stored is what a task needs beside the "
        "base model. Of the steps, the first number is where validation loss was lowest: these "
        "weights were kept and measured, and the epochs count up to there. Seconds per step are "
        "the median of a run, of the fastest of the runs: other work on the machine slows some "
        "of them. Training is all steps at this pace. Peak memory is what training took on top of "
        "the loaded model. Steps, epochs and memory are means over seeds."
    )
    yield Section("What it costs", (text,), costs_table(comparison))


def _grid(pictures: Mapping[str, Picture]) -> Iterator[Section]:
    shown = [picture for name, picture in pictures.items() if name.startswith("grid-")]
    if shown:
        yield Section("Along the grid", pictures=shown)


def _losses(comparison: Comparison, pictures: Mapping[str, Picture]) -> Iterator[Section]:
    if "losses" in pictures:
        yield Section("Losses", pictures=[pictures["losses"]])
    table = rates_table(comparison)
    if table is not None:
        text = (
            "Validation loss by learning rate, with seed "
            f"{comparison.config.seeds[0]}. The lowest chose; the test set played no part. At the "
            "edge of a list, a better rate may lie beyond."
        )
        yield Section("Learning rates", (text,), table)


def _texts(comparison: Comparison) -> Iterator[Section]:
    samples: dict[str, tuple[Sequence[str], dict[str, str]]] = {}
    for cell in comparison.cells:
        for result in results_of(comparison, cell)[:1]:
            for each in result.get("samples") or ():
                known = samples.setdefault(each["source"], (each["references"], {}))
                known[1][cell.label] = each["written"]
    if samples:
        shown = [Sample(source, *rest) for source, rest in list(samples.items())[:_SAMPLES]]
        text = f"Of the first seed, {comparison.config.seeds[0]}."
        yield Section("What they write", (text,), samples=shown)


def _made(
    comparison: Comparison, command: str, environments: Sequence[Mapping[str, Any]]
) -> Iterator[Section]:
    text = ["Run it again to repeat the report; finished runs are not repeated."]
    if len(environments) > 1:
        text.append("Not all runs were made in the same environment; each that occurred is below.")
    told = "\n\n".join(json.dumps(each, indent=2, ensure_ascii=False) for each in environments)
    yield Section("How it was made", text, code=command)
    yield Section("Configuration", code=comparison.config.yaml().strip(), folded=True)
    if told:
        yield Section("Environment", code=told, folded=True)


def _environments(comparison: Comparison) -> list[dict[str, Any]]:
    """The environments of the finished runs, each once."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in comparison.outcomes:
        file = outcome.folder / ENVIRONMENT
        if outcome.result is not None and file.is_file():
            environment = read_json(file)
            found[json.dumps(environment, sort_keys=True)] = environment
    return list(found.values())


def _html(report: Report) -> str:
    template = files("fastprefix.training").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data_uri"] = _data_uri
    return environment.from_string(template).render(report=report)


def _data_uri(picture: Picture) -> str:
    encoded = base64.b64encode(picture.svg.encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"


def _markdown(report: Report) -> str:
    blocks = [f"# {_plain(report.title)}", *map(_plain, report.notes), *map(_plain, report.summary)]
    for section in report.sections:
        blocks += [f"## {_plain(section.title)}", *map(_plain, section.text)]
        if section.table is not None:
            blocks.append(_markdown_table(section.table))
        for picture in section.pictures:
            caption = _plain(picture.caption)
            blocks.append(f"![{caption}]({PICTURES}/{picture.name}.png)\n\n*{caption}*")
        for sample in section.samples:
            blocks.append(_markdown_sample(sample))
        if section.code:
            blocks.append(_markdown_code(section.code))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [
        " | ".join(_plain(column.title) or " " for column in table.columns),
        " | ".join("--:" if column.is_number else "---" for column in table.columns),
    ]
    for number, row in enumerate(table.rows):
        cells = [
            f"**{_plain(text)}**" if (number, place) in table.strong and text else _plain(text)
            for place, text in enumerate(row)
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _markdown_sample(sample: Sample) -> str:
    rows = [("*source*", sample.source), *(("*reference*", text) for text in sample.references)]
    rows += [(_plain(label), text) for label, text in sample.written.items()]
    return "\n".join(
        ["|  | text |", "| --- | --- |", *(f"| {label} | {_plain(text)} |" for label, text in rows)]
    )


def _markdown_code(text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = _MARKED.sub(r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
