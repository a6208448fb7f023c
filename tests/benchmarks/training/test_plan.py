"""Which runs there are, and when an old result still counts."""

from dataclasses import replace

import pytest

from training.plan import (
    BUDGETS,
    METHODS,
    Method,
    Run,
    best_rates,
    first_runs,
    further_runs,
)


@pytest.mark.parametrize("task", list(METHODS))
def test_every_method_runs_with_all_its_seeds_at_its_rate(task):
    first = first_runs(task)
    rates = best_rates({run: run.learning_rate for run in first}, METHODS[task])
    runs = [*first, *further_runs(task, rates)]
    assert len({run.key for run in runs}) == len(runs)
    for method in METHODS[task]:
        at = [r.seed for r in runs if r.method is method and r.learning_rate == rates[method.name]]
        assert sorted(at) == sorted(method.seeds)
    assert {run.budget for run in runs} == {BUDGETS[task]}


def test_four_methods_have_three_seeds_and_two_have_them_at_every_rate():
    runs = first_runs("e2e")
    assert sum(len(m.seeds) == 3 and bool(m.rates) for m in METHODS["e2e"]) == 4
    for name in ("prefix", "prefix-mlp2"):
        assert sum(run.method.name == name for run in runs) == 9


def test_the_best_rate_is_that_of_the_lowest_mean_loss_and_never_of_a_nan():
    a = Method("a", "A", "full", rates=(1.0, 2.0, 3.0), seeds=(5, 6))
    b = Method("b", "B", "full", like="a")
    losses = {
        Run("e2e", a, rate, seed, BUDGETS["e2e"]): loss
        for rate, seed, loss in [
            (1.0, 5, float("nan")), (2.0, 5, 0.3), (3.0, 5, 0.4), (1.0, 6, 0.1), (2.0, 6, 0.9)
        ]
    }  # fmt: skip
    assert best_rates(losses, [a, b]) == {"a": 3.0, "b": 3.0}
    with pytest.raises(ValueError, match="not at"):
        best_rates({}, [a])
    with pytest.raises(ValueError, match="no learning rate of its own"):
        best_rates({}, [b])


def test_a_method_has_rates_or_a_relative():
    for fields in ({}, {"rates": (1.0,), "like": "b"}):
        with pytest.raises(ValueError, match="rates or like"):
            Method("a", "A", "full", **fields)


def test_a_fingerprint_changes_with_all_that_matters_and_nothing_else():
    method = METHODS["e2e"][1]
    run = Run("e2e", method, 1e-2, 0, BUDGETS["e2e"])
    told = replace(method, title="other words", rates=(1.0,), seeds=(5,), every_rate=False)
    same = replace(run, method=told)
    assert same.fingerprint("x") == run.fingerprint("x")
    others = [
        replace(run, seed=1),
        replace(run, learning_rate=2e-2),
        replace(run, budget=replace(run.budget, steps=1)),
        replace(run, method=replace(method, options={"num_virtual_tokens": 21})),
        replace(run, method=replace(method, kind="prompt")),
        replace(run, method=replace(method, train_size=3)),
    ]
    prints = {run.fingerprint("x"), run.fingerprint("y"), *(o.fingerprint("x") for o in others)}
    assert len(prints) == 8
