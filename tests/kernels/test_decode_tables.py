"""The tables of a decoding step: built once for all layers, and gone with their tensors."""

from __future__ import annotations

import dataclasses
import gc
import threading

import pytest
import torch

from fastprefix.kernels import decode, decode_grid, decode_tables, launch
from fastprefix.kernels.decode import decode_forward
from fastprefix.options import Options
from fastprefix_testing.decode import hopper, plan_shape
from fastprefix_testing.launchers import interpreted, judge, operands
from fastprefix_testing.problems import decoding

pytestmark = interpreted


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list:
    """One entry for every call of build_tables, with a cache of its own."""
    calls, build = [], decode_tables.build_tables

    def counted(*arguments):
        calls.append(None)
        return build(*arguments)

    monkeypatch.setattr(decode_tables, "build_tables", counted)
    monkeypatch.setattr(decode_tables, "CACHE", decode_tables.TableCache())
    return calls


def test_one_build_serves_all_layers_and_steps(builds):
    case = decoding(B=2, Hq=1, Hkv=1, Lk=3, lengths=(5, 9), index=(1, 0))
    call = case.draw()
    inputs, rule = operands(call)
    longer, _ = operands(dataclasses.replace(case, Lk=4).draw())
    with launch.collected(launch.target_of(inputs[0].device)) as steps:
        for _ in range(30):
            decode_forward(*inputs, Options(**rule))
            decode_forward(*longer, Options(**rule))
    assert len(steps) == 30 * 2 * 2
    assert len(builds) == 1
    rule["prefix_index"].copy_(torch.tensor([0, -1]))
    for _ in range(2):
        found = decode_forward(*inputs, Options(**rule))
        judge(call, found)
    assert len(builds) == 2


def test_tables_go_with_their_tensors(builds):
    index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
    arguments = plan_shape(B=2, P=14, N=2), hopper()
    decode.decode_plan(*arguments, index, lengths)
    assert len(decode_tables.CACHE) == 1
    del index
    gc.collect()
    assert len(decode_tables.CACHE) == 0
    for _ in range(100):
        kept = torch.tensor([1, 0])
        decode.decode_plan(*arguments, kept, lengths)
    assert len(decode_tables.CACHE) == 1
    assert len(builds) == 101
    many = [torch.tensor([1, 0]) for _ in range(100)]
    for kept in many:
        decode.decode_plan(*arguments, kept, lengths)
    assert len(decode_tables.CACHE) == decode_tables.TableCache.SIZE


def test_inference_tensors_are_not_cached(builds):
    with torch.inference_mode():
        index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
        for _ in range(2):
            decode.decode_plan(plan_shape(B=2, P=14, N=2), hopper(), index, lengths)
    assert len(builds) == 2


def test_changes_inside_inference_mode_are_seen(builds):
    index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
    arguments = plan_shape(B=2, P=14, N=2), hopper()
    with torch.inference_mode():
        decode.decode_plan(*arguments, index, lengths)
        index.copy_(torch.tensor([1, 0]))
        plan = decode.decode_plan(*arguments, index, lengths)
    assert len(builds) == 2
    assert plan.tables.order.tolist() == [1, 0]


def test_threads_share_one_build(builds):
    index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
    barrier, found = threading.Barrier(8), []

    def work():
        barrier.wait()
        found.append(decode.decode_plan(plan_shape(B=2, P=14, N=2), hopper(), index, lengths))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len({id(plan.tables) for plan in found}) == 1


def test_explicit_plan(builds):
    call = decoding(B=2, lengths=(5, 9), index=(1, 0)).draw()
    inputs, rule = operands(call)
    tensors = rule["prefix_index"], rule["prefix_lengths"]
    own = decode_grid.shape_of(*inputs[:4], tensors[1], None, False)
    target = launch.target_of(inputs[0].device)
    plan = decode.decode_plan(own, target, *tensors, cached=False)
    judge(call, decode_forward(*inputs, Options(**rule), plan=plan))
    assert len(builds) == 1
    with pytest.raises(ValueError, match="plan: got one for"):
        decode_forward(*inputs, Options(**rule), plan=dataclasses.replace(plan, shape=plan_shape()))
