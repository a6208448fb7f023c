"""What only some calls of the composed backend use, out of the same two flash calls.

A call is cut into sequence pieces (one, or one for each of the packed sequences) and prefix groups
(the rows that share a prefix), each of which is one flash call over views. Their outputs merge by
log-sum-exp, and the sinks merge like one more part that has no value. In the backward each part
gets the GLOBAL output and log-sum-exp, so that its gradients are its exact share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.flash import fold_rows, unfold_rows, unsee
from fastprefix.attention.backends.composed.kernels import equal_head_sizes, kernels_of
from fastprefix.attention.backends.composed.parts import groups, pieces, without_head_bias
from fastprefix.attention.backends.composed.seen import Seen
from fastprefix.options import Options


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`."""
    Dv, dtype = value.shape[-1], query.dtype
    query, key, value, prefix_key, prefix_value = equal_head_sizes(
        query, key, value, prefix_key, prefix_value
    )
    B, Hq, Lq, D = query.shape
    wide = torch.promote_types(dtype, torch.float32)
    out = query.new_zeros(B, Hq, Lq, D, dtype=wide)
    lse = query.new_full((B, Hq, Lq), -math.inf, dtype=wide)
    attend = kernels_of(query).forward
    for piece in pieces(query, key, options):
        part = piece.part(query, key, options)
        part_out, part_lse = attend(
            part.fold(piece.of_queries(query)), part.keys(piece.of_keys(key)),
            part.keys(piece.of_keys(value)), options.scale, part.seen,
        )  # fmt: skip
        part_lse = part.unfold(part_lse)
        part_lse = part_lse if part.seen.mask is None else unsee(part_lse)
        piece.of_queries(out).copy_(part.unfold(part_out))
        piece.of_queries(lse).copy_(part_lse)
    out = out.masked_fill_((lse == -math.inf)[..., None], 0.0)
    # a row is in one group at most, so that one merge is enough for all of them
    prefix_out, prefix_lse = None, torch.full_like(lse, -math.inf)
    for group in groups(query, key, prefix_key, options):
        part_out, part_lse = group.attend(query, prefix_key, prefix_value, options)
        if prefix_out is None:
            prefix_out = part_out.new_zeros(out.shape)
        group.put(prefix_out, prefix_lse, part_out, part_lse)
    if prefix_out is not None:
        out, lse = _merge(out, lse, prefix_out, prefix_lse)
    if options.sinks is not None:
        sinks = options.sinks.to(wide)[:, None].expand_as(lse)
        out, lse = _merge(out, lse, None, sinks)
    return out[..., :Dv].to(dtype), lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Same contract as :func:`fastprefix.attention.backends.composed.backward`."""
    D, Dv = query.shape[-1], value.shape[-1]
    query, key, value, prefix_key, prefix_value, out, grad_out = equal_head_sizes(
        query, key, value, prefix_key, prefix_value, out, grad_out
    )
    wide = lse.dtype
    # a row that saw nothing: exp(score - inf) = 0 gives zero gradients
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    delta = (out.to(wide) * grad_out.to(wide)).sum(-1)
    if needs[0] or needs[1] or needs[2]:
        dq, dk, dv = _sequence_gradients(grad_out, query, key, value, out, lse, options)
    else:
        dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    # summed over many groups, hence in the accumulation dtype
    dpk, dpv = (torch.zeros_like(x, dtype=wide) for x in (prefix_key, prefix_value))
    dbias = lse.new_zeros(query.shape[1])
    gradients, Hkv = kernels_of(query).backward, prefix_key.shape[0]
    if needs[0] or needs[3] or needs[4] or needs[6]:
        for group in groups(query, key, prefix_key, options):
            columns, rows_query, rows_lse = group.columns, group.take(query), group.take(lse)
            own_lse = without_head_bias(options, rows_lse)
            part_dq, part_dk, part_dv = gradients(
                fold_rows(group.take(grad_out), Hkv), fold_rows(rows_query, Hkv),
                prefix_key[None, :, columns], prefix_value[None, :, columns],
                fold_rows(group.take(out), Hkv), fold_rows(own_lse, Hkv),
                options.scale, Seen(mask=group.mask(query, Hkv, options)),
            )  # fmt: skip
            group.add(dq, unfold_rows(part_dq, rows_query.shape))
            dpk[:, columns] += part_dk[0]
            dpv[:, columns] += part_dv[0]
            if needs[6]:
                part_out, part_lse = group.attend(query, prefix_key, prefix_value, options)
                dp = (part_out.to(wide) * group.take(grad_out).to(wide)).sum(-1)
                ds = torch.exp(part_lse - rows_lse) * (dp - group.take(delta))
                dbias += ds.sum((0, 2))
    dsinks = None
    if needs[5] and options.sinks is not None:
        weight = torch.exp(options.sinks.to(wide)[:, None] - lse)
        dsinks = -(weight * delta).sum((0, 2)).to(options.sinks.dtype)
    bias_dtype = wide if options.prefix_bias is None else options.prefix_bias.dtype
    return (
        dq[..., :D] if needs[0] else None,
        dk[..., :D] if needs[1] else None,
        dv[..., :Dv] if needs[2] else None,
        dpk[..., :D].to(query.dtype) if needs[3] else None,
        dpv[..., :Dv].to(query.dtype) if needs[4] else None,
        dsinks,
        dbias.to(bias_dtype) if needs[6] else None,
    )


def _sequence_gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence part's share of the query's gradient, and the gradients of key and value."""
    dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    gradients = kernels_of(query).backward
    for piece in pieces(query, key, options):
        part = piece.part(query, key, options)
        part_dq, part_dk, part_dv = gradients(
            part.fold(piece.of_queries(grad_out)), part.fold(piece.of_queries(query)),
            part.keys(piece.of_keys(key)), part.keys(piece.of_keys(value)),
            part.fold(piece.of_queries(out)), part.fold(piece.of_queries(lse)),
            options.scale, part.seen,
        )  # fmt: skip
        piece.of_queries(dq).copy_(part.unfold(part_dq))
        piece.of_keys(dk).copy_(part.sum_keys(part_dk))
        piece.of_keys(dv).copy_(part.sum_keys(part_dv))
    return dq, dk, dv


def _merge(
    out: Tensor, lse: Tensor, part_out: Tensor | None, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds a part to an output in the accumulation dtype; None is a part without a value."""
    total = torch.logaddexp(lse, part_lse)
    # nothing seen on either side: weights of exp(-inf - 0) = 0
    base = total.masked_fill(total == -math.inf, 0.0)
    out = out * torch.exp(lse - base)[..., None]
    if part_out is not None:
        out = out + part_out.to(out.dtype) * torch.exp(part_lse - base)[..., None]
    return out, total
