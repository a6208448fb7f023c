"""How fast a machine multiplies, and the dtype that follows from it."""

from __future__ import annotations

import statistics
import time

import torch

SLOWER = 1.5  # times as slow as float32, from which on nobody would run a half precision


def product_ms(dtype: torch.dtype, device: torch.device) -> float:
    """Median milliseconds of SmolLM2's widest product, of 128 tokens, and of its backward."""
    hidden, wide = torch.ones(128, 576, dtype=dtype), torch.ones(128, 1536, dtype=dtype)
    weight = torch.ones(1536, 576, dtype=dtype).to(device)
    hidden, wide = hidden.to(device), wide.to(device)
    times = []
    for _ in range(7):
        _wait(device)
        begin = time.perf_counter()
        torch.nn.functional.linear(hidden, weight)
        wide @ weight
        _wait(device)
        times.append(1e3 * (time.perf_counter() - begin) / 2)
    return statistics.median(times)


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU multiplies float32 faster than a half precision.

    Those that have no instructions for bfloat16 do: with AVX2 alone it took 8 to 24 times as long.
    """
    if device.type != "cpu" or dtype is torch.float32:
        return False
    return product_ms(dtype, device) > SLOWER * product_ms(torch.float32, device)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 where :func:`is_slow`."""
    return torch.float32 if is_slow(torch.bfloat16, device) else torch.bfloat16


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
