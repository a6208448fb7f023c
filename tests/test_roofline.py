"""The roofline model: its sums by hand, its sense, its files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import roofline


@pytest.fixture
def shape():
    return roofline.Shape("decode", B=4, Hq=8, Hkv=2, P=100, L=28, D=64)


def test_expanded_decoding_reads_the_prefix_once_per_row(shape):
    (phase,) = roofline.expanded(shape, roofline.DEVICES[0])
    assert phase.bytes == 4 * 128 * (2 * 2 * 64 * 2) + 2 * 4 * 8 * 64 * 2
    assert phase.flops == 4 * (2 * 4 * 16) * 128 * 64  # 4 rows a head, padded to 16


def test_ours_reads_it_once(shape):
    more = replace(shape, P=shape.P + 64)
    device = replace(roofline.DEVICES[0], multiprocessors=1)  # one part, whatever the length
    ours, longer = (roofline.ours(s, device) for s in (shape, more))
    assert longer[0].bytes - ours[0].bytes == 64 * (2 * 2 * 64 * 2)
    assert longer[1] == ours[1]  # the merge


def test_a_phase_takes_the_slower_of_memory_and_arithmetic():
    device = roofline.Device("d", "sm", 1000, 1, 1, "none")  # 1e6 bytes or 1e6 FLOP a us
    assert roofline.microseconds([roofline.Phase("p", 5_000_000, 0, 0)], device) == 5
    assert roofline.microseconds([roofline.Phase("p", 5_000_000, 9_000_000, 0)], device) == 9
    assert roofline.microseconds([roofline.Phase("p", 0, 0, 2)], device) == 2 * roofline.LAUNCH_US


def test_one_row_never_gains_and_many_long_ones_do():
    for device in roofline.DEVICES:
        one = roofline.compare(roofline.Shape("decode", 1, 32, 8, 1024, 256), device)
        many = roofline.compare(roofline.Shape("decode", 128, 32, 8, 8192, 256), device)
        assert roofline.ratio(one) < 1
        assert roofline.ratio(many) > 5


def test_longer_prefixes_cross_over_no_later():
    for device in roofline.DEVICES:
        found = [roofline.crossover(P, device) or 10**9 for P in roofline.PREFIXES]
        assert found == sorted(found, reverse=True)


def test_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    roofline.main(["--output", str(tmp_path)])
    assert "MODEL" in capsys.readouterr().out
    written = json.loads((tmp_path / "roofline.json").read_text())
    assert written["about"]["note"].startswith("MODEL")
    assert len(written["rows"]) == len(roofline.SHAPES) * len(roofline.DEVICES)
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
