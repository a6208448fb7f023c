"""The merge of a decode step may be launched while the tiles still run, and waits for them.

What the kernels compile to needs Triton's JIT, so those tests run in a Python of their own.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fastprefix.kernels import launch
from fastprefix.kernels.decode import decode_forward
from fastprefix.kernels.offline import report
from fastprefix.kernels.offline.cases import DECODE, Case, launch_target, launches
from fastprefix.kernels.target import Target
from fastprefix.options import Options
from fastprefix_testing.decode import hopper
from fastprefix_testing.simulated import inside, outside, run_inside

OVERLAPPING = ("cuda:90", "cuda:100", "cuda:120")


@outside
def test_on_a_simulated_gpu():
    run_inside(__file__)


def step_on(target: Target, Lk: int = 64, P: int = 64) -> list[launch.Launch]:
    """The launches of a decode step."""
    sizes = (2, 4, 1), (2, 2, Lk), (2, 2, Lk), (2, P), (2, P)
    operands = [torch.empty(*size, 16, device="meta") for size in sizes]
    with launch.collected(target) as steps:
        decode_forward(*operands, Options(is_causal=True, scale=0.25))
    return steps


def test_only_the_merge_overlaps_and_only_where_the_device_can():
    attend, merge = step_on(replace(hopper(), overlaps=True))
    assert (attend.overlaps, merge.overlaps) == (False, True)
    assert "launch_pdl" not in attend.options
    assert merge.options["launch_pdl"] is True
    assert attend.values["overlaps"] == 1
    assert merge.constants["OVERLAPS"]
    for step in step_on(hopper()):
        assert not step.overlaps
        assert "launch_pdl" not in step.options
        assert not step.constants.get("OVERLAPS")
        assert step.values.get("overlaps") is None


def test_a_merge_without_tiles_follows_a_launch_that_is_not_ours():
    (merge,) = step_on(replace(hopper(), overlaps=True), Lk=0, P=0)
    assert not merge.overlaps
    assert not merge.constants["OVERLAPS"]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:89", *OVERLAPPING, "hip:gfx942"])
def test_devices_that_overlap_launches(target):
    assert launch_target(target).overlaps is (target in OVERLAPPING)


def compiled_on(target: str, *features: str) -> list[dict[str, str]]:
    """The code of a decode step's kernels, tiles and merge, in Triton's languages and in PTX."""
    case = Case(target, 64, "bf16", features, **DECODE)
    steps = [step for step in launches(case) if "decode" in step.kernel.__name__]
    compiled = [report.compile_launch(step, target) for step in steps]
    for step, made in zip(steps, compiled, strict=True):
        assert made.metadata.launch_pdl is step.overlaps  # Triton's launcher reads it there
    return [made.asm for made in compiled]


@inside
@pytest.mark.parametrize("target", OVERLAPPING)
@pytest.mark.parametrize(
    ("features", "known"),
    # three numbers of a row of tables and the bias do not come from the launch in front
    [((), 0), (("packed", "prefix_bias", "sinks"), 4)],
)
def test_the_merge_reads_no_partial_result_before_it_waits(target, features, known):
    tiles, merge = compiled_on(target, *features)
    assert tiles["ptx"].count("griddepcontrol.launch_dependents") == 1
    assert "griddepcontrol.wait" not in tiles["ptx"]
    # newer Tritons have an operation of their own
    (before, after) = re.split(r"griddepcontrol\.wait|tt\.grid_dependency_wait", merge["ttir"])
    assert before.count("tt.load") == known
    assert "tt.load" in after
    (before, after) = merge["ptx"].split("griddepcontrol.wait")
    assert ("ld.global" in before) is (known > 0)
    assert "ld.global" in after
    assert "st.global" not in before
    assert not re.search(r"\b(bra|ret)\b", before)  # every program waits


@inside
def test_older_devices_know_nothing_of_it():
    assert all("griddepcontrol" not in asm["ptx"] for asm in compiled_on("cuda:80"))
