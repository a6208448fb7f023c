"""attn_mask in each form that SDPA accepts, with and without causality and padding."""

from __future__ import annotations

import pytest
import torch

from fastprefix_testing.calls import assert_as_concatenated
from fastprefix_testing.problems import Problem

B, Hq, Lq, Lk = 2, 4, 7, 12

SHAPES = {
    "full": (B, Hq, Lq, Lk),
    "per head": (1, Hq, Lq, Lk),
    "per row of the batch": (B, 1, Lq, Lk),
    "shared": (1, 1, Lq, Lk),
    "per key": (B, 1, 1, Lk),
    "per head and key": (B, Hq, 1, Lk),
    "per query": (B, 1, Lq, 1),
    "two dimensions": (Lq, Lk),
    "three dimensions": (Hq, Lq, Lk),
    "one dimension": (Lk,),
    "one number": (1, 1, 1, 1),
    "no dimension": (),
}


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if kind == "bool":
        return torch.rand(shape) < 0.7
    mask = torch.randn(shape, dtype=torch.float32 if kind == "float32" else dtype)
    if kind == "additive with -inf":
        mask = mask.masked_fill(torch.rand(shape) < 0.3, float("-inf"))
    return mask


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["bool", "additive", "additive with -inf"])
def test_kinds_and_broadcasts(masking_backend, shape, kind):
    mask = make_mask(kind, shape, torch.float32)
    problem = Problem(B=B, Hq=Hq, Lq=Lq, Lk=Lk).draw().changed(attn_mask=mask)
    assert_as_concatenated(problem, problem.by(masking_backend))


@pytest.mark.parametrize("kind", ["bool", "additive", "additive with -inf", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pad", ["none", "left"])
def test_dtypes(masking_backend, kind, dtype, is_causal, pad):
    mask = make_mask(kind, (B, 1, Lq, Lk), dtype)
    problem = (
        Problem(B=B, Hq=Hq, Lq=Lq, Lk=Lk, dtype=dtype, is_causal=is_causal, padding=pad)
        .draw()
        .changed(attn_mask=mask)
    )
    assert_as_concatenated(problem, problem.by(masking_backend))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["bool", "additive with -inf"])
@pytest.mark.parametrize(("pad", "P"), [("none", None), ("left", 5), ("row", 0)])
def test_with_causality_and_padding(masking_backend, shape, kind, pad, P):
    mask = make_mask(kind, shape, torch.float32)
    problem = (
        Problem(B=B, Hq=Hq, Lq=Lq, Lk=Lk, P=P, padding=pad, is_causal=True)
        .draw()
        .changed(attn_mask=mask)
    )
    assert_as_concatenated(problem, problem.by(masking_backend))


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_for_each_head_of_mha_and_mqa(masking_backend, is_causal):
    for Hkv in (1, 4):
        mask = make_mask("bool", (1, 4, Lq, Lq), torch.float32)
        problem = Problem(Hq=4, Hkv=Hkv, Lq=Lq, is_causal=is_causal).draw().changed(attn_mask=mask)
        assert_as_concatenated(problem, problem.by(masking_backend))


def test_mask_in_any_memory_layout(masking_backend):
    layouts = {
        "transposed": torch.rand(Lk, Lq, Hq, B).permute(3, 2, 1, 0) < 0.7,
        "expanded": (torch.rand(B, 1, 1, Lk) < 0.7).expand(B, Hq, Lq, Lk),
        "sliced": torch.rand(B, Hq, Lq, 2 * Lk)[..., ::2] < 0.7,
    }
    for mask in layouts.values():
        problem = Problem(B=B, Hq=Hq, Lq=Lq, Lk=Lk).draw().changed(attn_mask=mask)
        assert_as_concatenated(problem, problem.by(masking_backend))


def test_mask_leaves_the_prefix_alone(masking_backend):
    """A mask that hides the whole sequence leaves attention over the prefix only."""
    hidden = (
        Problem(B=B, Hq=Hq, Lq=Lq, Lk=Lk)
        .draw()
        .changed(attn_mask=torch.zeros(1, 1, dtype=torch.bool))
    )
    alone = Problem(B=B, Hq=Hq, Lq=Lq, Lk=0).draw()
    for name in ("query", "prefix_key", "prefix_value"):
        alone.tensors[name] = hidden.tensors[name]
    got = hidden.by(masking_backend, wanted=())
    torch.testing.assert_close(got, alone.by(masking_backend, wanted=()))


def test_mask_is_not_changed(masking_backend):
    mask = make_mask("additive with -inf", (1, 1, Lq, Lk), torch.float32)
    kept = mask.clone()
    Problem(Lq=Lq, Lk=Lk, is_causal=True, padding="left").draw().changed(attn_mask=mask).by(
        masking_backend
    )
    assert torch.equal(mask, kept)
