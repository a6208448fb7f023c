"""The suites of :mod:`fastprefix.bench` under pytest-benchmark.

    pytest benchmarks/suites --benchmark-json=out.json
    pytest benchmarks/suites/test_operator.py -k "decode and sdpa" --device cuda

A test is one provider of one case. pytest-benchmark would run all rounds of one test before the
next one begins, so that a machine which slows down meets only the later providers. Here the first
test of a case measures all of its selected providers in turn, after a check that they agree. Then
each test replays its own samples: its clock (the marker's ``timer``) stands still until the
function that is benchmarked moves it on by the next sample.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastprefix.bench.case import Case
from fastprefix.bench.measure import measure, ready
from fastprefix.bench.memory import MemoryMeter
from fastprefix.bench.suites import cases
from fastprefix.training.speed import fast_dtype


class Clock:
    """Seconds that only :meth:`advance` adds to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time, as pytest-benchmark asks for it."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves on."""
        self.now += seconds


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where and what."""
    group = parser.getgroup("fastprefix suites")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    group.addoption("--tiny", action="store_true", help="small cases; their figures say nothing")
    group.addoption(
        "--dtype", choices=("bfloat16", "float32"),
        help="of SmolLM2's weights; bfloat16, or float32 on a CPU that is faster in it",
    )  # fmt: skip
    group.addoption("--memory", action="store_true", help="measure peak memory, too")
    group.addoption("--rounds", type=int, help="rounds of each case; by its time if left out")


def pytest_configure(config: pytest.Config) -> None:
    """One dtype for all tests of a run."""
    if config.option.dtype is None:
        found = fast_dtype(torch.device(config.option.device))
        config.option.dtype = str(found).removeprefix("torch.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case and provider of the suite that the module is named after."""
    if "provider" in metafunc.fixturenames:
        found = cases(
            [metafunc.module.__name__.rpartition("test_")[2]],
            tiny=metafunc.config.getoption("--tiny"),
            dtype=metafunc.config.getoption("--dtype"),
        )
        pairs = [(case.label, provider) for case in found for provider in case.providers()]
        metafunc.parametrize(("case", "provider"), pairs, ids=["-".join(pair) for pair in pairs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here have the clock."""
    for item in items:
        if "replay" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Any:
    """Measures a case once; later tests get the same figures, or the same error."""
    device = torch.device(request.config.getoption("--device"))
    known: dict[tuple[str, str], Any] = {}

    def find(case: Case, timed: bool) -> dict[str, Any]:
        key = case.suite, case.label
        if key not in known:
            known.clear()  # tests of a case stand together
            names = _selected(request.session, case)
            try:
                if timed:
                    rounds = request.config.getoption("--rounds")
                    known[key] = measure(case, device, meter, names, rounds)
                else:
                    works, left_out = ready(case, device, names)
                    known[key] = {"providers": dict.fromkeys(works), "left_out": left_out}
            except Exception as error:
                known[key] = error
        if isinstance(known[key], Exception):
            raise known[key]
        return known[key]

    with contextlib.ExitStack() as stack:
        memory = request.config.getoption("--memory")
        meter = stack.enter_context(MemoryMeter(device)) if memory else None
        yield find


def _selected(session: pytest.Session, case: Case) -> list[str]:
    """The providers whose tests are run."""
    here = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return [each["provider"] for each in here if each.get("case") == case.label]


@pytest.fixture
def replay(benchmark: Any, measured: Any, case: str, provider: str, request: Any) -> Any:
    """What a test calls: the provider's samples become those of the benchmark."""

    def run() -> None:
        suite = request.module.__name__.rpartition("test_")[2]
        tiny, dtype = (request.config.getoption(name) for name in ("--tiny", "--dtype"))
        every = cases([suite], tiny=tiny, dtype=dtype)
        found_case = next(each for each in every if each.label == case)
        found = measured(found_case, benchmark.enabled)
        if provider in found["left_out"]:
            pytest.skip(found["left_out"][provider])
        benchmark.group = f"{suite}: {case}"
        if not benchmark.enabled:
            benchmark.pedantic(lambda: None)
            return
        mine = found["providers"][provider]
        benchmark.extra_info |= {name: mine[name] for name in mine if name != "samples"}
        benchmark.pedantic(*_replayed(mine["samples"][next(iter(found_case.figures))]))

    return run


def _replayed(samples: list[float]) -> tuple[Callable[[], None], tuple[()], None, None, None, int]:
    """The arguments of ``pedantic``: a function that takes as long as the samples, in turn."""
    turn = itertools.cycle(ms / 1e3 for ms in samples)
    CLOCK.now = 0.0
    return (lambda: CLOCK.advance(next(turn)), (), None, None, None, len(samples))
