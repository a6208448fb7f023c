"""What the calls of one forward share: the checks of values, the conversions, the tables."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix.attention import checks
from fastprefix.attention.api import attention_with_options
from fastprefix.attention.backends import triton
from fastprefix.attention.step import Step
from fastprefix.options import Options
from fastprefix_testing.launchers import interpreted, operands
from fastprefix_testing.problems import Problem

HEADS = {"Hq": 2, "Hkv": 1}
ROWS: dict[str, Any] = {**HEADS, "B": 5, "lengths": (60, 0, 40), "index": (2, 0, -1, 1, 0)}
CASES: dict[str, Any] = {
    "decode": {**ROWS, "Lq": 1, "Lk": 9},
    "prefill": {**ROWS, "Lq": 20, "is_causal": True},
    "packed sequences": {"cu_seqlens": (0, 7, 7, 18), **HEADS, "is_causal": True},
}
# With one prefix nothing else is shared.
PADDED: dict[str, Any] = {
    "padded decode": {**HEADS, "B": 3, "Lq": 1, "Lk": 90, "P": 20, "padding": "left"},
    "padded prefill": {**HEADS, "B": 3, "Lq": 40, "P": 20, "padding": "holes", "is_causal": True},
    "padded prefill, several prefixes": {**ROWS, "Lq": 20, "is_causal": True, "padding": "right"},
}


def call_of(case: str) -> tuple[list[Tensor], Options]:
    """Tensors that need gradients, and the options."""
    inputs, rule = operands(Problem(**(CASES | PADDED)[case]).draw())
    return [x.requires_grad_() for x in inputs], Options(**rule)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A message for every value that is checked."""
    messages, check = [], checks._check_value

    def noted(holds: Tensor, message: str, values: Tensor) -> None:
        messages.append(message.partition(":")[0])
        check(holds, message, values)

    monkeypatch.setattr(checks, "_check_value", noted)
    return messages


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_layers_that_share_a_step_find_what_each_finds_alone(case, monkeypatch):
    tensors, options = call_of(case)
    step, made, make = Step(), [], triton.tables
    monkeypatch.setattr(triton, "tables", lambda *a: made.append(make(*a)) or made[-1])
    outs = [attention_with_options(*tensors, options, "triton", step)[0] for _ in range(2)]
    alone, _ = attention_with_options(*tensors, options, "triton")
    assert len(made) == 1
    expected = torch.autograd.grad(alone.square().sum(), tensors)
    for out in outs:
        assert torch.equal(out, alone)
        for x, y in zip(torch.autograd.grad(out.square().sum(), tensors), expected, strict=True):
            assert torch.equal(x, y)


@interpreted
@pytest.mark.parametrize("case", PADDED)
def test_layers_that_share_a_step_look_for_padding_once(case, monkeypatch):
    tensors, options = call_of(case)
    step, made, make = Step(), [], triton.spans
    monkeypatch.setattr(triton, "spans", lambda *a: made.append(make(*a)) or made[-1])
    mask = options.key_padding_mask
    assert mask is not None
    # layers may unpack their padding from one mask, each for itself
    layers = [options._replace(key_padding_mask=mask[:, :]) for _ in range(2)]
    outs = [attention_with_options(*tensors, each, "triton", step)[0] for each in layers]
    alone, _ = attention_with_options(*tensors, options, "triton")
    assert len(made) == 1
    expected = torch.autograd.grad(alone.square().sum(), tensors)
    for out in outs:
        torch.testing.assert_close(out, alone)
        for x, y in zip(torch.autograd.grad(out.square().sum(), tensors), expected, strict=True):
            torch.testing.assert_close(x, y)
    mask[:, :7] = False
    out, _ = attention_with_options(*tensors, layers[0], "triton", step)
    assert len(made) == 2
    torch.testing.assert_close(out, attention_with_options(*tensors, options, "triton")[0])


@interpreted
def test_layers_of_other_shapes_have_tables_of_their_own():
    step = Step()
    for case in ("decode", "prefill", "decode"):
        tensors, options = call_of(case)
        out, _ = attention_with_options(*tensors, options, "triton", step)
        assert torch.equal(out, attention_with_options(*tensors, options, "triton")[0])


@interpreted
def test_tables_of_another_call_are_refused():
    tensors, options = call_of("decode")
    for wrong in (torch.zeros(8, dtype=torch.int32), torch.zeros(8)):
        with pytest.raises(ValueError, match="tables"):
            attention_with_options(*tensors, options._replace(tables=wrong), "triton")


@interpreted
def test_a_change_in_place_is_seen():
    tensors, options = call_of("decode")
    step = Step()
    first, _ = attention_with_options(*tensors, options, "triton", step)
    assert options.prefix_index is not None
    options.prefix_index.copy_(torch.tensor([0, -1, 2, 2, 1]))
    out, _ = attention_with_options(*tensors, options, "triton", step)
    assert not torch.equal(out, first)
    assert torch.equal(out, attention_with_options(*tensors, options, "triton")[0])
    options.prefix_index.fill_(9)
    with pytest.raises(ValueError, match="prefix_index: takes"):
        attention_with_options(*tensors, options, "triton", step)


def test_values_are_checked_once_in_a_step(asked):
    tensors, options = call_of("prefill")
    step = Step()
    for _ in range(3):
        attention_with_options(*tensors, options, "composed", step)
    assert asked == ["prefix_lengths", "prefix_index"]
    longer = options._replace(prefix_lengths=torch.tensor([60, 0, 41]))
    with pytest.raises(ValueError, match="prefix_lengths"):
        attention_with_options(*tensors, longer, "composed", step)
    asked.clear()
    for _ in range(3):
        attention_with_options(*tensors, options, "composed")
    assert asked == ["prefix_lengths", "prefix_index"] * 3


def test_integers_are_converted_once():
    step, index = Step(), torch.tensor([0, 1])
    assert step.as_int32(index) is step.as_int32(index)
    assert step.as_int32(index).dtype is torch.int32
    assert step.on(index, torch.device("meta")) is step.on(index, torch.device("meta"))
    assert step.on(index, index.device) is index


@interpreted
def test_a_step_keeps_nothing_alive_after_its_end():
    tensors, options = call_of("decode")
    step = Step()
    with torch.no_grad():
        shared = step.with_tables(tuple(tensors), options._replace()).tables
    assert shared is not None
    gone = weakref.ref(shared)
    del step, shared
    gc.collect()
    assert gone() is None
