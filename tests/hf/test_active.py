"""What travels with a forward call, for layers on other devices."""

from __future__ import annotations

import pytest
import torch

from fastprefix.attention.step import Step
from fastprefix.hf.layer.active import ActivePrefix

THERE = torch.device("meta")


@pytest.fixture
def active() -> ActivePrefix:
    return ActivePrefix(None, step=Step())


def test_a_prefix_is_moved_once(active):
    query, prefix = torch.empty(2, dtype=torch.bfloat16, device=THERE), torch.zeros(3)
    moved = active.prefix_for(prefix, query)
    assert (moved.device, moved.dtype) == (query.device, query.dtype)
    assert active.prefix_for(prefix, query) is moved
    prefix.add_(1)
    assert active.prefix_for(prefix, query) is not moved
    here = torch.empty(2, dtype=torch.float32)
    assert active.prefix_for(prefix, here) is prefix


def test_what_learns_or_serves_one_call_is_moved_anew(active):
    query = torch.empty(2, device=THERE)
    learning = torch.zeros(3, requires_grad=True)
    assert active.prefix_for(learning, query) is not active.prefix_for(learning, query)
    assert active.prefix_for(learning, query).grad_fn is not None
    frozen = torch.zeros(3)
    with torch.inference_mode():
        moved = active.prefix_for(frozen, query)
    assert not active.prefix_for(frozen, query).is_inference()
    assert active.prefix_for(frozen, query) is not moved


def test_integers_are_moved_once_in_a_step(active):
    index = torch.tensor([0, 1])
    assert active.integers_on(index, THERE) is active.integers_on(index, THERE)
    assert active.integers_on(index, index.device) is index
    assert ActivePrefix(None).integers_on(index, index.device) is index
