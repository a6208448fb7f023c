"""A case of a suite: one thing to do, and everybody's way to do it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Figures = dict[str, list[float]]  # milliseconds by the name of a figure, one or more samples each

OURS = "fastprefix"  # the provider that all others are compared with


@dataclass(frozen=True)
class Work:
    """A provider that is ready.

    Attributes:
        result: what the provider computes, to be compared with what is right.
        run: does the work once and returns its times.
        peak: does as much of it as reaches its peak memory; None for all.
    """

    result: Callable[[], list[Tensor]]
    run: Callable[[], Figures]
    peak: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case(ABC):
    """One row of a suite. Subclasses are frozen dataclasses, so that a child process gets them.

    Attributes:
        suite: name of the suite.
        figures: what is timed, by name, in words; the first one is the most important.
        bound: the provider that does less than the others, as a lower bound; it is not compared.
        rounds: fewest rounds that are measured.
        warm_up: whether a round comes before those that count.
        budget_s: about how many seconds all rounds together should take.
    """

    suite: ClassVar[str]
    figures: ClassVar[dict[str, str]] = {"ms": "ms"}
    bound: ClassVar[str | None] = None
    rounds: ClassVar[int] = 5
    warm_up: ClassVar[bool] = True
    budget_s: ClassVar[float] = 3.0

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of the case, unique in its suite."""

    @property
    @abstractmethod
    def tolerance(self) -> float:
        """Largest relative error, norm by norm, of a right result."""

    @abstractmethod
    def providers(self) -> tuple[str, ...]:
        """Who is asked, :data:`OURS` first. Asked is not able: see :meth:`make`."""

    @abstractmethod
    def inputs(self, device: torch.device) -> Any:
        """What all providers start from; it is in no figure of time or memory."""

    @abstractmethod
    def exact(self, inputs: Any) -> list[Tensor]:
        """The right results."""

    @abstractmethod
    def make(self, provider: str, inputs: Any) -> Work:
        """Sets a provider up: the same for time and for memory.

        Raises:
            NotImplementedError: it cannot do this case.
            ImportError: its package is not installed.
        """

    @abstractmethod
    def held_bytes(self, provider: str) -> int:
        """About how many bytes a provider takes beyond the inputs, reckoned from the shapes."""

    @abstractmethod
    def expected_s(self, pace: float = 1.0) -> float:
        """About how many seconds the case takes, its memory included.

        Args:
            pace: see :func:`fastprefix.bench.pace.pace`.
        """

    def tokens(self) -> dict[str, int]:
        """By figure, how many tokens are made in its time; for tokens per second."""
        return {}

    def fields(self) -> dict[str, Any]:
        """What describes the case in a record."""
        return asdict(self)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> Callable[[], Figures]:
    """The time of a call, the host's included."""

    def run() -> Figures:
        synchronize(device)
        begin = time.perf_counter()
        result = call()
        synchronize(device)
        ms = 1e3 * (time.perf_counter() - begin)
        del result  # after the clock has stopped
        return {"ms": [ms]}

    return run
