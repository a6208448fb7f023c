"""The tiny models of ``tests/models.py``, as fixtures."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

_spec = importlib.util.spec_from_file_location(
    "tiny_models", Path(__file__).parents[1] / "models.py"
)
assert _spec is not None
assert _spec.loader is not None
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The builders and the oracles."""
    return _tiny


@pytest.fixture(params=_tiny.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the three architectures by name."""
    return request.param


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    """A model that the test may patch."""
    return _tiny.build(architecture)


@pytest.fixture
def bare(architecture: str) -> PreTrainedModel:
    """The same weights, which nothing of fastprefix ever touches."""
    return _tiny.build(architecture)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors this small: up to 40 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
