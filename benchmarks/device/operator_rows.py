"""The operator against its peers: every shape checked in float64, then timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from fastprefix.bench.peers import SIDES, Call, Side, by_backend
from fastprefix.bench.problem import TOLERANCE, Problem, error

from .kernels import LOADED
from .records import NO_TIME, device_is_lost, run_units, seconds_left
from .shapes import REDUCED, SHAPES, Shape, flop, least_bytes
from .timing import calls_of, captured, extra_memory, kernels_of, replayed

FLEX_SECONDS = {"decode": 6.0, "prefill": 8.0, "train": 18.0}  # its compilation, assumed
ROUNDS = 20


def main(place: str, shard: tuple[int, int] = (0, 1)) -> None:
    """The rows on the GPU (place ""), in the interpreter ("cpu") or on a simulated device.

    Args:
        place: see above.
        shard: (i, n): every n-th row from the i-th on.
    """
    device = torch.device("cpu" if place else "cuda")
    shapes = (REDUCED if place == "cpu" else SHAPES)[shard[0] :: shard[1]]
    if place in ("", "cpu"):
        run_units((s.label, 0.0 if place else 3.0, lambda s=s: row(s, device)) for s in shapes)
    else:
        run_units((s.label, 0.0, lambda s=s: launched(s)) for s in shapes)


def launched(s: Shape) -> dict[str, Any]:
    """Only compiles our kernels, on a simulated device."""
    by_backend("triton")(Problem(s, torch.device("cpu")))()
    return LOADED.take()


def row(s: Shape, device: torch.device) -> dict[str, Any]:
    """One row of results: what every side needs, or why it is not there."""
    first = Problem(s, device)
    exact = first.exact()
    left_out: dict[str, str] = {}
    errors: dict[str, float] = {}
    good: list[str] = []
    sides = dict(SIDES)
    if device.type == "cpu":
        sides["ours"] = Side(by_backend("triton"), False, "the interpreter's")
    for name, side in sides.items():
        try:
            needs = FLEX_SECONDS[s.work] if name.startswith("flex") and device.type != "cpu" else 0
            if s.flex and seconds_left() < needs:
                raise NotImplementedError(NO_TIME)
            errors[name] = error(side.make(first)(), exact)
            if not errors[name] < TOLERANCE[s.dtype]:
                raise RuntimeError(f"wrong: relative error {errors[name]:.2e}")
            good.append(name)
        except Exception as failure:  # a peer that fails is a result too
            if name == "ours" or device_is_lost():
                raise
            left_out[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
    found = {**asdict(s), "label": s.label, "error": errors, "left_out": left_out}
    del exact
    if device.type == "cpu":
        return {**found, "ms": {}, "why_no_ms": "timings need a device"}
    return {**found, **figures(s, first, good, left_out), **LOADED.take()}


def figures(s: Shape, first: Problem, sides: Iterable[str], left_out: dict[str, str]) -> dict:
    """Times, rates, memory and kernels of the sides that are right."""
    device = first.query.device
    one, expanded = (least_bytes(s, expanded=e) for e in (False, True))
    torch.cuda.empty_cache()  # what earlier rows left, and the reference in float64
    free, _ = torch.cuda.mem_get_info(device)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    count = calls_of(one, expanded, free, l2)
    problems = [first, *(Problem(s, device, seed) for seed in range(1, count))]
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    memory, kernels = {}, {}
    for name in sides:
        try:
            calls: list[Call] = [SIDES[name].make(p) for p in problems]
            memory[name] = extra_memory(calls[0])
            kernels[name] = kernels_of(calls[0])
            graphs[name] = captured(calls)
        except Exception as failure:
            if name == "ours" or device_is_lost():
                raise
            left_out[name] = f"not captured: {type(failure).__name__}: {failure}".splitlines()[0]
            graphs.pop(name, None)
    times = replayed(graphs, count, ROUNDS)
    rates = {}
    for name, ms in times.items():
        moved = least_bytes(s, expanded=SIDES[name].expanded)
        rates[name] = {
            "tbytes_per_s": moved / ms["median"] / 1e9,
            "tflop_per_s": flop(s) / ms["median"] / 1e9,
        }
    return {
        "ms": {name: ms["median"] for name, ms in times.items()},
        "spread_ms": {name: [ms["least"], ms["most"]] for name, ms in times.items()},
        "calls": count, "rates": rates, "extra_bytes": memory, "kernels": kernels,
    }  # fmt: skip
