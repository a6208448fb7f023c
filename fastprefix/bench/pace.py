"""How long a machine takes for what the suites do."""

from __future__ import annotations

import torch

from fastprefix.training.speed import product_ms

# Milliseconds of a product in bfloat16 on two cores with AMX: the suites' times are those there.
BASE_MS = 0.8


def pace(dtype: str, device: torch.device) -> float:
    """Times as slow as the machine that the suites' times are based on."""
    return product_ms(getattr(torch, dtype), device) / BASE_MS
