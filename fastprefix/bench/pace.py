"""How fast a machine multiplies: which dtype its models are measured in, and how long it takes."""

from __future__ import annotations

import statistics
import time

import torch

from fastprefix.bench.case import synchronize

# Milliseconds of a product in bfloat16 on two cores with AMX: the suites' times are those there.
BASE_MS = 0.8
SLOWER = 1.5  # times as slow as float32, from which on bfloat16 is not what one would run


def product_ms(dtype: torch.dtype, device: torch.device) -> float:
    """Median milliseconds of SmolLM2's widest product, of 128 tokens, and of its backward."""
    hidden, wide = torch.ones(128, 576, dtype=dtype), torch.ones(128, 1536, dtype=dtype)
    weight = torch.ones(1536, 576, dtype=dtype).to(device)
    hidden, wide = hidden.to(device), wide.to(device)
    times = []
    for _ in range(7):
        synchronize(device)
        begin = time.perf_counter()
        torch.nn.functional.linear(hidden, weight)
        wide @ weight
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin) / 2)
    return statistics.median(times)


def model_dtype(device: torch.device) -> str:
    """bfloat16; float32 on a CPU without units for bfloat16, where nobody would run it."""
    slow, fast = (product_ms(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    return "float32" if device.type == "cpu" and slow > SLOWER * fast else "bfloat16"


def pace(dtype: str, device: torch.device) -> float:
    """Times as slow as the machine that the suites' times are based on."""
    return product_ms(getattr(torch, dtype), device) / BASE_MS
