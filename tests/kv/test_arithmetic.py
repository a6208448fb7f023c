"""Interpolation, concatenation and the orthogonality penalty."""

from __future__ import annotations

import math

import pytest
import torch

from fastprefix.kv import PrefixKV, concatenate, interpolate, orthogonality_penalty


def make(seed: int, P: int = 4, dtype: torch.dtype = torch.float64, **changes) -> PrefixKV:
    """Two layers of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, P, 8), (1, P, 6)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    fields = {"position_offset": P, "in_window": False, **changes}
    return PrefixKV(tuple(tensors), tuple(x.flip(0) * 2 for x in tensors), **fields)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Shoemake's formula for directions, lengths linear."""
    la, lb = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    angle = torch.acos(((a / la) * (b / lb)).sum(-1, keepdim=True))
    direction = (torch.sin((1 - t) * angle) * a / la + torch.sin(t * angle) * b / lb) / angle.sin()
    return direction * ((1 - t) * la + t * lb)


@pytest.mark.parametrize("method", ["linear", "spherical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_end_points_are_the_prefixes_bit_for_bit(method, dtype):
    kvs = [make(seed, dtype=dtype) for seed in range(3)]
    for i, kv in enumerate(kvs):
        got = interpolate(kvs, [float(j == i) for j in range(3)], method)
        for a, b in zip((*got.keys, *got.values), (*kv.keys, *kv.values), strict=True):
            assert torch.equal(a, b)


def test_linear_is_the_weighted_mean():
    a, b, c = (make(seed) for seed in range(3))
    got = interpolate([a, b, c], [0.2, 0.5, 0.3])
    torch.testing.assert_close(got.keys[1], 0.2 * a.keys[1] + 0.5 * b.keys[1] + 0.3 * c.keys[1])
    assert got.position_offset == a.position_offset


@pytest.mark.parametrize("t", [0.1, 0.5, 0.85])
def test_spherical_of_two_is_slerp(t):
    a, b = make(0), make(1)
    got = interpolate([a, b], [1 - t, t], "spherical")
    torch.testing.assert_close(got.keys[0], slerp(a.keys[0], b.keys[0], t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.values[1], slerp(a.values[1], b.values[1], t))


def test_spherical_of_many_is_where_the_pulls_cancel():
    kvs, weights = [make(seed) for seed in range(4)], [0.4, 0.3, 0.2, 0.1]
    mean = interpolate(kvs, weights, "spherical").keys[0]
    unit = mean / mean.norm(dim=-1, keepdim=True)
    pull = torch.zeros_like(mean)
    for kv, w in zip(kvs, weights, strict=True):
        x = kv.keys[0] / kv.keys[0].norm(dim=-1, keepdim=True)
        cosine = (x * unit).sum(-1, keepdim=True)
        across = x - cosine * unit
        pull += w * torch.acos(cosine) * across / across.norm(dim=-1, keepdim=True)
    assert pull.abs().max() < 1e-9
    lengths = sum(w * kv.keys[0].norm(dim=-1) for kv, w in zip(kvs, weights, strict=True))
    torch.testing.assert_close(mean.norm(dim=-1), lengths)


def test_a_vector_without_length_has_no_direction():
    a, b = make(0), make(1)
    a.keys[0][0, 2] = 0
    got = interpolate([a, b], [0.5, 0.5], "spherical")
    torch.testing.assert_close(got.keys[0][0, 2], b.keys[0][0, 2] / 2)


def test_opposite_vectors_have_no_mean_direction():
    a = make(0)
    b = PrefixKV(tuple(-x for x in a.keys), a.values, a.position_offset)
    for weights in ([0.5, 0.5], [0.7, 0.3]):
        with pytest.raises(ValueError, match="opposite directions"):
            interpolate([a, b], weights, "spherical")


def test_spherical_of_vectors_far_apart_is_found_all_the_same():
    """Eight of four dimensions lie all over the sphere: some means take hundreds of steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 40, 4, generator=generator, dtype=torch.float64)
    kvs = [PrefixKV((one,), (one,), 0) for one in x]
    mean = interpolate(kvs, [1 / 8] * 8, "spherical").keys[0]
    unit, points = mean / mean.norm(dim=-1, keepdim=True), x / x.norm(dim=-1, keepdim=True)
    cosine = (points * unit).sum(-1, keepdim=True)
    across = points - cosine * unit
    pull = (torch.acos(cosine) * across / across.norm(dim=-1, keepdim=True)).mean(0)
    assert pull.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], "one for each"),
        ([0.5, 0.6], "sum to 1"),
        ([1.5, -0.5], "from 0"),
        ([math.nan, 1.0], "from 0"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(ValueError, match=f"weights: .*{message}"):
        interpolate([make(0), make(1)], weights)


@pytest.mark.parametrize(
    "other",
    [
        make(1, P=5),
        make(1, position_offset=0),
        make(1, in_window=True),
        make(1, dtype=torch.float32),
    ],
)
def test_only_like_prefixes_are_averaged(other):
    with pytest.raises(ValueError, match=r"kvs\[1\]: got"):
        interpolate([make(0), other], [0.5, 0.5])
    with pytest.raises(ValueError, match="method"):
        interpolate([make(0), make(1)], [0.5, 0.5], "cubic")


def test_concatenated_prefixes_attend_as_one_and_carry_gradients():
    a, b = make(0, P=3), make(1, P=5)
    a.keys[0].requires_grad_()
    joined = concatenate([a, b])
    assert joined.position_offset == 8
    assert joined.num_virtual_tokens == 8
    assert torch.equal(joined.keys[1], torch.cat([a.keys[1], b.keys[1]], dim=1))
    joined.keys[0].sum().backward()
    assert torch.equal(a.keys[0].grad, torch.ones_like(a.keys[0]))


def test_prompts_prefilled_apart_are_not_joined():
    with pytest.raises(ValueError, match="prefill the joined text"):
        concatenate([make(0, in_window=True), make(1, in_window=True)])
    with pytest.raises(ValueError, match="got none"):
        concatenate([])


def test_penalty_is_the_mean_squared_cosine():
    a, b, c = make(0, P=2), make(1, P=3), make(2, P=2)

    def rows(kv):
        P = kv.num_virtual_tokens
        parts = [x.transpose(0, 1).reshape(P, -1) for x in (*kv.keys, *kv.values)]
        return torch.cat(parts, dim=1)

    cosines = [
        torch.cosine_similarity(x, y, dim=0) ** 2
        for one, other in ((a, b), (a, c), (b, c))
        for x in rows(one)
        for y in rows(other)
    ]
    torch.testing.assert_close(orthogonality_penalty([a, b, c]), torch.stack(cosines).mean())
    assert orthogonality_penalty([a]) == 0
    kv = PrefixKV(tuple(x.requires_grad_() for x in a.keys), a.values, 2)
    assert torch.autograd.gradcheck(
        lambda key: orthogonality_penalty([PrefixKV((key, kv.keys[1]), kv.values, 2), b]),
        (kv.keys[0],),
    )
