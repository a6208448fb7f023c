"""How a case is measured: the check comes first, providers take turns, and what fails is named."""

import os
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from fastprefix.bench.case import OURS, Case, Work
from fastprefix.bench.measure import WrongResultError, interleaved, measure, percentile, summary
from fastprefix.bench.memory import MemoryMeter
from fastprefix.bench.operator_suite import OperatorCase
from fastprefix.bench.problem import Shape

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pretended(Case):
    """Providers whose results are given, and who write down when they run."""

    results: dict
    ran: list = field(default_factory=list)
    bytes: dict = field(default_factory=dict)
    suite = "pretended"
    bound = "nothing"

    label = "case"
    tolerance = 1e-3

    def providers(self):
        return tuple(self.results)

    def inputs(self, device):
        return None

    def exact(self, inputs):
        return [torch.ones(3, dtype=torch.float64)]

    def make(self, provider, inputs):
        if isinstance(self.results[provider], Exception):
            raise self.results[provider]

        def run():
            self.ran.append(provider)
            return {"ms": [float(len(self.ran))]}

        return Work(lambda: [self.results[provider] * torch.ones(3)], run)

    def held_bytes(self, provider):
        return self.bytes.get(provider, 0)

    def expected_s(self, pace=1.0):
        return 0.0


def test_providers_take_turns_in_both_orders():
    case = Pretended({OURS: 1.0, "sdpa": 1.0, "flex": 1.0})
    found = measure(case, CPU, rounds=3)
    there = [OURS, "sdpa", "flex"]
    assert case.ran == [*there, *there, *reversed(there), *there]  # the first round warms up
    assert found["providers"][OURS]["samples"] == {"ms": [4.0, 9.0, 10.0]}
    assert found["providers"]["sdpa"]["figures"]["ms"]["median"] == 8.0


@pytest.mark.parametrize("wrong", [OURS, "sdpa"])
@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_a_wrong_provider_stops_the_case_before_anything_runs(wrong, value):
    case = Pretended({OURS: 1.0, "sdpa": 1.0, wrong: value})
    with pytest.raises(WrongResultError, match=f"pretended, case: {wrong} is wrong"):
        measure(case, CPU)
    assert case.ran == []


def test_the_bound_computes_something_else_and_is_not_compared():
    case = Pretended({OURS: 1.0, "nothing": 0.0})
    assert set(measure(case, CPU, rounds=1)["providers"]) == {OURS, "nothing"}


def test_who_cannot_is_left_out_with_the_reason():
    results = {
        OURS: 1.0, "fa2": ImportError("not installed"), "peft": ValueError("no\ncheckpointing"),
        "hydragen": NotImplementedError("has no backward"), "sdpa": 1.0,
    }  # fmt: skip
    found = measure(Pretended(results, bytes={"sdpa": 10**18}), CPU, rounds=1)
    assert set(found["providers"]) == {OURS}
    fits = found["left_out"].pop("sdpa")
    assert fits.startswith("does not fit: takes about 1000000000.0 GB, and ")
    assert found["left_out"] == {
        "fa2": "not installed", "peft": "ValueError: no", "hydragen": "has no backward",
    }  # fmt: skip


def test_fastprefix_is_never_left_out():
    with pytest.raises(ValueError, match="broken"):
        measure(Pretended({OURS: ValueError("broken"), "sdpa": 1.0}), CPU)


def test_only_the_providers_that_were_asked_for():
    case = Pretended({OURS: 1.0, "sdpa": 1.0})
    assert set(measure(case, CPU, providers=["sdpa"], rounds=1)["providers"]) == {"sdpa"}


def test_slow_work_still_gets_the_fewest_rounds():
    case = Pretended({OURS: 1.0})
    object.__setattr__(case, "budget_s", 0.0)
    found = interleaved({OURS: case.make(OURS, None).run}, case)
    assert len(found[OURS]["ms"]) == case.rounds


@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_percentiles_are_numpys(percent, count):
    values = np.random.default_rng(count).normal(size=count).tolist()
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_summary_holds_the_middle_and_the_spread():
    times = [5.0, 1.0, 2.0, 4.0, 3.0, 6.0]
    assert summary({"ms": times})["ms"] == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_memory_counts_expanded_keys_and_a_child_that_dies_gives_none():
    case = OperatorCase(Shape("decode", 8, 8, 8, 2048, 16, D=64, dtype="float32"))
    expanded = 2 * 8 * 8 * 2048 * 64 * 4
    with MemoryMeter(CPU) as meter:
        peaks = meter.peaks(case, [OURS, "sdpa"])
        assert meter.peaks(Deadly(), [OURS]) == {OURS: None}
        assert meter.peaks(case, [OURS])[OURS] == pytest.approx(peaks[OURS], abs=8e6)
    assert peaks["sdpa"] > 0.95 * expanded
    assert peaks[OURS] < 0.5 * expanded
