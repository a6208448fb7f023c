"""Random small problems through the launchers, each kernel translated to Triton's IR.

    TRITON_INTERPRET=0 python tests/kernels/small_sizes.py COUNT SEED

Sizes of 1 are frequent: Triton makes a constant of an argument that equals 1, and a kernel may do
with constants less than with numbers. Each specialisation is compared with the one that Triton's
launcher would derive. Prints one JSON line: the number of kernels, and what went wrong.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import torch
from triton._C.libtriton import ir, native_specialize_impl
from triton.compiler.compiler import make_backend

from fastprefix.kernels import decode, launch
from fastprefix.kernels.backward import launch_backward
from fastprefix.kernels.forward import launch_forward
from fastprefix.kernels.offline.cases import gpu_target
from fastprefix.kernels.offline.report import source
from fastprefix.kernels.target import Target, family_of_capability
from fastprefix.options import Options

TARGET = gpu_target("cuda:90")
FAMILY = family_of_capability(9, 0)
BACKEND = make_backend(TARGET)
OPTIONS = BACKEND.parse_options({"num_warps": 4, "num_stages": 2})


def main(count: int, seed: int) -> None:
    """Prints what went wrong with `count` problems."""
    draw = random.Random(seed)
    known: set[str] = set()
    wrong: dict[str, str] = {}
    for _ in range(count):
        steps, problem = launches_of(draw)
        for step in steps:
            name = step.kernel.fn.__name__
            made = source(step, TARGET)
            if differs := specialised_otherwise(step, made):
                wrong.setdefault(f"{name}: specialises {differs} otherwise than Triton", problem)
            key = f"{name} {made.signature} {made.constants} {made.attrs}"
            if key in known:
                continue
            known.add(key)
            try:
                to_ir(made)
            except Exception as error:  # a compiler fails in many ways
                wrong.setdefault(f"{name}: {type(error).__name__} {str(error)[-300:]}", problem)
    print(json.dumps({"kernels": len(known), "wrong": wrong}))


def launches_of(draw: random.Random) -> tuple[list[launch.Launch], str]:
    """The launches of a random problem, and the problem in words."""

    def one(*others: int) -> int:
        return draw.choice((1, 1, *others))

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    decoding = draw.random() < 0.3
    dtype = draw.choice((torch.bfloat16, torch.float16, torch.float32))
    sequences = B = one(2, 3)
    Hkv, group = one(2), one(2, 3)
    D = draw.choice((1, 16, 64, 72))
    Dv = draw.choice((D, D, 1, 32))
    Lq = one(2, 16) if decoding else one(2, 17, 64)
    Lk = draw.choice((Lq, Lq, 1, 0, 16, 100))
    P = draw.choice((0, 1, 1, 2, 16, 130))
    options: dict[str, Any] = {"is_causal": draw.random() < 0.6, "scale": draw.choice((0.125, 1.0))}
    if not decoding and draw.random() < 0.35:
        sequences, B, Lk = one(2, 3), 1, Lq
        options["cu_seqlens"] = new(sequences + 1, dtype=torch.int32)
    elif draw.random() < 0.4:
        options["key_padding_mask"] = new(B, Lk, dtype=torch.bool)
        if draw.random() < 0.5:
            options["spans"] = new(B, 3, dtype=torch.int32)
    if "cu_seqlens" not in options and draw.random() < 0.3:
        options["key_lengths"] = new(B, dtype=torch.int32)
    if draw.random() < 0.35:
        options["prefix_lengths"] = new(one(2, 3), dtype=torch.int32)
        options["prefix_index"] = new(sequences, dtype=torch.int32)
    if draw.random() < 0.4:
        options["sliding_window"] = one(16, 1000)
        options["prefix_in_window"] = not decoding and draw.random() < 0.5
    if draw.random() < 0.25:
        options["softcap"] = draw.choice((30.0, 1.0))
    if draw.random() < 0.25:
        options["sinks"] = new(Hkv * group, dtype=draw.choice((dtype, torch.float32)))
    if draw.random() < 0.3:
        by_head = decoding or draw.random() < 0.5
        options["prefix_bias"] = new(*((Hkv * group,) if by_head else (Hkv * group, Lq, P)))
    if not decoding and "cu_seqlens" not in options and draw.random() < 0.3:
        shape = draw.choice((1, B)), draw.choice((1, Hkv * group)), draw.choice((1, Lq)), Lk
        options["attn_mask"] = new(*shape, dtype=draw.choice((torch.bool, torch.float32)))
    if not decoding and draw.random() < 0.2:
        options |= {"dropout_p": 0.1, "dropout_seed": new(1, dtype=torch.int64)}
    inputs = [
        new(*shape, dtype=dtype)
        for shape in ((B, Hkv * group, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv))
    ]
    if draw.random() < 0.3:  # as a model's projections lay them out
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    inputs += [new(Hkv, P, D, dtype=dtype), new(Hkv, P, Dv, dtype=dtype)]
    told = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    shapes = [tuple(x.shape) for x in inputs]
    with launch.collected(Target(FAMILY, draw.choice((1, 8, 108)))) as steps:
        if decoding:
            decode.decode_forward(*inputs, Options(**options))
        else:
            out, lse = launch_forward(*inputs, Options(**options))
            bias = options.get("prefix_bias")
            needs = tuple(draw.random() < 0.8 for _ in range(5))
            needs += ("sinks" in options, bias is not None and bias.dim() == 1)
            grad_out = torch.empty_like(out)
            launch_backward(grad_out, *inputs, out, lse, Options(**options), needs)
    return steps, f"{'decode' if decoding else 'all'} {dtype} {shapes} {told}"


def specialised_otherwise(step: launch.Launch, made: Any) -> list[str]:
    """Arguments whose type, constant or divisibility is not what Triton's launcher derives."""
    found = []
    for position, parameter in enumerate(step.kernel.params):
        name = parameter.name
        if name in step.constants or parameter.is_constexpr:
            continue
        kind, key = native_specialize_impl(
            type(BACKEND),
            step.arguments.get(name),
            parameter.is_const,
            not parameter.do_not_specialize,
            not parameter.do_not_specialize_on_alignment,
        )
        attributes = {path: a for path, a in made.attrs.items() if path[0] == position and a}
        if kind != made.signature[name] or attributes_of((position,), kind, key) != attributes:
            found.append(name)
    return found


def attributes_of(path: tuple[int, ...], kind: Any, key: Any) -> dict[tuple[int, ...], Any]:
    """What Triton's launcher tells the compiler of an argument, or of the fields of a group."""
    if isinstance(kind, tuple):
        fields = (
            attributes_of((*path, i), *pair) for i, pair in enumerate(zip(kind, key, strict=True))
        )
        return {place: attribute for field in fields for place, attribute in field.items()}
    attribute = BACKEND.parse_attr(key) if isinstance(key, str) and kind != "constexpr" else []
    return {path: attribute} if attribute else {}


def to_ir(made: Any) -> None:
    """Triton's IR of a kernel; nothing is generated from it."""
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    made.make_ir(
        TARGET,
        OPTIONS,
        BACKEND.get_codegen_implementation(OPTIONS),
        BACKEND.get_module_map(),
        context,
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
