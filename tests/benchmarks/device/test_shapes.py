"""Bytes and FLOP by hand; how many problems a graph gets; a device's data sheet."""

import pytest

from device import about
from device.shapes import Shape, flop, least_bytes
from device.timing import MOST_CALLS, calls_of


def test_decoding_multiplies_every_key_twice_and_reads_it_once():
    s = Shape("decode", 4, 8, 2, 100, 28, D=64)
    assert flop(s) == 4 * 8 * 128 * (4 * 64)
    queries = 2 * 4 * 8 * 64 * 2
    assert least_bytes(s, expanded=True) == queries + 4 * 128 * (2 * 2 * 64 * 2)
    assert least_bytes(s, expanded=False) == queries + (100 + 4 * 28) * (2 * 2 * 64 * 2)


def test_a_causal_sequence_skips_what_it_does_not_see():
    s = Shape("prefill", 1, 1, 1, 10, 4, D=16)
    scores = sum(10 + i + 1 for i in range(4))
    assert flop(s) == 4 * 16 * scores
    assert flop(Shape("train", 1, 1, 1, 10, 4, D=16)) == 14 * 16 * scores


@pytest.mark.parametrize(
    ("one", "expanded", "free", "l2", "calls"),
    [
        (10, 100, 10**6, 50, 20),  # four times the cache
        (10**3, 10**3, 10**6, 50, 2),  # never fewer than two
        (10**5, 10**6, 10**6, 50, 1),  # unless the memory is full
        (1, 1, 10**9, 10**6, MOST_CALLS),
    ],
)
def test_calls_of_a_graph(one, expanded, free, l2, calls):
    assert calls_of(one, expanded, free, l2) == calls


@pytest.mark.parametrize(
    ("name", "tbytes"),
    [("NVIDIA H200", 4.8), ("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA A100-SXM4-80GB", 2.039),
     ("NVIDIA GeForce RTX 3090", 0.936)],
)  # fmt: skip
def test_data_sheets(name, tbytes):
    sheet = about.data_sheet(name)
    assert sheet is not None
    assert sheet["tbytes_per_s"] == tbytes


def test_an_unknown_device_has_none():
    assert about.data_sheet("Some GPU 5000") is None
