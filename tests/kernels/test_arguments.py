"""Groups of kernel arguments: what a launch may rely on."""

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
