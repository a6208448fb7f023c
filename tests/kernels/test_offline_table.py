"""Every row of the launch table and every feature, compiled for GPUs that are not here; lean loops.

`make test` compiles them for one target of each vendor, `pytest -m slow` for the other four, and
`make kernels` the whole product of targets, head sizes and dtypes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

TARGETS = [
    "cuda:90",
    "hip:gfx942",
    *(
        pytest.param(target, marks=pytest.mark.slow)
        for target in ("cuda:80", "cuda:100", "cuda:120", "hip:gfx1100")
    ),
]
# The rows that test_offline.py does not have: the largest heads, and fp32. A call picks a row by
# its head block (64, 128, 256) and by whether it is fp32. Of fp32, minutes of ptxas, the forward.
ROWS = {
    "bf16": ("--head-size", "256"),
    "fp32": ("--head-size", "64", "128", "256", "--kernel", "fwd"),
}
# Features that meet in a kernel without getting in each other's way, to compile fewer kernels.
TOGETHER = (
    ("padding", "sinks", "negative_scale"),
    ("attn_mask", "packed"),
    ("bool_mask", "prefix_bias"),
    ("sliding_window", "softcap"),
    ("prefix_in_window",),
    ("prefix_bias_columns", "cu_seqlens"),
    ("dropout",),
)
# Warp-instructions per 1000 matrix FLOP of the best known Triton kernels, by target and head size:
# forward without and with masks, dK and dV, dQ. Triton's 06-fused-attention and the same forward on
# plain pointers, compiled offline like ours.
BASELINES = {
    ("cuda:80", 64): (1.26, 1.63, 1.20, 0.91),
    ("cuda:80", 128): (0.98, 1.19, 1.17, 0.79),
    ("cuda:90", 64): (1.00, None, 0.64, 0.70),
    ("cuda:90", 128): (0.55, 0.92, 0.54, 0.61),
}


@cache
def compiled(*arguments: str) -> list[dict[str, Any]]:
    """The JSON report of `python -m fastprefix.kernels.offline`."""
    result = subprocess.run(
        [sys.executable, "-m", "fastprefix.kernels.offline", "--json", "--jobs", "1", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def fits(found: list[dict[str, Any]]) -> None:
    """Reports of compiled kernels, within shared memory, products of 16 bits on matrix units."""
    assert found
    for r in found:
        assert "error" not in r, r
        assert r["shared_bytes"] <= r["shared_limit"], r
        products = r["kernel"].endswith(("fwd_kernel", "dq_kernel", "dkv_kernel", "dprefix_kernel"))
        if products and r["case"]["dtype"] != "fp32":
            assert r["tensor_core_instructions"] > 0, r


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ROWS)
def test_rows_of_the_launch_table(target, dtype):
    fits(compiled("--target", target, "--dtype", dtype, *ROWS[dtype]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("features", TOGETHER, ids=" ".join)
def test_features(target, features):
    fits(compiled("--target", target, "--head-size", "32", "--features", *features))


@pytest.mark.parametrize("target", TARGETS)
def test_smaller_value_heads(target):
    fits(compiled("--target", target, "--head-size", "32", "--value-head-size", "16"))


@pytest.mark.parametrize(("target", "head_size"), BASELINES)
def test_loops_are_as_lean_as_the_best_known(target, head_size):
    unmasked, masked, dkv, dq = BASELINES[target, head_size]
    limits = {
        ("prefix_attn_fwd_kernel", "prefix"): unmasked,
        ("prefix_attn_fwd_kernel", "sequence"): unmasked,
        ("prefix_attn_fwd_kernel", "sequence, masked"): masked and masked * 1.05,
        ("prefix_attn_bwd_dq_kernel", "prefix"): dq,
        ("prefix_attn_bwd_dq_kernel", "sequence"): dq,
        ("prefix_attn_bwd_dkv_kernel", "rows"): dkv,
        ("prefix_attn_bwd_dprefix_kernel", "rows"): dkv,
    }
    seen = set()
    for r in compiled("--target", target, "--head-size", str(head_size)):
        assert r["spill_bytes"] == 0, r
        for loop in r["loops"]:
            name = (r["kernel"], loop["name"])
            seen.add(name)
            if limits.get(name) is not None:
                assert loop["per_kiloflop"] <= limits[name], (name, loop)
    assert limits.keys() <= seen
