"""Every kernel compiled for six GPUs that are not here: it fits, spills nothing, uses MMA units.

Compilation needs real JIT functions, so it runs in processes without the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

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
# RDNA3 has 256 registers and keeps WMMA operands twice: at D 128 no tile of the backward fits.
MAY_SPILL = {("hip:gfx1100", 128)}


def compile_offline(*arguments: str) -> list[dict]:
    """The report of `python -m fastprefix.kernels.offline` as JSON."""
    result = subprocess.run(
        [sys.executable, "-m", "fastprefix.kernels.offline", "--json", "--jobs", "2", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def main_path() -> list[dict]:
    return compile_offline("--target", *TARGETS, "--head-size", "64", "128")


@pytest.fixture(scope="module")
def variants() -> list[dict]:
    """Padding, no causality, decode, fp16, fp32 and the largest head size on a few targets."""
    return [
        *compile_offline("--target", "cuda:80", "cuda:90", "--head-size", "64", "--padding"),
        *compile_offline(
            "--target", "cuda:80", "--head-size", "64", "--dtype", "fp16", "fp32", "--bidirectional"
        ),
        *compile_offline("--target", "cuda:120", "--head-size", "256"),
        *compile_offline("--target", "cuda:90", "--head-size", "128", "--query-length", "1"),
    ]


def judge(found: dict, spills_allowed: bool) -> None:
    case, kernel = found["case"], found["kernel"]
    label = f"{kernel} for {case}: {found}"
    assert found["shared_bytes"] <= SHARED_LIMIT[case["target"]], label
    if not spills_allowed:
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
        backward = "bwd" in r["kernel"]
        judge(r, spills_allowed=backward and (target, head_size) in MAY_SPILL)


def test_variants(variants):
    assert variants
    for r in variants:
        judge(r, spills_allowed=False)
