"""What is compiled for GPUs that are not there: targets, problems, and the launches they make.

The real launchers run, on tensors without storage. Their launches are collected, not enqueued. So
what is compiled offline is what would run on the GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastprefix.options import Options

from .. import launch, tilings
from ..backward import launch_backward
from ..forward import launch_forward
from ..spans import launch_spans
from ..target import Target, family_of_amd, target_of_capability

TARGETS = (
    "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100"
)  # fmt: skip
HEAD_SIZES = (16, 32, 64, 72, 80, 96, 112, 128, 192, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# We assume this many multiprocessors for every target. They decide how reductions are split.
MULTIPROCESSORS = 108


@dataclass(frozen=True)
class Case:
    """One problem, for which all passes are compiled.

    Attributes:
        target: one of TARGETS.
        head_size: D.
        dtype: one of DTYPES.
        features: names out of FEATURES.
        value_head_size: Dv, D if None.
        is_causal: whether the sequence part is causal.
        batch, kv_heads, group, query_length, length, prefix: B, Hkv, Hq / Hkv, Lq, Lk, P. With
            "cu_seqlens", `batch` sequences share the `length` tokens.
    """

    target: str
    head_size: int = 64
    dtype: str = "bf16"
    features: tuple[str, ...] = ()
    value_head_size: int | None = None
    is_causal: bool = True
    batch: int = 8
    kv_heads: int = 8
    group: int = 4
    query_length: int = 2048
    length: int = 2048
    prefix: int = 512


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


# The options that each feature sets. To compile a new feature, add its line.
FEATURES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "padding": lambda c: {"key_padding_mask": _empty(c.batch, c.length, dtype=torch.bool)},
    "spans": lambda c: {
        "key_padding_mask": _empty(c.batch, c.length, dtype=torch.bool),
        "spans": _empty(c.batch, 3, dtype=torch.int32),
    },
    "key_lengths": lambda c: {"key_lengths": _empty(c.batch, dtype=torch.int32)},
    "attn_mask": lambda c: {"attn_mask": _empty(c.batch, 1, c.query_length, c.length)},
    "bool_mask": lambda c: {
        "attn_mask": _empty(c.batch, 1, c.query_length, c.length, dtype=torch.bool)
    },
    "sliding_window": lambda c: {"sliding_window": 256},
    "prefix_in_window": lambda c: {"sliding_window": 256, "prefix_in_window": True},
    "softcap": lambda c: {"softcap": 30.0},
    "sinks": lambda c: {"sinks": _empty(c.kv_heads * c.group)},
    "prefix_bias": lambda c: {"prefix_bias": _empty(c.kv_heads * c.group)},
    "prefix_bias_columns": lambda c: {
        "prefix_bias": _empty(c.kv_heads * c.group, c.query_length, c.prefix)
    },
    "dropout": lambda c: {"dropout_p": 0.1, "dropout_seed": _empty(1, dtype=torch.int64)},
    "packed": lambda c: {
        "prefix_lengths": _empty(4, dtype=torch.int32),
        "prefix_index": _empty(c.batch, dtype=torch.int32),
    },
    "cu_seqlens": lambda c: {"cu_seqlens": _empty(c.batch + 1, dtype=torch.int32)},
    "negative_scale": lambda c: {"scale": -0.125},
    "batch_invariant": lambda c: {"batch_invariant": True},
}
# All features at least once, in as few kernels as possible. The two kinds of masks exclude each
# other, and cu_seqlens excludes both, and key_lengths.
MEETINGS: tuple[tuple[str, ...], ...] = (
    ("attn_mask", "prefix_bias", "sliding_window", "spans", "sinks", "negative_scale"),
    ("bool_mask", "prefix_bias_columns", "prefix_in_window", "softcap", "key_lengths", "padding"),
    ("cu_seqlens", "packed", "dropout"),
)
DECODE_MEETINGS: tuple[tuple[str, ...], ...] = (
    ("spans", "key_lengths", "sliding_window", "softcap", "sinks", "prefix_bias"),
    ("padding", "sliding_window", "packed", "batch_invariant"),
)
# Queries that fill a tile of 32 rows, and a head size whose tiles have few keys. Most features add
# code to every score. With larger tiles they would take longer to compile than all rows of the tile
# table.
SHORT: dict[str, Any] = {
    "query_length": 32, "length": 32, "group": 1, "head_size": 128, "value_head_size": 64
}  # fmt: skip
# Lengths of prefixes for which the prefix's gradient has tiles of its own.
SHORT_PREFIXES = (16, 32, 64)
# A step of decoding. Its lengths are odd, so that no kernel is specialised for multiples of 16.
DECODE: dict[str, Any] = {"batch": 33, "query_length": 1, "length": 2047, "prefix": 4097}


def parse_target(name: str) -> str:
    """The entry of TARGETS for a name: "sm_90", "gfx942", or the entry itself.

    Raises:
        ValueError: an architecture that is not in TARGETS.
    """
    known = {target.replace("cuda:", "sm_").replace("hip:", ""): target for target in TARGETS}
    if name in TARGETS:
        return name
    if name not in known:
        raise ValueError(f"arch: got {name!r}, takes one of {', '.join(known)}")
    return known[name]


def check_case(case: Case) -> None:
    """Raise ValueError, with the name of the field, for a case that no launcher accepts."""
    for name, known in (("target", TARGETS), ("dtype", DTYPES)):
        if getattr(case, name) not in known:
            raise ValueError(
                f"{name}: got {getattr(case, name)!r}, takes one of {', '.join(known)}"
            )
    for name in ("head_size", "value_head_size"):
        size = getattr(case, name)
        if size is not None and not 1 <= size <= tilings.MAX_HEAD_SIZE:
            raise ValueError(f"{name}: got {size}, takes 1 to {tilings.MAX_HEAD_SIZE}")
    for name in case.features:
        if name not in FEATURES:
            raise ValueError(f"features: got {name!r}, takes {', '.join(FEATURES)}")
        missing = FEATURES[name](case).keys() - set(Options._fields)
        if missing:
            raise ValueError(f"features: the kernels have no {', '.join(sorted(missing))}")


def gpu_target(name: str) -> GPUTarget:
    """Triton's own target for an entry of TARGETS."""
    backend, arch = name.split(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def launch_target(name: str) -> Target:
    """Our target of a launch for an entry of TARGETS."""
    backend, arch = name.split(":")
    if backend == "cuda":
        return target_of_capability(*divmod(int(arch), 10), MULTIPROCESSORS)
    return Target(family_of_amd(arch), MULTIPROCESSORS)


def launches(case: Case) -> list[launch.Launch]:
    """Every launch of a forward and a backward of the case, in order."""
    check_case(case)
    c, dtype = case, DTYPES[case.dtype]
    D, Dv = c.head_size, c.value_head_size or c.head_size
    B, Lq, Lk = c.batch, c.query_length, c.length
    if "cu_seqlens" in c.features:
        B, Lq = 1, Lk
    Hq = c.kv_heads * c.group
    inputs = (
        _empty(B, Hq, Lq, D, dtype=dtype),
        _empty(B, c.kv_heads, Lk, D, dtype=dtype),
        _empty(B, c.kv_heads, Lk, Dv, dtype=dtype),
        _empty(c.kv_heads, c.prefix, D, dtype=dtype),
        _empty(c.kv_heads, c.prefix, Dv, dtype=dtype),
    )
    options: dict[str, Any] = {"scale": 0.125, "is_causal": c.is_causal, "key_padding_mask": None}
    for name in c.features:
        options |= FEATURES[name](c)
    bias = options.get("prefix_bias")
    needs = (True,) * len(inputs) + ("sinks" in options, bias is not None and bias.dim() == 1)
    with launch.collected(launch_target(c.target)) as steps:
        if "spans" in options:
            options["spans"] = launch_spans(options["key_padding_mask"])
        out, lse = launch_forward(*inputs, Options(**options))
        grad_out = _empty(B, Hq, Lq, Dv, dtype=dtype)
        launch_backward(grad_out, *inputs, out, lse, Options(**options), needs)
    return steps


@dataclass(frozen=True)
class Job:
    """Kernels of a case to compile.

    Attributes:
        case: the problem.
        kernel: only kernels whose name contains this.
        code: whether to read the disassembly, for hot loops and spill instructions. This takes a
            fifth of the time of the compilation.
    """

    case: Case
    kernel: str = ""
    code: bool = True


def is_main(case: Case) -> bool:
    """Whether a case is on the main path: its kernels must not spill, and are disassembled."""
    return case.dtype == "bf16" and case.head_size in (64, 128) and not case.features


def plain_jobs(target: str, head_size: int, dtype: str) -> list[Job]:
    """Forward, backward, decoding, and the gradient of short prefixes, without features."""
    case = Case(target, head_size, dtype)
    step = dataclasses.replace(case, **DECODE)
    jobs = [Job(case, code=is_main(case)), Job(step, "decode", code=is_main(case))]
    if dtype != "fp32":
        short = (dataclasses.replace(case, prefix=P) for P in SHORT_PREFIXES)
        jobs += [Job(each, "dprefix_kernel", code=is_main(case)) for each in short]
    return jobs


def table_jobs(target: str) -> list[Job]:
    """Every kernel at every row of the tile table that a target can pick, and every feature.

    A call picks a row by the block of its head size and by whether it is fp32. Each block is
    compiled with its largest head, which needs most. Features are compiled at one head size, with
    smaller values.
    """
    passes = tilings.TILES[launch_target(target).family]
    blocks = sorted({largest for rows in passes.values() for largest, _, _ in rows})
    jobs = []
    for dtype, block in itertools.product(("bf16", "fp32"), blocks):
        jobs += plain_jobs(target, block, dtype)
    for features in MEETINGS:
        case = Case(target, dtype="bf16", features=features, **SHORT)
        jobs.append(Job(case, code=False))
    for features in DECODE_MEETINGS:
        case = Case(target, 128, "fp16", features, value_head_size=64, **DECODE)
        jobs.append(Job(case, "decode", code=False))
    # The tables of packed prefixes and sequences come with MEETINGS; decoding has more of them.
    for features in (("packed",), ("packed", "batch_invariant")):
        jobs.append(Job(Case(target, 128, "fp16", features, **DECODE), "tables", code=False))
    ranked = Case(target, features=("padding", "prefix_in_window", "key_lengths"))
    jobs.append(Job(ranked, "ranks", code=False))
    return jobs


def main_jobs(target: str) -> list[Job]:
    """The jobs of :func:`table_jobs` that most models run: bf16, D 64 and 128, no features."""
    return [
        job
        for job in table_jobs(target)
        if job.case.dtype == "bf16" and job.case.head_size in (64, 128) and not job.case.features
    ]


def full_jobs() -> list[Job]:
    """For every target: its tiles, all head sizes and dtypes, and each single feature at D 64."""
    jobs = []
    for target in TARGETS:
        jobs += table_jobs(target)
        for head_size, dtype in itertools.product(HEAD_SIZES, DTYPES):
            jobs += plain_jobs(target, head_size, dtype)
        for feature in FEATURES:
            case = Case(target, 64, "bf16", (feature,))
            if feature == "batch_invariant":
                case = dataclasses.replace(case, **DECODE)
            # sm_90 has asynchronous products. A feature may serialise them, and the code shows it.
            jobs.append(Job(case, code=target == "cuda:90"))
    return list(dict.fromkeys(jobs))
