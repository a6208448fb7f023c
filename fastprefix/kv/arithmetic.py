"""Computing with prefixes: means, joining end to end, and a penalty that makes them orthogonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fastprefix.arguments import check_number, check_type, refuses_unknown_arguments
from fastprefix.kv.prefix import PrefixKV
from fastprefix.kv.reweighting import Kind, Reweighting

Method = Literal["linear", "spherical"]

# The most steps of the spherical mean. Each step reduces the error by a factor, which is smaller
# if vectors lie far apart.
_STEPS = 2000


@refuses_unknown_arguments
def interpolate(
    kvs: Sequence[PrefixKV], weights: Sequence[float], method: Method = "linear"
) -> PrefixKV:
    """Computes a weighted mean of prefixes. A weight of 1 gives the same bits as that prefix.

    "linear" averages the numbers. "spherical" averages every key and value vector [D] on the
    sphere. The mean's length is the linear mean of the lengths. Its direction is the weighted
    spherical mean (Buss and Fillmore 2001, "Spherical averages and applications", algorithm A1).
    For two prefixes this is slerp (Shoemake 1985). Both methods average the biases or gates of
    heads linearly.

    Args:
        kvs: at least one prefix. All have the same shapes, lengths, position_offset and in_window,
            and the same kind of reweighting or none.
        weights: one weight for each prefix, finite and 0 or more. Their sum is 1 (within 1e-6).
        method: "linear" or "spherical".

    Raises:
        TypeError: kvs are no prefixes, or weights no numbers.
        ValueError: the prefixes differ in shape or meaning; the weights are not as above; the
            spherical mean is not unique (opposite vectors) or not found; or one of several prefixes
            has states of a model's layers.
    """
    _check_prefixes(kvs)
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}, takes one of {get_args(Method)}")
    if len(kvs) != len(weights) or not kvs:
        raise ValueError(f"weights: got {len(weights)} for {len(kvs)} prefixes, takes one for each")
    for weight in weights:
        check_number("weights", weight)
    if not all(math.isfinite(w) and w >= 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights: got {list(weights)}, takes numbers from 0 that sum to 1")
    _check_alike(kvs)
    used = [(kv, float(w)) for kv, w in zip(kvs, weights, strict=True) if w > 0]
    if len(used) == 1:
        return used[0][0]
    parts, shares = [kv for kv, _ in used], [w for _, w in used]
    _refuse_states(parts, "averaged")
    mean = _linear if method == "linear" else _spherical
    averaged = _map_layers(parts, lambda tensors: mean(tensors, shares))
    reweightings = [kv.reweighting for kv in parts if kv.reweighting is not None]
    if not reweightings:
        return averaged
    layers = zip(*(one.heads for one in reweightings), strict=True)
    heads = tuple(_linear(tensors, shares) for tensors in layers)
    return replace(averaged, reweighting=Reweighting(reweightings[0].kind, heads))


@refuses_unknown_arguments
def concatenate(kvs: Sequence[PrefixKV]) -> PrefixKV:
    """Joins prefixes end to end, for example a shared one and a task's own. Gradients reach each.

    The text starts behind all of them, so position offsets are added. A head has one bias or gate
    for the whole, so prefixes with biases or gates must have the same ones. This function is for
    learned prefixes, whose keys belong to no position. Prompts that were prefilled separately did
    not see each other, and each begins at position 0: prefill the joined text instead.

    Raises:
        TypeError: kvs are no prefixes.
        ValueError: kvs are empty; layers have different shapes; one of several prefixes is a prompt
            (in_window, or with states); or the heads' biases or gates differ, or are separate
            parameters.
    """
    _check_prefixes(kvs)
    if not kvs:
        raise ValueError("kvs: got none, takes at least one prefix")
    if len(kvs) > 1 and any(kv.in_window for kv in kvs):
        raise ValueError(
            "kvs: got a prefilled prompt among several prefixes, which would all start at "
            "position 0; prefill the joined text instead"
        )
    for i, kv in enumerate(kvs):
        if kv.shapes != kvs[0].shapes:
            raise ValueError(f"kvs[{i}]: got other layer shapes than kvs[0], takes the same")
        if not _reweighted_alike(kv, kvs[0]):
            raise ValueError(
                f"kvs[{i}]: got another reweighting of its heads than kvs[0], takes the same: one "
                "bias or gate holds for the whole prefix"
            )
    if len(kvs) == 1:
        return kvs[0]
    _refuse_states(kvs, "joined to another prefix")
    joined = _map_layers(kvs, lambda tensors: torch.cat(tensors, dim=1))
    offset = sum(kv.position_offset for kv in kvs)
    return replace(joined, position_offset=offset, reweighting=kvs[0].reweighting)


@refuses_unknown_arguments
def orthogonality_penalty(kvs: Sequence[PrefixKV]) -> Tensor:
    """Computes the mean squared cosine between virtual tokens of different prefixes, for a loss.

    A token is the vector of all its keys and values. The result is 0 if every token of a prefix is
    orthogonal to every token of the others, and for a single prefix. It has gradients.

    Raises:
        TypeError: kvs are no prefixes.
        ValueError: layers have different shapes, or the layers of one prefix different lengths.
    """
    _check_prefixes(kvs)
    if not kvs:
        raise ValueError("kvs: got none, takes at least one prefix")
    rows = []
    for i, kv in enumerate(kvs):
        if kv.shapes != kvs[0].shapes:
            raise ValueError(f"kvs[{i}]: got other layer shapes than kvs[0], takes the same")
        if any(key.shape[1] != kv.num_virtual_tokens for key in kv.keys):
            raise ValueError(f"kvs[{i}]: got layers of different lengths, takes one length")
        tokens = [x.transpose(0, 1).flatten(1) for x in (*kv.keys, *kv.values)]
        rows.append(torch.nn.functional.normalize(torch.cat(tokens, dim=1), dim=1))
    total = rows[0].new_zeros(())
    pairs = 0
    for i, one in enumerate(rows):
        for other in rows[i + 1 :]:
            total = total + (one @ other.T).square().sum()
            pairs += one.shape[0] * other.shape[0]
    return total / max(pairs, 1)


def _check_prefixes(kvs: Sequence[PrefixKV]) -> None:
    """Raises a TypeError unless all are prefixes."""
    check_type("kvs", kvs, (list, tuple), "a list of prefixes")
    for i, kv in enumerate(kvs):
        check_type(f"kvs[{i}]", kv, PrefixKV, "a PrefixKV")


def _check_alike(kvs: Sequence[PrefixKV]) -> None:
    first = kvs[0]
    lengths = [key.shape[1] for key in first.keys]
    for i, kv in enumerate(kvs):
        for name, got, want in (
            ("layer shapes", kv.shapes, first.shapes),
            ("lengths", [key.shape[1] for key in kv.keys], lengths),
            ("position_offset", kv.position_offset, first.position_offset),
            ("in_window", kv.in_window, first.in_window),
            ("dtype", kv.dtype, first.dtype),
            ("device", kv.device, first.device),
            ("reweighting", _heads_of(kv), _heads_of(first)),
        ):
            if got != want:
                raise ValueError(f"kvs[{i}]: got {name} {got}, takes {want} as kvs[0]")


def _refuse_states(kvs: Sequence[PrefixKV], what: str) -> None:
    for i, kv in enumerate(kvs):
        if kv.states is not None:
            raise ValueError(
                f"kvs[{i}]: a prompt's state cannot be {what}: it is what the model's layers made "
                "of that text alone; prefill the text that is meant"
            )


def _heads_of(kv: PrefixKV) -> tuple[Kind, tuple[int, ...]] | None:
    """The kind of reweighting and the numbers of query heads; None without reweighting."""
    return None if kv.reweighting is None else (kv.reweighting.kind, kv.reweighting.num_heads)


def _reweighted_alike(one: PrefixKV, other: PrefixKV) -> bool:
    """Whether two prefixes have the same biases or gates.

    Separate parameters do not count, even if they are equal: the gradient would reach only one.
    """
    if one.reweighting is None or other.reweighting is None:
        return one.reweighting is other.reweighting
    return one.reweighting.kind == other.reweighting.kind and all(
        x is y or (torch.equal(x, y) and not (x.requires_grad or y.requires_grad))
        for x, y in zip(one.reweighting.heads, other.reweighting.heads, strict=True)
    )


def _map_layers(kvs: Sequence[PrefixKV], join: Callable[[list[Tensor]], Tensor]) -> PrefixKV:
    """A prefix whose every key and value is made of those of several prefixes."""
    layers = range(kvs[0].num_layers)
    return PrefixKV(
        tuple(join([kv.keys[layer] for kv in kvs]) for layer in layers),
        tuple(join([kv.values[layer] for kv in kvs]) for layer in layers),
        kvs[0].position_offset,
        kvs[0].in_window,
    )


def _linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    mean = sum(w * x.to(wide) for x, w in zip(tensors, weights, strict=True))
    assert isinstance(mean, Tensor)
    return mean.to(tensors[0].dtype)


def _spherical(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The spherical mean of each vector of [Hkv, P, D] tensors, times the mean length."""
    x = torch.stack([tensor.double() for tensor in tensors])  # [N, Hkv, P, D]
    w = x.new_tensor(weights).view(-1, 1, 1, 1)
    length = x.norm(dim=-1, keepdim=True)
    # a vector of length 0 has no direction, so it gets no weight in the mean of directions
    share = w * (length > 0)
    share = share / share.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    unit = x / length.clamp(min=torch.finfo(torch.float64).tiny)
    mean = (share * unit).sum(0)
    norm = mean.norm(dim=-1, keepdim=True)
    mean = mean / norm.clamp(min=torch.finfo(torch.float64).tiny)
    cancelled = (norm < 1e-9) & (share.sum(0) > 0)
    for _ in range(_STEPS):
        cosine = (unit * mean).sum(-1, keepdim=True).clamp(-1, 1)
        if bool((cancelled | ((cosine < -1 + 1e-12) & (share > 0))).any()):
            raise ValueError(
                "kvs: two vectors point in opposite directions, between which no mean direction is "
                "nearest; use method='linear'"
            )
        across = unit - cosine * mean
        sine = across.norm(dim=-1, keepdim=True)
        angle = torch.atan2(sine, cosine)
        towards = torch.where(sine > 0, across * (angle / sine.clamp(min=1e-300)), 0.0)
        step = (share * towards).sum(0)
        far = step.norm(dim=-1, keepdim=True)
        turn = torch.where(far > 0, step * (torch.sin(far) / far.clamp(min=1e-300)), 0.0)
        mean = torch.cos(far) * mean + turn
        mean = mean / mean.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        if not bool((far > 1e-12).any()):
            break
    else:
        raise ValueError(
            f"kvs: some vectors lie so far apart that {_STEPS} steps do not find their mean "
            "direction; use method='linear'"
        )
    return (mean * (w * length).sum(0)).to(tensors[0].dtype)
