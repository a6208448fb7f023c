"""A whole model: tokens per second of generate, time and memory of a training step."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.bench import language_model as lm

from .kernels import LOADED
from .records import run_units

WARM = 8  # tokens before the clock starts: what a compiled model records, it records here


@dataclass(frozen=True)
class Generation:
    """Greedy, one prompt in front of every row; times are those of the steps after WARM."""

    B: int
    P: int
    L: int
    new: int
    static: bool

    @property
    def label(self) -> str:
        """As tables write it."""
        cache = "static cache, compiled" if self.static else "dynamic cache"
        return f"generate B{self.B} P{self.P} text {self.L}, {cache}"


@dataclass(frozen=True)
class Training:
    """Forward and backward of a frozen model with a learned prefix."""

    B: int
    P: int
    L: int

    @property
    def label(self) -> str:
        """As tables write it."""
        return f"training step B{self.B} P{self.P} text {self.L}"


# The most important first. Compilation of 30 layers takes long, twice in the last one.
ROWS = (
    Training(8, 32, 512),
    Generation(32, 1024, 64, 72, static=False),
    Training(8, 1024, 512),
    Generation(32, 1024, 64, 72, static=True),
)
REDUCED = (Training(2, 4, 8), Generation(2, 6, 3, 4, static=False))
SECONDS = {"training": 12.0, "dynamic": 20.0, "static": 100.0}  # assumed


def main(place: str) -> None:
    """All rows on the GPU (place ""), in the interpreter ("cpu") or on a simulated device."""
    rows = REDUCED if place == "cpu" else ROWS
    if place not in ("", "cpu"):
        rows = tuple(row for row in ROWS if not getattr(row, "static", False))
    run_units((row.label, needs(row) if not place else 0.0, lambda r=row: run(r, place))
              for row in rows)  # fmt: skip


def needs(row: Generation | Training) -> float:
    """Seconds, assumed."""
    if isinstance(row, Training):
        return SECONDS["training"]
    return SECONDS["static" if row.static else "dynamic"]


def run(row: Generation | Training, place: str) -> dict[str, Any]:
    """One row of results."""
    device = torch.device("cpu" if place else "cuda")
    model = lm.build(device, torch.float32 if place == "cpu" else torch.bfloat16, place)
    found = (training if isinstance(row, Training) else generation)(row, model, place)
    return {"label": row.label, "model": lm.name_of(model), **found}


def generation(row: Generation, model: Any, place: str) -> dict[str, Any]:
    """Tokens per second behind a shared prefix, and with the prompt concatenated to every row."""
    front, texts = lm.tokens(model, 1, row.P), lm.tokens(model, row.B, row.L, seed=1)
    whole = torch.cat([front.expand(row.B, -1), texts], dim=1)
    kv = PrefixKV.prefill(model, front, check=False)
    options = {"cache_implementation": "static"} if row.static else {}
    sides: dict[str, tuple[Tensor, Callable[[], Any]]] = {
        "ours": (texts, lambda: use_prefix(model, kv, check=False)),
        "concatenated": (whole, contextlib.nullcontext),
    }
    if place not in ("", "cpu"):
        with sides["ours"][1]():
            lm.generate(model, texts, torch.ones_like(texts), new=2)
        return LOADED.take()
    last = []
    for ids, context in sides.values():
        with torch.no_grad(), context():
            logits = model(ids, use_cache=False, logits_to_keep=1).logits
            last.append(logits[:, -1].double())
    error = float((last[0] - last[1]).norm() / last[1].norm())
    if not error < 5e-2:
        raise RuntimeError(f"wrong: logits differ by {error:.2e}")
    found: dict[str, Any] = {"error": error, "tokens_per_s": {}, "peak_bytes": {}}
    for name, (ids, context) in sides.items():
        with context():
            if place == "cpu":
                lm.generate(model, ids, torch.ones_like(ids), row.new, **options)
                found["why_no_tokens_per_s"] = "timings need a device"
                continue
            speed, peak = decoding(model, ids, row, options)
            found["tokens_per_s"][name], found["peak_bytes"][name] = speed, peak
    return found


def decoding(
    model: Any, ids: Tensor, row: Generation, options: dict[str, Any]
) -> tuple[float, int]:
    """Tokens per second of the steps after WARM, and the peak memory beyond the weights."""
    times: list[float] = []

    def tick() -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the first call compiles
        times.clear()
        lm.generate(
            model, ids, torch.ones_like(ids), row.new, stopping_criteria=[lm.Clock(tick)], **options
        )
    steps = len(times) - WARM
    speed = row.B * steps / (times[-1] - times[WARM - 1])
    return speed, torch.cuda.max_memory_allocated() - held


def training(row: Training, model: Any, place: str) -> dict[str, Any]:
    """Milliseconds and peak memory of a step: ours, ours with checkpointing, prefix expanded."""
    ids, kv = lm.tokens(model, row.B, row.L), lm.random_prefix(model, row.P)
    leaves = [*kv.keys, *kv.values]

    def ours() -> Tensor:
        with use_prefix(model, kv, check=False):
            return model(ids, labels=ids, use_cache=False).loss

    def expanded() -> Tensor:
        return lm.expanded_loss(model, [kv] * row.B, ids)

    def step(loss: Callable[[], Tensor]) -> list[Tensor]:
        found = loss()
        return [found.detach(), *torch.autograd.grad(found, leaves)]

    if place not in ("", "cpu"):
        patch_model(model, check=False)
        step(ours)
        return LOADED.take()
    wanted = step(expanded)
    found: dict[str, Any] = {"error": {}, "ms": {}, "peak_bytes": {}}
    for name, loss in (("expanded", expanded), ("ours", ours), ("ours, checkpointing", ours)):
        if name == "ours":
            patch_model(model, check=False)
        if "checkpointing" in name:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        got = step(loss)
        error = max(
            float((a - b).double().norm() / b.double().norm())
            for a, b in zip(got, wanted, strict=True)
        )
        if not error < 1e-1:  # 30 layers in bf16, gradients of the first one
            raise RuntimeError(f"wrong: {name} differs by {error:.2e}")
        found["error"][name] = error
        del got
        if place == "cpu":
            found["why_no_ms"] = "timings need a device"
        else:
            found["ms"][name], found["peak_bytes"][name] = stepping(lambda f=loss: step(f))
    return found


def stepping(step: Callable[[], Any]) -> tuple[float, int]:
    """Median milliseconds of a step, the host's time included, and its peak memory."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:]), torch.cuda.max_memory_allocated() - held
