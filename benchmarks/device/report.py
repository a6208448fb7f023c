"""The section on GPUs of docs/benchmarks.md, and its pictures, from the JSON of a run on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastprefix.bench.peers import SIDES

from .records import NO_TIME

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
NOTHING = (
    "**Nothing was measured on a GPU yet.** `make gpu-here` checks and times everything on one,\n"
    "and `python benchmarks/gpu.py --draw` then writes this section."
)
PICTURE = "gpu_decode.png"


def measured(file: Path) -> dict[str, Any] | None:
    """A run on a device, or None: no file, or one of the interpreter."""
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return None if found["reduced"] or not units(found, "operator") else found


def units(found: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """The units of a stage that passed."""
    return [
        unit
        for each in found["stages"]
        if each["name"] == stage
        for unit in each["units"]
        if unit["outcome"] == "passed"
    ]


def section(found: dict[str, Any] | None) -> str:
    """What stands between the marks."""
    if found is None:
        return NOTHING
    parts = [_device(found), _tests(found), *_operator(found), *_models(found), _missing(found)]
    return "\n\n".join(part for part in parts if part)


def _device(found: dict[str, Any]) -> str:
    facts = {unit["name"]: unit for unit in units(found, "about")}
    about, peaks = facts["about"], facts.get("peaks")
    versions = about["versions"]
    commit = str(about["commit"])[:10] + (" with changes" if about["changed"] else "")
    text = (
        f"Measured on {about['device']}, driver {about['driver']}, torch {versions['torch']}, "
        f"Triton {versions['triton']}, transformers {versions['transformers']}, commit {commit}."
    )
    if peaks:
        text += (
            f" A large copy reaches {peaks['tbytes_per_s']:.2f} TB/s there, and a large bf16 "
            f"product {peaks['tflop_per_s']:.0f} TFLOP/s."
        )
    if sheet := about.get("data_sheet"):
        text += f" Data sheet: {sheet['tbytes_per_s']:g} TB/s, {sheet['tflop_per_s']:g} TFLOP/s."
    return text


def _tests(found: dict[str, Any]) -> str:
    lines = ["| checks | passed | failed | skipped | not run |", "|---|---|---|---|---|"]
    for stage in found["stages"]:
        if stage["name"] in ("numerics", "execution", "models"):
            n = stage["outcomes"]
            counts = [n.get(name, 0) for name in ("passed", "failed", "skipped")]
            cells = [stage["name"], *map(str, counts), str(len(stage["not_run"]))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _operator(found: dict[str, Any]) -> list[str]:
    rows = units(found, "operator")
    names = [name for name in SIDES if any(name in row["ms"] for row in rows)]
    lines = [
        f"| ms of one call | {' | '.join(names)} | ours: TB/s, TFLOP/s |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in rows:
        best = min(row["ms"].values())
        cells = []
        for name in names:
            ms = row["ms"].get(name)
            text = "-" if ms is None else f"{ms:.3f}"
            cells.append(f"**{text}**" if ms == best else text)
        rate = row["rates"]["ours"]
        rates = f"{rate['tbytes_per_s']:.2f}, {rate['tflop_per_s']:.0f}"
        lines.append(f"| {row['label']} | {' | '.join(cells)} | {rates} |")
    legend = "; ".join(f"{name}: {SIDES[name].doc}" for name in names)
    kernels = {
        name.split("<")[0].removeprefix("void ")
        for row in rows
        for name in row["kernels"].get("sdpa", ())
    }
    note = f"Medians of CUDA graph replays, every side checked in float64 first. {legend}."
    if kernels:
        note += f" SDPA ran {', '.join(f'`{kernel}`' for kernel in sorted(kernels))}."
    return ["\n".join(lines), note]


def _models(found: dict[str, Any]) -> list[str]:
    rows = units(found, "model figures")
    if not rows:
        return []
    lines = ["| model | side | | peak memory |", "|---|---|---|---|"]
    for row in rows:
        figures = {f"{n:.0f} tokens/s": side for side, n in row.get("tokens_per_s", {}).items()}
        figures |= {f"{n:.1f} ms": side for side, n in row.get("ms", {}).items()}
        for figure, side in figures.items():
            memory = row["peak_bytes"][side] / 1e9
            lines.append(f"| {row['label']} | {side} | {figure} | {memory:.2f} GB |")
    note = f"{rows[0]['model']} in bf16; the host's time is in these figures."
    return ["\n".join(lines), note]


def _missing(found: dict[str, Any]) -> str:
    names = [
        f"{unit['name']} ({unit['why']})" for each in found["stages"] for unit in each["not_run"]
    ]
    names += [
        f"{name} at {row['label']} ({NO_TIME})"
        for row in units(found, "operator")
        for name, why in row["left_out"].items()
        if NO_TIME in why
    ]
    failed = [
        unit["name"] for each in found["stages"] for unit in each["units"]
        if unit["outcome"] == "failed"
    ]  # fmt: skip
    texts = []
    if failed:
        texts.append(f"Failed: {', '.join(failed)}.")
    if names:
        texts.append(f"Not run: {', '.join(names)}.")
    return " ".join(texts)


def draw(file: Path, page: Path) -> None:
    """Writes the section between the page's marks, and the picture beside the JSON."""
    found = measured(file)
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    body = section(found)
    if found is not None:
        plot(found, file.with_name(PICTURE))
        body += f"\n\n![Time of a call by side](../benchmarks/results/{PICTURE})"
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def plot(found: dict[str, Any], file: Path) -> None:
    """Every side's time over ours, by shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = units(found, "operator")
    names = [name for name in SIDES if name != "ours" and any(name in r["ms"] for r in rows)]
    figure, axes = plt.subplots(figsize=(8.5, 1 + 0.45 * len(rows)), layout="constrained")
    for name in names:
        points = [
            (row["ms"][name] / row["ms"]["ours"], -i)
            for i, row in enumerate(rows)
            if name in row["ms"]
        ]
        axes.plot(*zip(*points, strict=True), "o", label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks([-i for i in range(len(rows))], [row["label"] for row in rows], fontsize=8)
    axes.set_xlabel("time over ours: right of the line we are faster")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=140)
    plt.close(figure)
