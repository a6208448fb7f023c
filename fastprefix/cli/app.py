"""The command line: its own options, and the sub-commands about models, files and kernels.

Each sub-command imports its work from a module beside this one. Nothing expensive is imported
before it runs and its input has passed all that can be checked without: ``--help`` and most
mistakes are answered at once. :mod:`fastprefix.cli.run_commands` has the sub-commands that train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastprefix import __version__
from fastprefix.cli import inputs, run_commands
from fastprefix.cli.typed import (
    A_MODEL,
    HEAD_SIZES,
    SIZES,
    Arch,
    Device,
    DType,
    DTypeOption,
    ForceOption,
    Format,
    KernelDType,
    ModelOption,
    SeedOption,
    Suite,
    app,
    examples,
    quiet,
)

__all__ = ["app", "main", "run_commands"]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastprefix {__version__}")
        raise typer.Exit


@app.callback(epilog=examples("  fastprefix train --help", "  fastprefix --version"))
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Attention over shared prefixes: train them, share them, measure them.

    Results go to standard output, everything else to standard error.
    """


@app.command(epilog=examples("  fastprefix info", "  fastprefix info --backends"))
def info(
    backends: Annotated[
        bool, typer.Option("--backends", help="Show what each attention backend can do.")
    ] = False,
) -> None:
    """Show versions, the device and the backend that runs."""
    from fastprefix.cli.info import show_info

    show_info(backends)


@app.command(epilog=examples("  fastprefix check HuggingFaceTB/SmolLM2-135M-Instruct"))
def check(
    model: Annotated[str, typer.Argument(help=A_MODEL)] = inputs.DEFAULT_MODEL,
    dtype: DTypeOption = DType.float32,
) -> None:
    """Say what is right with a model and what is refused.

    The model runs on a few tokens; what is refused is told with the reason.
    """
    inputs.model(model, "model")
    quiet()
    from fastprefix.cli.check import run_check

    run_check(model, dtype.value)


@app.command(
    epilog=examples("  fastprefix demo", "  fastprefix demo --steps 20 --json figures.json")
)
def demo(
    model: ModelOption = inputs.DEFAULT_MODEL,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the trained adapter; replaced.")] = Path(
        "demo-adapter"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    seed: SeedOption = 0,
) -> None:
    """Train a prefix, use it, and measure it beside PEFT."""
    inputs.folder_to_write(output, "--output")
    if json_file is not None:
        inputs.file_to_write(json_file, "--json")
    inputs.model(model)
    inputs.package("accelerate", "training")
    quiet()
    from fastprefix.cli.demo import run_demo

    run_demo(model, json_file, output, steps, seed)


@app.command(
    epilog=examples(
        "  fastprefix convert adapter prefix.safetensors",
        "  fastprefix convert prefix.safetensors again --to CARTRIDGE",
        "  fastprefix convert adapters converted --dry-run",
    )
)
def convert(
    source: Annotated[
        Path, typer.Argument(help="An adapter's folder, a PrefixKV file, or a folder of such.")
    ],
    target: Annotated[Path, typer.Argument(help="A folder, or a .safetensors file.")],
    to: Annotated[
        Format | None,
        typer.Option(
            help="fastprefix is a PrefixKV file. Adapters become files and files PREFIX_TUNING if "
            "left out."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model: loaded where a prompt is computed, and for T5, BART, ..."),
    ] = None,
    dtype: DTypeOption = DType.float32,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, write nothing.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Convert PEFT's adapters to PrefixKV files, and back.

    One of them, or a whole folder.
    """
    if source.is_dir():
        inputs.folder_to_read(source, "source")
    else:
        inputs.file_to_read(source, "source")
    if base is not None:
        inputs.model(base, "--base")
    quiet()
    from fastprefix.cli.convert import run_conversion

    kind = None if to is None else to.value
    run_conversion(source, target, kind, base, dtype.value, dry_run, force)


@app.command(
    epilog=examples(
        "  fastprefix inspect --arch sm_90 --head-dim 128",
        "  fastprefix inspect --arch sm_80 --kernel fwd --json",
    )
)
def inspect(
    arch: Annotated[Arch, typer.Option(help="The GPU.")],
    head_dim: Annotated[int, typer.Option(**HEAD_SIZES, help="Head size.")] = 64,
    dtype: Annotated[KernelDType, typer.Option()] = KernelDType.bf16,
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    feature: Annotated[
        list[str] | None, typer.Option(help="padding, softcap, sliding_window, ...; repeatable.")
    ] = None,
    value_head_dim: Annotated[
        int | None, typer.Option(**HEAD_SIZES, help="If unlike --head-dim.")
    ] = None,
    bidirectional: Annotated[bool, typer.Option(help="Not causal.")] = False,
    batch: Annotated[int, typer.Option(**SIZES)] = 8,
    kv_heads: Annotated[int, typer.Option(**SIZES)] = 8,
    group: Annotated[int, typer.Option(**SIZES, help="Query heads per KV head.")] = 4,
    query_length: Annotated[int | None, typer.Option(**SIZES, help="--length if left out.")] = None,
    length: Annotated[int, typer.Option(**SIZES, help="Keys per sequence.")] = 2048,
    prefix: Annotated[int, typer.Option(min=0, max=SIZES["max"], help="Prefix length.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the kernels' machine code costs on a GPU.

    They are compiled for it; it need not be here.
    """
    from fastprefix.cli.inspect import run_inspection

    problem = {
        "value_head_size": value_head_dim,
        "batch": batch,
        "kv_heads": kv_heads,
        "group": group,
        "query_length": length if query_length is None else query_length,
        "length": length,
        "prefix": prefix,
    }
    run_inspection(
        arch.value, head_dim, dtype.value, kernel, feature or [], bidirectional, problem, as_json
    )


@app.command(epilog=examples("  fastprefix tune", "  fastprefix tune --head-dim 128 --dtype fp16"))
def tune(
    head_dim: Annotated[
        list[int] | None, typer.Option(**HEAD_SIZES, help="64 and 128 if left out; repeatable.")
    ] = None,
    dtype: Annotated[
        list[KernelDType] | None, typer.Option(help="bf16 if left out; repeatable.")
    ] = None,
    kv_heads: Annotated[int, typer.Option(**SIZES)] = 8,
    group: Annotated[int, typer.Option(**SIZES, help="Query heads per KV head.")] = 4,
    batch: Annotated[int, typer.Option(**SIZES)] = 4,
    length: Annotated[int, typer.Option(**SIZES, help="Tokens per sequence.")] = 2048,
    prefix: Annotated[int, typer.Option(**SIZES, help="Prefix length.")] = 1024,
    decode_batch: Annotated[int, typer.Option(**SIZES, help="Sequences in a decoding step.")] = 64,
) -> None:
    """Time the kernels' tiles on this GPU and keep the fastest.

    The same for how decoding cuts its keys. Later processes take both from the disk.
    """
    from fastprefix.cli.tune import run_tuning

    sizes = {"kv_heads": kv_heads, "group": group, "batch": batch, "length": length}
    dtypes = [kind.value for kind in dtype or [KernelDType.bf16]]
    sizes |= {"prefix": prefix, "decode_batch": decode_batch}
    run_tuning(head_dim or [64, 128], dtypes, sizes)


@app.command(
    epilog=examples(
        "  fastprefix bench operator --case decode",
        "  fastprefix bench generate train --output results",
        "  fastprefix bench --plot --output results",
    )
)
def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help="operator, generate, train, serve; all if none.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.cpu,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; new ones are added, old ones stay.")
    ] = Path("bench"),
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A few small cases; their figures say nothing.")
    ] = False,
    dtype: Annotated[
        DType | None, typer.Option(help="Of SmolLM2's weights; what suits the device if left out.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each case; by its time if left out.")
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Measure nothing: draw and tabulate the results.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(help="With --plot: a page to write the tables into.")
    ] = None,
) -> int:
    """Measure attention, generation, training and serving.

    Each case beside SDPA, PEFT and others; who is wrong gets no figure.
    """
    names = suites or []
    inputs.names(names, [suite.value for suite in Suite], "suites")
    inputs.folder_to_write(output, "--output")
    if page is not None:
        inputs.file_to_read(page, "--page")
        if not plot:
            raise ValueError("--page: got it without --plot, which it belongs to")
    for package in ("psutil", *(["matplotlib"] if plot else [])):
        inputs.package(package, "fastprefix bench")
    quiet()
    from fastprefix.cli.bench import run_bench, run_plot

    if plot:
        run_plot(names, output, page, tiny=tiny)
        return 0
    kind = None if dtype is None else dtype.value
    return run_bench(
        names, device=device.value, output=output, only=case, tiny=tiny, dtype=kind, rounds=rounds
    )


def main() -> None:
    """Entry point."""
    app()
