"""The GPU suite: first whether everything is right on this device, then how fast it is.

    make gpu-here                       on the Python at hand, into benchmarks/results/gpu.json
    make gpu-cache ARCH=sm_90           beforehand, anywhere: compile the kernels, to carry along
    python benchmarks/gpu.py --plan     the stages and the time that they are expected to take
    python benchmarks/gpu.py --draw     the section of docs/benchmarks.md and pictures from the JSON

Stages run in the order of their importance until the budget is spent, each in processes of its own.
The JSON is written after every stage. It names what failed, what skipped itself and what did not
run, with reasons. No figure is written for a side whose result is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / ".cache" / "gpu"  # the folder that can be carried along
RESERVE = 5.0  # seconds of the budget that are kept for writing


def main() -> int:
    """See above. The exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--budget", type=float, default=480, help="seconds, compilation included")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="Triton's cache folder")
    parser.add_argument("--jobs", type=int, help="processes that compile")
    parser.add_argument("--reduced", action="store_true", help="a few cases, in the interpreter")
    parser.add_argument("--compile-for", metavar="ARCH", help="only compile, without a device")
    parser.add_argument("--plan", action="store_true", help="print the stages and expected times")
    parser.add_argument("--draw", action="store_true", help="write docs/benchmarks.md's section")
    parser.add_argument("--part", choices=("about", "operator", "models"), help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        run_part(chosen.part, chosen.shard)
        return 0
    if chosen.plan:
        from device.expected import show

        show(chosen.jobs or jobs())
        return 0
    if chosen.draw:
        from device.report import draw

        draw(chosen.output / "gpu.json", ROOT / "docs" / "benchmarks.md")
        return 0
    return suite(chosen)


def run_part(name: str, shard: str) -> None:
    """One stage's work, in this process."""
    from device.records import SUITE_ON

    place = os.environ.get(SUITE_ON, "")
    if place != "cpu" and name != "about":
        from device.kernels import LOADED

        if place:
            from device.simulation import simulate

            simulate(place)
        LOADED.listen()
    if name == "about":
        from device.about import main as run

        run(place)
    elif name == "operator":
        from device.operator_rows import main as run_rows

        i, n = map(int, shard.split("/"))
        run_rows(place, (i, n))
    else:
        from device.model_rows import main as run_models

        run_models(place)


def jobs() -> int:
    """Processes that compile side by side: two cores stay free."""
    return max(1, (os.cpu_count() or 1) - 2)


def suite(chosen: argparse.Namespace) -> int:
    """Runs the stages and writes the JSON after each of them."""
    from device import stages
    from device.kernels import settle
    from device.records import NO_TIME

    began = time.time()
    count = chosen.jobs or jobs()
    arch = chosen.compile_for or architecture()
    if chosen.reduced:
        todo = stages.reduced()
    elif chosen.compile_for:
        todo = [stages.compilation(arch, count)]
    elif arch is None:
        print("skipped: needs a CUDA or ROCm device; this machine has none")
        print("`--reduced` tries the suite in Triton's interpreter, `--plan` says what it would do")
        return 0
    else:
        todo = stages.on_device(arch if arch.startswith("sm_") else None, count)
    deadline = float("inf") if chosen.compile_for else began + chosen.budget - RESERVE
    chosen.kernels.mkdir(parents=True, exist_ok=True)
    carried = settle(chosen.kernels)
    environment = {
        **os.environ, "TRITON_CACHE_DIR": str(chosen.kernels), "TRITON_STORE_BINARY_ONLY": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    if not chosen.reduced:
        environment["TRITON_INTERPRET"] = "0"
    chosen.output.mkdir(parents=True, exist_ok=True)
    log = chosen.output / "gpu.log"
    log.unlink(missing_ok=True)
    found: dict[str, Any] = {
        "budget_s": chosen.budget, "carried_kernels": carried,
        "reduced": chosen.reduced, "stages": [],
    }  # fmt: skip
    for stage in todo:
        result = stages.run(stage, log, deadline, environment)
        found["stages"].append(result)
        found["seconds"] = round(time.time() - began, 1)
        print(summary(result), flush=True)
        if not chosen.compile_for:
            write(chosen.output / "gpu.json", found)
    if chosen.compile_for:
        from device.expected import remember

        remember(found["stages"][0], arch)
        print(f"{settle(chosen.kernels)} kernels in {chosen.kernels}")
    outcomes = [stage["outcomes"] for stage in found["stages"]]
    died = any(NO_TIME not in x["why"] for stage in found["stages"] for x in stage["not_run"])
    return int(died or any(outcome.get("failed") for outcome in outcomes))


def architecture() -> str | None:
    """Of the device: sm_90, gfx942; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def write(file: Path, found: dict[str, Any]) -> None:
    """Writes the JSON whole, so that a run that is stopped leaves the stages before."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(file)


def summary(stage: dict[str, Any]) -> str:
    """One line for a stage, and one for each unit that failed or did not run."""
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in stage["outcomes"].items())
    lines = [f"{stage['name']}: {outcomes or 'nothing ran'}, {stage['seconds']} s"]
    for unit in stage["units"]:
        if unit["outcome"] == "failed":
            lines.append(f"  FAILED {unit['name']}: {unit['why'][:300]}")
    lines += [f"  not run {unit['name']}: {unit['why']}" for unit in stage["not_run"]]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
