"""Every kernel compiled for six GPUs that are not here: it fits, spills nothing, uses MMA units.

Compilation needs real JIT functions, so it runs in processes without the interpreter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from fastprefix.kernels import launch
from fastprefix.kernels.offline import (
    FEATURES,
    Case,
    Failure,
    Report,
    launches,
    loop_names,
    main,
    parse_target,
    violations,
)
from fastprefix.kernels.problem import Problem

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100")
SHARED_LIMIT = {
    "cuda:80": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "cuda:120": 101_376,
    "hip:gfx942": 65_536, "hip:gfx1100": 65_536,
}  # fmt: skip
MMA = ("fwd_kernel", "dq_kernel", "dkv_kernel", "dprefix_kernel")
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


def compile_offline(*arguments: str) -> list[dict]:
    """Its report as JSON."""
    result = offline("--json", "--jobs", "2", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def main_path() -> list[dict]:
    return compile_offline("--target", *TARGETS, "--head-size", "64", "128")


@pytest.fixture(scope="module")
def variants() -> list[dict]:
    """Padding, no causality, decode, fp16, fp32 and the largest head size on a few targets."""
    return [
        *compile_offline(
            "--target", "cuda:80", "cuda:90", "--head-size", "64", "--features", "padding"
        ),
        *compile_offline(
            "--target", "cuda:80", "--head-size", "64", "--dtype", "fp16", "fp32", "--bidirectional"
        ),
        *compile_offline("--target", "cuda:120", "--head-size", "256"),
        *compile_offline("--target", "cuda:90", "--head-size", "128", "--query-length", "1"),
    ]


def judge(found: dict) -> None:
    case, kernel = found["case"], found["kernel"]
    label = f"{kernel} for {case}: {found}"
    assert found["shared_bytes"] <= SHARED_LIMIT[case["target"]], label
    assert found["spill_bytes"] == 0, label
    assert found["spill_instructions"] == 0, label
    if kernel.endswith(MMA) and case["dtype"] != "fp32":
        assert found["tensor_core_instructions"] > 0, label


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_main_path(main_path, target, head_size):
    found = [
        r for r in main_path if (r["case"]["target"], r["case"]["head_size"]) == (target, head_size)
    ]
    assert {r["kernel"] for r in found} == KERNELS
    for r in found:
        judge(r)


def test_variants(variants):
    assert variants
    for r in variants:
        judge(r)


def test_hot_loops_are_found_and_named(main_path):
    """Every sweep of the source is a loop of the machine code, and one iteration is one tile."""
    expected = {
        "fwd_kernel": ["prefix", "prefix tail", "sequence", "sequence, masked"],
        "dkv_kernel": ["rows, masked", "rows"],
        "dprefix_kernel": ["rows"],
    }
    for r in main_path:
        nvidia = r["case"]["target"].startswith("cuda")
        for suffix, names in expected.items():
            if r["kernel"].endswith(suffix):
                assert [loop["name"] for loop in r["loops"]] == names, r
        for loop in r["loops"]:
            assert loop["matrix_instructions"] > 0, r
            assert sum(loop["shapes"].values()) == loop["matrix_instructions"]
            assert not nvidia or loop["iterations"] == 1, r
            assert loop["per_kiloflop"] == pytest.approx(
                1000 * loop["instructions"] * r["tile"][2] / loop["flops"]
            )


def test_unmasked_forward_loops_are_lean(main_path):
    """Instructions per 1000 FLOP of the unmasked forward loops: a guard against regressions."""
    most = {("cuda:80", 64): 1.35, ("cuda:80", 128): 1.1, ("cuda:90", 64): 1.0}
    for r in main_path:
        limit = most.get((r["case"]["target"], r["case"]["head_size"]))
        if limit is not None and r["kernel"].endswith("fwd_kernel"):
            for loop in r["loops"]:
                if loop["name"] in ("prefix", "sequence"):
                    assert loop["per_kiloflop"] <= limit, (r["case"], loop)


def test_programs_that_fit_a_multiprocessor(main_path):
    for r in main_path:
        assert r["occupancy"]["blocks"] >= 1, r
        assert r["occupancy"]["blocks"] == min(r["occupancy"]["by_limit"].values())


def test_a_second_run_disassembles_nothing(tmp_path):
    """Reports are kept beside Triton's compiled kernels; without cuobjdump only those can serve."""
    one = ("--target", "sm_80", "--head-size", "16", "--kernel", "delta", "--json")
    first = offline(*one, TRITON_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    files = sorted(tmp_path.rglob("*"))
    assert any(file.name == "costs.json" for file in files)
    costs = next(file for file in files if file.name == "costs.json")
    costs.write_text(costs.read_text().replace('"registers": ', '"registers": 7'))
    again = json.loads(offline(*one, TRITON_CACHE_DIR=str(tmp_path)).stdout)
    (was,) = json.loads(first.stdout)
    assert again == [
        was | {"registers": int(f"7{was['registers']}"), "occupancy": again[0]["occupancy"]}
    ]
    assert sorted(tmp_path.rglob("*")) == files


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


def test_collecting_launches_leaves_the_launchers_as_they_were():
    run, target_of = launch.Launch.run, launch.target_of
    steps = launches(Case("hip:gfx942", features=("padding",)))
    assert {step.kernel.__name__ for step in steps} == KERNELS
    assert (launch.Launch.run, launch.target_of) == (run, target_of)


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


def test_every_feature_of_the_launchers_can_be_compiled():
    """A keyword that a launcher gains needs a line in FEATURES."""
    known = {"query", "key", "value", "prefix_key", "prefix_value", "is_causal", "scale", "target"}
    keywords = {field.name for field in dataclasses.fields(Problem)} - known
    made = {name for make in FEATURES.values() for name in make(Case("cuda:80"))}
    assert keywords <= made


def report(**changes) -> Report:
    """A report without fault, but for the changes."""
    case = Case(**({"target": "cuda:80"} | changes.pop("case", {})))
    limits = {"shared_bytes": 1024, "shared_limit": 2048, "programs": 1, "registers": 64}
    counts = {"spill_bytes": 0, "spill_instructions": 0, "tensor_core_instructions": 8}
    found = {
        "case": case, "kernel": "prefix_attn_fwd_kernel", "tile": launch.Tile(64, 64, 4, 2),
        "instructions": 100, "loops": (), "occupancy": None, "traffic": None,
    }  # fmt: skip
    return Report(**(found | limits | counts | changes))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (report(), []),
        (report(shared_bytes=4096), ["4096 bytes of shared memory, 2048 exist"]),
        (report(spill_bytes=8, spill_instructions=2), ["spills 8 bytes, 2 instructions"]),
        (report(spill_bytes=8, case={"dtype": "fp32"}), []),
        (report(spill_bytes=8, case={"head_size": 256}), []),
        (report(tensor_core_instructions=0), ["does not use the matrix units"]),
        (report(tensor_core_instructions=0, kernel="prefix_attn_bwd_delta_kernel"), []),
        (Failure(Case("cuda:80"), "k", "PassError: no\nmore"), ["does not compile: PassError: no"]),
    ],
)
def test_violations(found, said):
    assert violations(found) == said
