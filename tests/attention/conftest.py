"""The backends that the tests of the operator run."""

from __future__ import annotations

import importlib.util
import os

import pytest


@pytest.fixture(params=["reference", "composed", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend by name."""
    return usable(request.param)


@pytest.fixture(params=["reference", "composed"])
def masking_backend(request: pytest.FixtureRequest) -> str:
    """The backends that take attn_mask, D != Dv and float64."""
    return request.param


@pytest.fixture(params=["composed", "triton"])
def fused_backend(request: pytest.FixtureRequest) -> str:
    """The backends that run as a registered op."""
    return usable(request.param)


@pytest.fixture
def triton() -> str:
    """The triton backend only, for tests that have cases of their own for it."""
    return usable("triton")


def usable(backend: str) -> str:
    """Skips where Triton, or its interpreter, is not at hand."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        if os.environ["TRITON_INTERPRET"] != "1":
            pytest.skip("the CPU runs Triton in its interpreter only")
    return backend
