"""What a call does on the host before its kernels start, on a simulated GPU.

Kernels are specialised there, and only one is compiled.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import simulated_gpu
from fastprefix import prefix_attention
from fastprefix.attention import checks
from fastprefix.kernels import launch, launch_backward, launch_forward, plan_cache, plans
from fastprefix.kernels.plan_cache import PLANS
from fastprefix_testing.launcher_calls import (
    FIVE,
    PACKED,
    SEVERAL,
    Call,
    attend,
    causal_call,
    random_call,
)
from fastprefix_testing.simulated import inside, outside, run_inside

CPU = torch.device("cpu")


@outside
def test_on_a_simulated_gpu():
    run_inside(__file__)


COMPILE = triton.compiler.compile


def train(call: Call) -> tuple[Tensor, ...]:
    """The operator and all of its gradients."""
    leaves = [x.requires_grad_() for x in call.five]
    out = prefix_attention(*leaves, is_causal=True, backend="triton")
    return torch.autograd.grad(out, leaves, torch.empty_like(out))


def alone(call: Call) -> tuple[Tensor | None, ...]:
    """The launcher of the forward."""
    return launch_forward(*call.five, call.options)


def alone_both_ways(call: Call) -> tuple[Tensor | None, ...]:
    """The launchers of the forward and of all gradients of the tensors."""
    out, lse = launch_forward(*call.five, call.options)
    return launch_backward(out, *call.five, out, lse, call.options, (True,) * 5 + (False,) * 2)


IN_WINDOW = {"sliding_window": 32, "prefix_in_window": True}
# What a layer runs: Triton's launches, and the kernels that PyTorch runs.
LAYERS: dict[str, tuple[Callable[[Call], Any], dict[str, Any], int, dict[str, int]]] = {
    "decode": (attend, {"Lq": 1, "Lk": 256, "P": 4096, "pad": True}, 2, {}),
    "decode, buffer": (attend, {"Lq": 1, "Lk": 256, "P": 4096, "in_use": 99}, 2, {}),
    "decode, pads": (attend, {"Lq": 1, "Lk": 256, "P": 4096, "in_use": 99, "pad": True}, 2, {}),
    "prefill, buffer": (attend, {"Lq": 64, "Lk": 256, "P": 128, "in_use": 64}, 1, {}),
    "decode behind a short prefix": (attend, {"Lq": 1, "Lk": 256, "P": 20}, 1, {}),
    "prefill": (attend, {"Lq": 64, "Lk": 64, "P": 128}, 1, {}),
    "prefill, a padded text behind a prompt in a window": (
        alone,
        {"Lq": 64, "Lk": 64, "P": 128, "pad": True, **IN_WINDOW},
        1 + 1,
        {},
    ),
    # one launch more in each direction, for the tables
    "decode, several prefixes": (alone, {"Lq": 1, "Lk": 256, "P": 4096, **SEVERAL}, 1 + 2, {}),
    # the forward; delta, dQ, dK and dV, the prefix in parts, and a sum for each of its gradients
    "training": (train, {"Lq": 64, "Lk": 64, "P": 128}, 1 + 6, {}),
    "training, several prefixes": (
        alone_both_ways,
        {"Lq": 64, "Lk": 64, "P": 4096, **SEVERAL},
        (1 + 1) + (1 + 6),
        {},
    ),
    "training, packed sequences": (
        alone_both_ways,
        {"B": 1, "Lq": 64, "Lk": 64, "P": 128, **PACKED},
        (1 + 1) + (1 + 6),
        {},
    ),
}


@inside
@pytest.mark.parametrize(("layer", "shape", "launches", "kernels"), LAYERS.values(), ids=LAYERS)
def test_what_a_layer_runs(driver, layer, shape, launches, kernels):
    call = causal_call(**shape)
    layer(call)
    for planned in (True, False):
        if not planned:
            PLANS.clear()
        with simulated_gpu.counting(driver) as counts:
            layer(call)
        assert len(counts.launches) == launches
        assert counts.kernels == kernels
        assert not counts.loaded
        assert not counts.outliving


def forward(call: Call) -> tuple[Tensor | None, ...]:
    return launch_forward(*call.five, call.options)


def backward(needs: tuple[bool, ...]) -> Callable[[Call], tuple[Tensor | None, ...]]:
    def run(call: Call) -> tuple[Tensor | None, ...]:
        rest = (call.tensors["out"], call.tensors["lse"], call.options, needs)
        return launch_backward(call.tensors["grad_out"], *call.five, *rest)

    return run


class Match:
    """Compares what two calls launched, with the same inputs and each with its own memory."""

    def __init__(self, inputs: dict[int, str]) -> None:
        self.inputs = inputs
        self.pairs: dict[int, int] = {}

    def __call__(self, first: Any, second: Any) -> bool:
        if isinstance(first, tuple | list):
            return len(first) == len(second) and all(map(self, first, second))
        if isinstance(first, int) and first >> 32 and first not in self.inputs:
            return second not in self.inputs and self.pairs.setdefault(first, second) == second
        return first == second

    @property
    def one_to_one(self) -> bool:
        return len(set(self.pairs.values())) == len(self.pairs)


def launched(
    driver: simulated_gpu.Driver, run: Callable[[Call], Any], call: Call
) -> tuple[Any, list[Any]]:
    """What a call returns, and its launches."""
    driver.counts = simulated_gpu.Counts()
    returned = run(call)
    launches = driver.counts.launches
    return returned, [(x.name, x.grid, x.stream, x.arguments, x.overlaps) for x in launches]


@inside
@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("seed", range(6))
def test_a_plan_launches_what_the_launchers_do(driver, seed, step, monkeypatch):
    """Random calls. The second call has other tensors than the one that was planned."""
    chosen = random.Random(seed)
    by_plan = []
    run_plan = plans.Plan.run
    monkeypatch.setattr(plans.Plan, "run", lambda *a: by_plan.append(1) or run_plan(*a))
    for _ in range(50):
        call = random_call(chosen)
        needs = (*(chosen.random() < 0.7 for _ in range(5)), False, False)
        run = forward if step == "forward" else backward(needs)
        try:
            run(call)
        except ValueError:
            continue
        other = call.again()
        planned, launches = launched(driver, run, other)
        with monkeypatch.context() as patch, launch.recorded():  # which keeps scratch memory alive
            patch.setattr(plans, "INTERPRETED", True)  # the launchers, whatever is planned
            expected, expected_launches = launched(driver, run, other)
        match = Match(other.addresses())
        assert match(launches, expected_launches), call
        assert match.one_to_one, call
        for x, y in zip(planned, expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
                assert not x.numel() or not launches or match(x.data_ptr(), y.data_ptr())
    assert len(by_plan) >= 10


def test_arguments_are_picked_alone_and_in_groups():
    pool = list("abcdefg")
    assert tuple(plans.picker([3, 0])(pool)) == ("d", "a")
    picked = plans.picker([6, (1, 2), (5,), 0, 3, (4, 4)])(pool)
    assert list(picked) == ["g", ("b", "c"), ("f",), "a", "d", ("e", "e")]
    assert list(plans.picker([(0, (1, (2,)), 3)])(pool)) == [("a", ("b", ("c",)), "d")]


@inside
def test_scratch_memory_does_not_overlap(driver, monkeypatch):
    call = causal_call(Lq=64, Lk=64, P=128)
    call.tensors.update(
        {name: torch.zeros(8, 8, 64, 16, dtype=torch.bfloat16) for name in ("grad_out", "out")}
    )
    call.tensors["lse"] = torch.zeros(8, 8, 64)
    monkeypatch.setattr(plans, "INTERPRETED", True)
    with launch.recorded() as record:
        backward((True,) * 5 + (False,) * 2)(call)
    sizes = [x.nbytes for x in record.scratch]
    assert len(sizes) == 4  # delta, lse in base 2, and parts of both gradients of the prefix
    offsets, end = plans.offsets_of(record.scratch)
    assert offsets[0] == 0
    for offset, size, following in zip(offsets, sizes, (*offsets[1:], end), strict=True):
        assert offset % plans.ALIGNMENT == 0
        assert offset + size <= following


def kind_of(call: Call, **changed: Any) -> Any:
    """The key of a forward."""
    return key_of(forward, replace(call, **changed), ())


def key_of(run: Any, call: Call, needs: tuple[bool, ...]) -> Any:
    mask = call.options.key_padding_mask
    tensors = call.five if mask is None else (*call.five, mask)
    return plans.key_of(run, tensors, [x.data_ptr() for x in tensors], call.options, needs)


@inside
def test_calls_of_different_kinds_share_no_plan():
    base = causal_call(Lq=1, Lk=40, P=64)
    assert kind_of(base) == kind_of(base.again())

    def on(device: str, offset: int = 0) -> Call:
        """A call of which only what a key reads is there."""
        made = {
            name: SimpleNamespace(
                shape=x.shape, stride=x.stride, dtype=x.dtype, device=torch.device(device),
                get_device=lambda: torch.device(device).index, data_ptr=lambda: 4096 + offset,
            )
            for name, x in base.tensors.items()
        }  # fmt: skip
        return Call(made, base.options)

    longer = causal_call(Lq=1, Lk=40, P=64)
    longer.tensors["key"] = torch.zeros(8, 2, 50, 16, dtype=torch.bfloat16)[:, :, :40]
    masked = base.options._replace(key_padding_mask=torch.ones(8, 40, dtype=torch.bool))
    kinds = [
        kind_of(base),
        kind_of(causal_call(Lq=1, Lk=41, P=64)),
        kind_of(causal_call(Lq=1, Lk=40, P=64, dtype=torch.float16)),
        kind_of(causal_call(Lq=1, Lk=40, P=64, dtype=torch.float32)),
        kind_of(longer),
        kind_of(base, options=masked),
        kind_of(base, options=base.options._replace(scale=0.5)),
        kind_of(on("cuda:0")),
        kind_of(on("cuda:1")),
        kind_of(on("cuda:1", offset=8)),
        key_of(backward, base, (True,) * 7),
        key_of(backward, base, (False,) * 7),
    ]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before
    kinds.append(kind_of(causal_call(Lq=1, Lk=40, P=64, dtype=torch.float32)))
    torch.backends.cuda.matmul.allow_tf32 = before
    assert len(set(kinds)) == len(kinds)


@inside
def test_the_cache_is_bounded_and_forgets_the_least_recently_used(monkeypatch):
    monkeypatch.setattr(plan_cache, "SIZE", 4)
    cache = plan_cache.PlanCache()
    for i in range(100):
        cache.keep(i, str(i))
        assert cache.get(0) == "0"  # in use all the time
        assert len(cache) <= 2 * 4
    assert [cache.get(i) for i in range(96, 100)] == ["96", "97", "98", "99"]
    assert cache.get(50) is None


@inside
def test_other_tiles_on_a_device_make_other_plans(driver):
    call = causal_call(Lq=1, Lk=40, P=64)
    attend(call)
    assert len(PLANS) == 1
    launch.forget_devices()
    assert len(PLANS) == 0


@inside
def test_a_plan_runs_on_the_current_stream(driver, monkeypatch):
    call = causal_call(Lq=1, Lk=256, P=4096)
    attend(call)
    monkeypatch.setattr(driver, "stream", 7)
    with simulated_gpu.counting(driver) as counts:
        attend(call)
    assert [each.stream for each in counts.launches] == [7, 7]
    assert [each.overlaps for each in counts.launches] == [False, True]


@inside
def test_listed_launches_are_neither_planned_nor_from_a_plan(driver):
    """The offline compiler and the tuner list what a call would launch."""
    call = causal_call(Lq=1, Lk=256, P=4096)
    with launch.collected(launch.target_of(CPU)) as steps:
        forward(call)
    assert len(steps) == 2
    assert len(PLANS) == 0
    forward(call)
    with launch.collected(launch.target_of(CPU)) as steps:
        forward(call)
    assert len(steps) == 2


@inside
def test_a_plan_keeps_no_tensor_alive(driver):
    call = causal_call(Lq=1, Lk=256, P=4096, pad=True)
    with simulated_gpu.counting(driver) as counts:
        attend(call.again())
    assert len(PLANS) == 1
    assert not counts.outliving


@inside
def test_threads_share_plans_and_mix_nothing_up(driver):
    """Every launch has the tensors of one call."""
    kinds = [causal_call(Lq=1, Lk=Lk, P=4096) for Lk in (1, 16, 100, 256)]
    calls = [[kind.again() for kind in kinds] for _ in range(8)]
    driver.counts = counts = simulated_gpu.Counts()

    def work(mine: list[Call]) -> None:
        for _ in range(20):
            for call in mine:
                forward(call)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in calls]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    together = [{x.data_ptr() for x in call.five} for mine in calls for call in mine]
    every = set().union(*together)
    seen = []
    for each in counts.launches:
        inputs = every & set(flat(each.arguments))
        if inputs:
            assert inputs in together
            seen.append(inputs)
    assert len(seen) == 8 * 20 * 4
    assert len(PLANS) == len(kinds)


@inside
def test_a_kernel_that_is_compiled_is_launched_the_same_way(driver, monkeypatch):
    call = causal_call(B=1, Lq=16, Lk=16, P=0)
    launches = [launched(driver, forward, call)[1] for _ in range(2)]
    PLANS.clear()
    monkeypatch.setattr(triton.compiler, "compile", COMPILE)
    monkeypatch.setattr(driver, "device", 1)  # Triton keeps what it compiles by device
    launches += [launched(driver, forward, call)[1] for _ in range(2)]
    assert len(PLANS) == 1
    for each in launches:
        assert Match(call.addresses())(each, launches[0])


@inside
@pytest.mark.parametrize("in_use", [None, 100])
def test_a_call_like_one_that_ran_before_is_not_checked_again(driver, monkeypatch, in_use):
    call = causal_call(Lq=1, Lk=256, P=4096, pad=True, in_use=in_use)
    expected = launched(driver, attend, call)[1]
    with monkeypatch.context() as patch:
        patch.setattr(checks, "check_tensors", lambda *a: pytest.fail("checked"))
        other = call.again()
        found = launched(driver, attend, other)[1]
    names = {**call.addresses(), **other.addresses()}
    assert [x[0] for x in found] == [x[0] for x in expected]
    expected = {*FIVE, "key_padding_mask"} | ({"key_lengths"} if in_use else set())
    assert {names[x] for x in flat(found[0][3]) if x in names} == expected


FEATURES = {
    "key_lengths": torch.ones(8, dtype=torch.int32),
    "sliding_window": 100,
    "softcap": 30.0,
}
WRONG: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "key": ({"key": torch.zeros(8, 2, 255, 16, dtype=torch.bfloat16)}, ValueError),
    "value": ({"value": None}, TypeError),
    "prefix_key": ({"prefix_key": torch.zeros(2, 4096, 16)}, TypeError),
    "prefix_value": ({"prefix_value": [1.0]}, TypeError),
    "key_padding_mask": ({"key_padding_mask": [True]}, TypeError),
    "key_lengths": ({"key_lengths": torch.ones(8, 1, dtype=torch.int32)}, ValueError),
    "sliding_window": ({"sliding_window": 100.0}, TypeError),
    "softcap": ({"softcap": "30"}, TypeError),
    "prefix_in_window": ({"prefix_in_window": 2}, TypeError),
    "batch_invariant": ({"batch_invariant": 2}, TypeError),
    "is_causal": ({"is_causal": "yes"}, TypeError),
    "scale": ({"scale": "0.25"}, TypeError),
}


@inside
@pytest.mark.parametrize(("changed", "error"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("plain", [True, False])
def test_a_wrong_call_is_refused_after_a_right_one(driver, changed, error, plain):
    call = causal_call(Lq=1, Lk=256, P=4096, pad=True)
    given = {**call.tensors, "is_causal": True, "key_padding_mask": call.options.key_padding_mask}
    given |= {} if plain else FEATURES
    (name,) = changed
    with torch.no_grad():
        prefix_attention(**given, backend="triton")
        with pytest.raises(error, match=name):
            prefix_attention(**{**given, **changed}, backend="triton")
        launches = launched(driver, lambda _: prefix_attention(**given), call)[1]
    assert launches == []  # auto is composed on the CPU, plan or not


def flat(arguments: Any) -> Iterator[Any]:
    for each in arguments:
        if isinstance(each, tuple):
            yield from flat(each)
        else:
            yield each
