"""Where real tokens lie: the kernel against Python, and what may be wrong with the option."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprefix.kernels import launch_forward, launch_spans
from fastprefix.kernels.spans import CHUNK
from fastprefix.options import Options
from fastprefix_testing.launchers import interpreted, operands
from fastprefix_testing.problems import tiles

pytestmark = interpreted


def span(real: list[bool]) -> list[int]:
    """First real token, the first padding behind it or the end, behind the last real token."""
    if True not in real:
        return [len(real), 0, 0]
    first, end = real.index(True), len(real) - real[::-1].index(True)
    return [first, real.index(False, first) if False in real[first:] else end, end]


def assert_spans(mask: Tensor) -> None:
    found = launch_spans(mask)
    assert found.dtype is torch.int32
    assert found.tolist() == [span(row) for row in mask.tolist()]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), max_size=4)
    )
)
def test_of_any_mask(rows):
    assert_spans(torch.tensor(rows, dtype=torch.bool).view(len(rows), -1 if rows else 0))


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_where_the_kernel_takes_several_steps(length):
    at = torch.arange(length)
    around = CHUNK - 1 if length >= CHUNK else 7
    rows = [at >= 0, at < 0, at >= around, at < around, at != around, at == around, at >= CHUNK]
    assert_spans(torch.stack(rows))


def test_of_a_part_of_a_mask_whose_neighbours_say_otherwise():
    whole = torch.ones(4, 40, dtype=torch.bool)
    inside = whole[1:-1, 3:-3]
    inside[0, :5] = False
    inside[1, -5:] = False
    assert_spans(inside)
    assert_spans(inside[:, ::2])
    assert_spans(inside[:1].expand(3, -1))


def test_tiles_outside_of_a_span_are_not_read():
    inputs, rule = operands(tiles(B=3, Hq=2, Hkv=1, Lq=3, Lk=200, P=7, D=16).draw())
    query, key, value, *prefix = inputs
    at = torch.arange(200)
    mask = torch.stack([at >= 150, at < 37, at >= 0])
    far = torch.stack([at < 96, at >= 96, at < 0])[:, None, :, None]
    options = Options(**rule, key_padding_mask=mask)
    expected, _ = launch_forward(*inputs, options)
    strayed = (x.masked_fill(far, float("nan")) for x in (key, value))
    out, _ = launch_forward(query, *strayed, *prefix, options._replace(spans=launch_spans(mask)))
    torch.testing.assert_close(out, expected)


def test_spans_of_another_batch_are_refused():
    inputs, rule = operands(tiles(B=2, Hq=2, Hkv=1, Lk=9, D=16, padding="left").draw())
    wrong = torch.zeros(3, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="spans must be int32"):
        launch_forward(*inputs, Options(**rule, spans=wrong))
    del rule["key_padding_mask"]
    with pytest.raises(ValueError, match="spans: takes key_padding_mask"):
        launch_forward(*inputs, Options(**rule, spans=wrong[:2]))
