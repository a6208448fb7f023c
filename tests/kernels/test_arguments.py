"""Groups of kernel arguments: what a launch may rely on."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fastprefix.kernels import arguments
from fastprefix.kernels.offline.cases import DECODE, DECODE_MEETINGS, MEETINGS, Case, launches

CASES = [
    Case("cuda:90"),
    Case("cuda:90", **DECODE),
    *(Case("cuda:90", features=features, length=64, query_length=64) for features in MEETINGS),
    *(Case("cuda:90", features=features, **DECODE) for features in DECODE_MEETINGS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(case.features) or "plain")
def test_groups_hold_tensors_or_numbers_under_names_of_their_own(case):
    steps = launches(case)
    assert {step.kernel.__name__ for step in steps} >= {"prefix_attn_bwd_dq_kernel"}
    for step in steps:
        fields = 0
        for value in step.arguments.values():
            if isinstance(value, tuple):
                tensors = [isinstance(x, torch.Tensor) for x in value if x is not None]
                assert all(tensors) or not any(tensors), (step.kernel.__name__, value)
            fields += len(value) if isinstance(value, tuple) else 1
        assert len(step.values) == fields, step.kernel.__name__


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("prefix_attn_decode_kernel", Case("cuda:90", features=DECODE_MEETINGS[1], **DECODE)),
        ("prefix_attn_fwd_kernel", Case("cuda:90", features=("padding",), length=64)),
    ],
)
def test_what_grows_with_a_text_is_in_no_group(kernel, case):
    step = next(s for s in launches(case) if s.kernel.__name__ == kernel)
    grouped = [v._asdict() for v in step.arguments.values() if isinstance(v, tuple)]
    told = {name for group in grouped for name, value in group.items() if value is not None}
    growing = {"Lk", "pb"}
    if kernel == "prefix_attn_decode_kernel":
        growing |= {"P", "B", "n_units", "n_splits", "split", "first_key", "first_row"}
    assert not told & growing


def test_strides_have_the_names_of_tensors_and_dimensions():
    q, bias = torch.empty(2, 4, 8, 16), torch.empty(4)
    found = arguments.strides(q=q, pad=None, bias=bias)
    assert (found.qb, found.qh, found.qm) == (512, 128, 16)
    assert (found.pb, found.pn) == (0, 0)
    assert (found.bh, found.bm, found.bn) == (1, 0, 0)
    assert found.kb is None


@pytest.mark.parametrize(
    ("size", "unit"), [(16, 1), (64, 1), (72, 8), (88, 8), (8, 8), (100, 4), (6, 2), (7, 1)]
)
def test_the_unit_of_strides_is_what_triton_does_not_know(size, unit):
    q, pk = torch.empty(2, 4, 8, size), torch.empty(4, 3, size)
    # nothing but the operands counts
    found = arguments.strides(q=q, pk=pk, pad=torch.empty(2, 7), mask=torch.empty(2, 4, 8, 3))
    assert arguments.stride_unit(found) == unit
    sliced = arguments.strides(q=torch.empty(2, 4, 8, 72)[..., :64])
    assert arguments.stride_unit(sliced) == 8


def test_sizes_that_are_multiples_of_8_load_16_bytes_at_a_time():
    """The PTX of every kernel that reads heads; real JIT functions need a process of their own."""
    readers = {"fwd", "bwd_delta", "bwd_dq", "bwd_dkv", "bwd_dprefix", "decode"}
    names = {f"prefix_attn_{name}_kernel" for name in readers}
    script = (
        "import json\n"
        "from fastprefix.kernels.offline import cases, report\n"
        f"names = {names}\n"
        "found = {}\n"
        "for extra in ({'query_length': 64, 'length': 64}, cases.DECODE):\n"
        "    for step in cases.launches(cases.Case('cuda:80', 24, **extra)):\n"
        "        if step.kernel.__name__ in names - found.keys():\n"
        "            compiled = report.compile_launch(step, 'cuda:80')\n"
        "            found[step.kernel.__name__] = compiled.asm['ptx']\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == names
    for name, ptx in found.items():
        assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S*", ptx), name  # 16 bytes
        assert not re.search(r"ld\.global\S*\.b16", ptx), name
