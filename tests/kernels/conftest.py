"""Buffers that catch stray accesses of the kernels, and the simulated GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import simulated_gpu
from fastprefix.kernels.plan_cache import PLANS

GUARD = 12345.0


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """torch.empty hands out NaN between two guards; the fixture's value checks all the guards."""
    handed: list[tuple[Tensor, Tensor]] = []

    def empty(*size: int | tuple[int, ...], **options: torch.dtype) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        numel = int(torch.Size(shape).numel())  # type: ignore[arg-type]
        whole = torch.full((numel + 512,), GUARD, **options)  # type: ignore[call-overload]
        inside = whole[256 : 256 + numel].view(shape)
        if inside.is_floating_point():
            inside.fill_(float("nan"))
        handed.append((whole, inside))
        return inside

    monkeypatch.setattr(torch, "empty", empty)

    def check() -> list[tuple[Tensor, Tensor]]:
        for whole, inside in handed:
            expected = torch.full((), GUARD, dtype=whole.dtype)
            assert (whole[:256] == expected).all(), f"wrote before {tuple(inside.shape)}"
            assert (whole[-256:] == expected).all(), f"wrote past {tuple(inside.shape)}"
        return handed

    return check


@pytest.fixture(scope="session")
def driver() -> simulated_gpu.Driver:
    """The driver of the simulated GPU, for tests that are `inside`; it stays for good."""
    return simulated_gpu.install(compiled=False)


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    PLANS.clear()
