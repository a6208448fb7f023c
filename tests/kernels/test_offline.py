"""Offline compilation: cases and their launches, the names of loops, reports, what is a violation.

What the kernels compile to is in test_offline_table.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprefix.attention.selection import BACKENDS
from fastprefix.kernels import launch, tilings
from fastprefix.kernels.offline.__main__ import main
from fastprefix.kernels.offline.cases import (
    FEATURES,
    TARGETS,
    Case,
    full_jobs,
    launch_target,
    launches,
    parse_target,
    table_jobs,
)
from fastprefix.kernels.offline.report import (
    Failure,
    NamedLoop,
    Report,
    figures_digest,
    loop_names,
    violations,
)
from fastprefix.options import OPTIONS

KERNELS = {
    "prefix_attn_fwd_kernel",
    "prefix_attn_bwd_delta_kernel",
    "prefix_attn_bwd_dq_kernel",
    "prefix_attn_bwd_dkv_kernel",
    "prefix_attn_bwd_dprefix_kernel",
    "prefix_attn_bwd_dprefix_reduce_kernel",
}


def offline(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m fastprefix.kernels.offline` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fastprefix.kernels.offline", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"} | env,
        capture_output=True,
        text=True,
    )


def test_a_second_run_disassembles_nothing(tmp_path):
    """Reports are kept beside Triton's compiled kernels; without cuobjdump only those can serve."""
    one = ("--target", "sm_80", "--head-size", "16", "--kernel", "delta", "--json")
    first = offline(*one, TRITON_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    files = sorted(tmp_path.rglob("*"))
    assert any(file.name == "costs.json" for file in files)
    costs = next(file for file in files if file.name == "costs.json")
    kept = json.loads(costs.read_text())
    figures = kept["figures"] | {"registers": int(f"7{kept['figures']['registers']}")}
    costs.write_text(json.dumps({"figures": figures, "sha256": figures_digest(figures)}))
    again = json.loads(offline(*one, TRITON_CACHE_DIR=str(tmp_path)).stdout)
    (was,) = json.loads(first.stdout)
    assert again == [
        was | {"registers": int(f"7{was['registers']}"), "occupancy": again[0]["occupancy"]}
    ]
    assert sorted(tmp_path.rglob("*")) == files


def test_sizes_of_one_translate_and_are_specialised_as_triton_does():
    """Random problems, by `small_sizes.py` in a process of its own: it needs real JIT functions."""
    script = str(Path(__file__).with_name("small_sizes.py"))
    done = subprocess.run(
        [sys.executable, script, "25", "1"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == {}
    assert found["kernels"] > 50


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "cuda:70"}, "target: got 'cuda:70', takes one of cuda:80"),
        ({"dtype": "int8"}, "dtype: got 'int8', takes one of fp32"),
        ({"head_size": 300}, "head_size: got 300, takes 1 to 256"),
        ({"value_head_size": 0}, "value_head_size: got 0, takes 1 to 256"),
        ({"features": ("magic",)}, "features: got 'magic', takes padding"),
    ],
)
def test_mistakes_name_the_field(changes, said):
    case = Case(**({"target": "cuda:80"} | changes))
    with pytest.raises(ValueError, match=said):
        launches(case)


def test_architectures_by_their_usual_names():
    assert parse_target("sm_86") == "cuda:86"
    assert parse_target("gfx942") == parse_target("hip:gfx942") == "hip:gfx942"
    with pytest.raises(ValueError, match="arch: got 'sm_70', takes one of sm_80"):
        parse_target("sm_70")


def test_the_interpreter_compiles_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["--target", "sm_80"])
    assert "TRITON_INTERPRET=0" in capsys.readouterr().err


def test_launches_are_listed_for_the_target_and_not_run():
    steps = launches(Case("hip:gfx942", features=("padding",)))
    assert {step.kernel.__name__ for step in steps} == KERNELS
    assert launch.target_of(torch.device("cpu")).family == "interpreter"
    with launch.collected(tilings.Target("hopper", 132)) as outer:
        with launch.collected(tilings.Target("cdna", 304)):
            steps[0].run()
            assert launch.target_of(torch.device("cpu")).family == "cdna"
        assert not outer
        steps[1].run()
    assert outer == [steps[1]]


@pytest.mark.parametrize("target", TARGETS)
def test_jobs_cover_the_rows_and_the_features(target):
    jobs = table_jobs(target)
    assert {name for job in jobs for name in job.case.features} == FEATURES.keys()
    assert set(jobs) <= set(full_jobs())
    # alone, too
    alone = {job.case.features for job in full_jobs() if job.case.target == target}
    assert {(name,) for name in FEATURES} <= alone


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("P", "keys"), [(3, 16), (16, 16), (20, 32), (32, 32), (500, 512)])
def test_short_prefixes_have_tiles_of_few_keys(target, P, keys):
    for head_size in (64, 128, 256):
        steps = launches(Case(target, head_size, prefix=P))
        (tile, *_) = (x.tile for x in steps if x.kernel.__name__.endswith("dprefix_kernel"))
        family = launch_target(target).family
        _, table = tilings.row("dprefix", family, head_size, torch.bfloat16)
        assert tile.keys == min(keys, table.keys)
        assert tile.keys < table.keys or tile == table


@pytest.mark.parametrize(
    ("features", "count", "first"),
    [
        ((), 4, "prefix"),
        (("softcap",), 4, "prefix"),
        (("sliding_window",), 5, "prefix"),
        (("prefix_in_window",), 6, "prefix, window's edge"),
        (("sliding_window",), 3, "1 of 3"),
    ],
)
def test_names_of_loops_follow_the_features(features, count, first):
    names = loop_names("prefix_attn_fwd_kernel", features, count)
    assert (len(names), names[0]) == (count, first)


def test_names_of_loops_where_whole_tiles_have_none_of_their_own():
    assert loop_names("prefix_attn_bwd_dq_kernel", (), 2, unmasked_loop=False) == [
        "prefix",
        "sequence",
    ]
    assert loop_names("prefix_attn_bwd_dkv_kernel", ("softcap",), 1, unmasked_loop=False) == [
        "rows"
    ]


def test_every_feature_of_the_launchers_can_be_compiled():
    """An option that the launchers gain needs a line in FEATURES."""
    taken = BACKENDS["triton"].features
    keywords = {
        name
        for name, option in OPTIONS.items()
        if not option.features or any(feature.name in taken for feature in option.features)
    } - {"is_causal", "scale", "tables"}  # tables that are given change no kernel
    made = {name for make in FEATURES.values() for name in make(Case("cuda:80"))}
    assert keywords <= made


def report(**changes) -> Report:
    """A report without fault, but for the changes."""
    case = Case(**({"target": "cuda:80"} | changes.pop("case", {})))
    limits = {"shared_bytes": 1024, "shared_limit": 2048, "programs": 1, "registers": 64}
    counts = {"spill_bytes": 0, "spill_instructions": 0, "tensor_core_instructions": 8}
    found = {
        "case": case, "kernel": "prefix_attn_fwd_kernel", "tile": tilings.Tile(64, 64, 4, 2),
        "instructions": 100, "loops": (), "occupancy": None, "traffic": None,
    }  # fmt: skip
    return Report(**(found | limits | counts | changes))


def loop(waits: int) -> NamedLoop:
    """A hot loop of eight products."""
    return NamedLoop(
        start=0, instructions=64, conditional=0, matrix_instructions=8, spill_instructions=0,
        matrix_waits=waits, shapes={"HGMMA.64x128x16": 8}, flops=1 << 20, per_kiloflop=0.5,
        name="prefix",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (report(), []),
        (report(shared_bytes=4096), ["4096 bytes of shared memory, 2048 exist"]),
        (report(spill_bytes=8, spill_instructions=2), ["spills 8 bytes, 2 instructions"]),
        (report(spill_bytes=8, case={"dtype": "fp32"}), []),
        (report(spill_bytes=8, case={"head_size": 256}), []),
        (report(spill_bytes=8, case={"features": ("softcap",)}), []),
        (report(spill_bytes=0, spill_instructions=None), []),
        (report(tensor_core_instructions=0), ["does not use the matrix units"]),
        (report(tensor_core_instructions=0, kernel="prefix_attn_bwd_delta_kernel"), []),
        (report(loops=(loop(waits=2),)), []),
        (
            report(loops=(loop(waits=8),)),
            ["serialises the tensor cores: 8 waits for 8 products in the loop over prefix"],
        ),
        (Failure(Case("cuda:80"), "k", "PassError: no\nmore"), ["does not compile: PassError: no"]),
    ],
)
def test_violations(found, said, monkeypatch):
    monkeypatch.setattr("fastprefix.kernels.offline.report.HELD", True)
    assert violations(found) == said


def test_spills_and_waits_count_from_triton_3_7_on(monkeypatch):
    found = report(spill_bytes=8, tensor_core_instructions=0, loops=(loop(waits=8),))
    monkeypatch.setattr("fastprefix.kernels.offline.report.HELD", False)
    assert violations(found) == ["does not use the matrix units"]
