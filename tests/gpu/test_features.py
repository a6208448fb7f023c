"""Compiled kernels against the reference in float64, feature by feature.

Every case costs the compilation of its kernels. So bfloat16 has every feature, the other dtypes
have two cases, and calls for decoding compute no gradient but in one case.
"""

from __future__ import annotations

import pytest
import torch

from fastprefix.attention.selection import BACKENDS, UNEQUAL_HEAD_SIZES
from fastprefix.options import Options, features_of

gpu = pytest.mark.gpu


def lengths(p, total):
    """Real lengths of the rows, from none to all."""
    return torch.linspace(0, total, p.B, device=p.device).long()


def padded(p, left):
    real = torch.arange(p.Lk, device=p.device)[None, :] < lengths(p, p.Lk)[:, None]
    return real.flip(1) if left else real


def in_use(p):
    """Keys in use of each row, from one for each query to all."""
    return torch.linspace(min(p.Lq, p.Lk), p.Lk, p.B, device=p.device).long()


def additive(p):
    mask = torch.randn(p.B, 1, p.Lq, p.Lk, device=p.device)
    return mask.masked_fill(mask < -1.0, float("-inf"))


def packed(p):
    """Four prefixes, one of them empty; a row without any."""
    given = torch.tensor([p.P // 2, 0, p.P // 4], dtype=torch.int32)
    rest = torch.tensor([p.P], dtype=torch.int32) - given.sum()
    index = torch.arange(p.B, dtype=torch.int32) % 5 - 1
    return {
        "prefix_lengths": torch.cat([given, rest]).int().to(p.device),
        "prefix_index": index.to(p.device),
    }


def sequences(p):
    """Boundaries of four sequences, one empty; the problem has B = 1 and Lq = Lk."""
    ends = [0, p.Lq // 3, p.Lq // 3, p.Lq - 1, p.Lq]
    return {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=p.device)}


# Name -> the keyword arguments that turn the feature on, for a problem.
FEATURES = {
    "plain": lambda p: {},
    "bidirectional": lambda p: {"is_causal": False},
    "negative scale": lambda p: {"scale": -0.2},
    "right padding": lambda p: {"key_padding_mask": padded(p, left=False)},
    "left padding": lambda p: {"key_padding_mask": padded(p, left=True)},
    "key lengths": lambda p: {"key_lengths": in_use(p)},
    "key lengths and left padding": lambda p: {
        "key_lengths": in_use(p),
        "key_padding_mask": padded(p, left=True),
        "sliding_window": 40,
    },
    "bool attn_mask": lambda p: {
        "attn_mask": torch.rand(p.B, p.Hq, p.Lq, p.Lk, device=p.device) > 0.3
    },
    "additive attn_mask": lambda p: {"attn_mask": additive(p)},
    "sliding window": lambda p: {"sliding_window": 40},
    "window and left padding": lambda p: {
        "sliding_window": 40,
        "key_padding_mask": padded(p, left=True),
    },
    "prefix in window": lambda p: {"sliding_window": 90, "prefix_in_window": True},
    "prefix in window, left padding": lambda p: {
        "sliding_window": 90,
        "prefix_in_window": True,
        "key_padding_mask": padded(p, left=True),
    },
    "softcap": lambda p: {"softcap": 5.0},
    "sinks": lambda p: {"sinks": torch.randn(p.Hq, device=p.device)},
    "prefix bias per head": lambda p: {"prefix_bias": torch.randn(p.Hq, device=p.device)},
    "prefix bias per column": lambda p: {
        "prefix_bias": torch.randn(p.Hq, p.Lq, p.P, device=p.device)
    },
    "dropout": lambda p: {"dropout_p": 0.2},
    "packed prefixes": packed,
    "cu_seqlens": sequences,
    "packed prefixes and cu_seqlens": lambda p: {
        **sequences(p),
        "prefix_lengths": torch.tensor([p.P // 2, p.P - p.P // 2], device=p.device).int(),
        "prefix_index": torch.tensor([1, 0, -1, 1], device=p.device).int(),
    },
    "batch invariant": lambda p: {"batch_invariant": True},
    "everything that goes together": lambda p: {
        **packed(p),
        "key_padding_mask": padded(p, left=True),
        "sliding_window": 60,
        "softcap": 8.0,
        "sinks": torch.randn(p.Hq, device=p.device),
        "prefix_bias": torch.randn(p.Hq, device=p.device),
        "dropout_p": 0.1,
    },
}
ONE_SEQUENCE = ("cu_seqlens", "packed prefixes and cu_seqlens")
DECODED = [feature for feature in FEATURES if feature not in ONE_SEQUENCE]
EVERYTHING = "everything that goes together"


def shape_of(feature, **changes):
    return {"B": 1, **changes} if feature in ONE_SEQUENCE else changes


@gpu
@pytest.mark.parametrize("feature", FEATURES)
def test_training(problem, agree, feature):
    p = problem(**shape_of(feature))
    agree(p, FEATURES[feature](p))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("feature", ["plain", EVERYTHING])
def test_training_in_other_dtypes(problem, agree, feature, dtype):
    p = problem(dtype=dtype)
    agree(p, FEATURES[feature](p))


@gpu
@pytest.mark.parametrize("feature", DECODED)
def test_decoding(problem, agree, feature):
    p = problem(B=5, Lq=1, Lk=200, P=300)
    agree(p, FEATURES[feature](p), gradients=feature == "plain")


@gpu
@pytest.mark.parametrize("feature", ["plain", EVERYTHING])
def test_decoding_in_float32(problem, agree, feature):
    p = problem(B=5, Lq=1, Lk=200, P=300, dtype=torch.float32)
    agree(p, FEATURES[feature](p), gradients=False)


@gpu
@pytest.mark.parametrize("feature", ["plain", "left padding", "sliding window"])
def test_several_new_tokens(problem, agree, feature):
    p = problem(Lq=5, Lk=120)
    agree(p, FEATURES[feature](p), gradients=False)


@gpu
@pytest.mark.parametrize("D", [16, 72, 80, 96, 128, 192, 256])
def test_head_sizes(problem, agree, D):
    agree(problem(D=D, Dv=D, Lq=70, Lk=70, P=33), {})


@gpu
@pytest.mark.parametrize("D", [128, 256])
def test_head_sizes_in_float32(problem, agree, D):
    p = problem(D=D, Dv=D, Lq=70, Lk=70, P=33, dtype=torch.float32)
    agree(p, {}, gradients=D == 128)


@gpu
@pytest.mark.parametrize(("D", "Dv"), [(192, 128), (32, 80)])
def test_value_head_size(problem, agree, D, Dv):
    agree(problem(D=D, Dv=Dv), {})


@gpu
@pytest.mark.parametrize(("Hq", "Hkv", "P"), [(4, 4, 0), (8, 1, 1), (9, 3, 63), (9, 3, 1000)])
def test_groups_and_prefix_lengths(problem, agree, Hq, Hkv, P):
    agree(problem(Hq=Hq, Hkv=Hkv, P=P), {}, gradients=P != 63)


@pytest.mark.parametrize("cases", [FEATURES, DECODED], ids=["training", "decoding"])
def test_every_feature_has_a_case(cases):
    """What the kernels can be asked for; no device is needed to see this."""
    known = {*BACKENDS["triton"].features} - {UNEQUAL_HEAD_SIZES}
    if cases is DECODED:
        known -= {"cu_seqlens"}  # its sequences' last tokens are decoded as rows of a batch
    p = Shapes()
    asked = set()
    for feature in cases:
        given = {"is_causal": True, "scale": 1.0} | FEATURES[feature](p)
        asked |= features_of(Options(**given))
    assert asked == known


class Shapes:
    """As much of a problem as a case looks at."""

    B, Hq, Lq, Lk, P = 1, 2, 8, 8, 8
    device = torch.device("cpu")
