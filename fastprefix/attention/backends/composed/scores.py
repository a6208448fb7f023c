"""Calls with a softcap or with dropout, which PyTorch's flash kernel cannot do: by the scores.

Only the scores of one chunk exist at a time (:mod:`fastprefix.attention.backends.composed.chunks`),
in the accumulation dtype. A chunk has two parts, prefix and sequence, and each is a batch of matrix
products. The products with the prefix have the queries of all rows as the rows of one matrix,
[Hkv, b·g·q, D] against one copy of the prefix. So the prefix's gradients come out of the products
already summed.

With x = scale * q . k, s = cap(x) + added, w = exp(s - lse) and d = keep / (1 - dropout_p):

    out = (d w) v          dv = (d w)ᵀ dout       delta = out . dout
    ds = w (d (dout vᵀ) - delta)                  dx = ds (1 - (cap(x) / softcap)²)
    dq = scale * dx k      dk = scale * dxᵀ q

Dropout draws `keep` chunk after chunk from a generator of PyTorch that has the call's seed, so
backward draws what forward drew. The number of threads changes nothing. The weights that are
dropped are others than those of reference and triton (:mod:`fastprefix.attention.philox`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.chunks import Chunk, chunks
from fastprefix.attention.backends.composed.flash import FLOOR, fold_rows, unfold_rows
from fastprefix.attention.backends.reference import seen_and_added
from fastprefix.options import Options


def is_for(options: Options) -> bool:
    """Whether a call needs its scores."""
    return options.softcap is not None or options.dropout_p is not None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`."""
    B, Hq, Lq, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(B, Lq, Hq, value.shape[-1]).transpose(1, 2)
    lse = query.new_full((B, Hq, Lq), -math.inf, dtype=wide)
    inputs = (query, key, value, prefix_key, prefix_value)
    dropout = _Dropout(options)
    with torch.autocast(query.device.type, enabled=False):  # which would round the products
        for chunk in chunks(query, key, prefix_key, options):
            part_out, part_lse = _attend(chunk, inputs, options, dropout)
            out[chunk.rows, :, chunk.queries] = part_out.to(out.dtype)
            lse[chunk.rows, :, chunk.queries] = part_lse
    return out, lse


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
    wide, sinks, bias = lse.dtype, options.sinks, options.prefix_bias
    inputs = (query, key, value, prefix_key, prefix_value)
    # summed over several chunks, hence in the accumulation dtype
    grads: list[Tensor | None] = [
        _zeros(x, wide) if need else None for x, need in zip(inputs, needs[:5], strict=True)
    ]
    grads += [lse.new_zeros(query.shape[1]) if need else None for need in needs[5:]]
    delta = (out.to(wide) * grad_out.to(wide)).sum(-1)
    if needs[5] and sinks is not None:
        grads[5] = -(torch.exp(sinks.to(wide)[:, None] - _finite(lse)) * delta).sum((0, 2))
    dropout = _Dropout(options)
    with torch.autocast(query.device.type, enabled=False):
        for chunk in chunks(query, key, prefix_key, options):
            saved = tuple(chunk.of_queries(x) for x in (grad_out, lse, delta))
            _add_gradients(chunk, saved, inputs, options, dropout, grads)
    dtypes = [query.dtype] * 5 + [wide if x is None else x.dtype for x in (sinks, bias)]
    return tuple(
        None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )


def kept(query: Tensor, key: Tensor, prefix_key: Tensor, options: Options) -> Tensor:
    """Which weights the dropout of a call keeps.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        prefix_key: [Hkv, P, D].
        options: of the call, with dropout_p and dropout_seed.

    Returns:
        [B, Hq, Lq, P + Lk] bool, by packed column and by key; False where a query's chunk holds
        neither.
    """
    B, Hq, Lq, _ = query.shape
    P, Lk = prefix_key.shape[1], key.shape[2]
    found = torch.zeros(B, Hq, Lq, P + Lk, dtype=torch.bool)
    dropout = _Dropout(options)
    inputs = (query, key, key, prefix_key, prefix_key)
    for chunk in chunks(query, key, prefix_key, options):
        for part in _parts(chunk, inputs, options):
            keep = dropout.draw(part, torch.float32)
            if keep is not None:
                first, columns = (0, chunk.columns) if part.shared else (P, chunk.keys)
                columns = slice(first + columns.start, first + columns.stop)
                found[chunk.rows, :, chunk.queries, columns] = part.unfold(keep).bool()
    return found


class _Dropout:
    """Draws of one call, chunk after chunk."""

    def __init__(self, options: Options) -> None:
        self.share = options.dropout_p or 0.0
        if options.dropout_seed is not None:
            self.generator = torch.Generator().manual_seed(int(options.dropout_seed))

    def draw(self, part: _Part, dtype: torch.dtype) -> Tensor | None:
        """1 for each weight of a part that is kept and 0 for the others; None without dropout."""
        if not self.share:
            return None
        # 31 random bits each: bernoulli_ takes three times as long
        bits = torch.empty(part.shape, dtype=torch.int32).random_(generator=self.generator)
        return torch.ge(bits, int(self.share * 2**31), out=torch.empty(part.shape, dtype=dtype))


class _Part(NamedTuple):
    """The prefix or the sequence of a chunk, as a batch of matrix products.

    Attributes:
        key: [n, columns, D].
        value: [n, columns, Dv].
        added: to the scores: broadcastable to [b, Hq, q, columns]; None for nothing.
        rows: b, Hq and q of the chunk.
        shared: whether it is the prefix: n is Hkv then, and the rows of the chunk are rows of its
            matrices. n is b·Hkv for the sequence.
    """

    key: Tensor
    value: Tensor
    added: Tensor | None
    rows: torch.Size
    shared: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the scores, [n, rows, columns]."""
        n, columns, _ = self.key.shape
        return n, self.rows.numel() // n, columns

    def fold(self, x: Tensor) -> Tensor:
        """[b, Hq, q, ...] to [n, rows, ...]."""
        n, rows, _ = self.shape
        return fold_rows(x, n)[0] if self.shared else x.reshape(n, rows, *x.shape[3:])

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`fold`."""
        shape = torch.Size((*self.rows, *x.shape[2:]))
        return unfold_rows(x[None], shape) if self.shared else x.reshape(shape)

    def scores(self, query: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
        """Scores, and with a softcap the tanh in them, for a folded query that is scaled."""
        scores, tanh = torch.bmm(query, self.key.mT), None
        if softcap is not None:
            tanh = scores.div_(softcap).tanh_()
            scores = tanh * softcap
        if self.added is not None:
            n, _, columns = self.shape
            b, Hq, q = self.rows
            added = self.added
            if not self.shared:
                scores.view(b, Hq, q, columns).add_(added)
            else:
                group = Hq // n if added.shape[1] > 1 else 1
                added = added.unflatten(1, (-1, group)).transpose(0, 1)
                scores.view(n, b, Hq // n, q, columns).add_(added)
        return scores, tanh


def _parts(chunk: Chunk, inputs: tuple[Tensor, ...], options: Options) -> tuple[_Part, _Part]:
    """The prefix and the sequence of a chunk."""
    query, *others = inputs
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = (chunk.of_keys(x).to(wide).flatten(0, 1) for x in others[:2])
    prefix_key, prefix_value = (x[:, chunk.columns].to(wide) for x in others[2:])
    rows = chunk.of_queries(query).shape[:3]
    biased = options.prefix_in_window or options.prefix_bias is not None
    asked = (options.key_padding_mask, options.attn_mask, options.sliding_window)
    # one query is the last: it sees every key of its chunk
    masked = any(x is not None for x in asked) or (options.is_causal and rows[2] > 1)
    prefix: Tensor | None = None
    sequence: Tensor | None = None
    if biased or masked:
        some, places = chunk.options(options), chunk.places(query.device)
        prefix, sequence = (
            torch.where(seen, added, FLOOR) for seen, added in seen_and_added(places, some, wide)
        )
    return (
        _Part(prefix_key, prefix_value, prefix if biased else None, rows, True),
        _Part(key, value, sequence if masked else None, rows, False),
    )


def _attend(
    chunk: Chunk, inputs: tuple[Tensor, ...], options: Options, dropout: _Dropout
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a chunk, in the accumulation dtype."""
    parts = _parts(chunk, inputs, options)
    query = chunk.of_queries(inputs[0]).to(parts[0].key.dtype) * options.scale
    scores = [part.scores(part.fold(query), options.softcap)[0] for part in parts]
    sinks = None if options.sinks is None else options.sinks.to(query.dtype)[:, None]
    top = query.new_full(query.shape[:3], -math.inf if sinks is None else 0.0)
    if sinks is not None:
        top = top + sinks
    for part, x in zip(parts, scores, strict=True):
        if x.shape[-1] > 0:
            top = torch.maximum(top, part.unfold(x.amax(-1)))
    top = top.masked_fill_(top < FLOOR / 2, 0.0)  # of rows that see nothing
    total = torch.zeros_like(top) if sinks is None else torch.exp(sinks - top)
    out = query.new_zeros(())
    for part, x in zip(parts, scores, strict=True):
        weights = x.sub_(part.fold(top)[..., None]).exp_()
        total = total + part.unfold(weights.sum(-1))
        keep = dropout.draw(part, x.dtype)
        weights = weights if keep is None else weights.mul_(keep)
        out = out + part.unfold(torch.bmm(weights, part.value))
    share = total * (1.0 - dropout.share)
    return out / share.masked_fill_(share == 0, 1.0)[..., None], top + total.log()


def _add_gradients(
    chunk: Chunk,
    saved: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    options: Options,
    dropout: _Dropout,
    grads: list[Tensor | None],
) -> None:
    """Adds what a chunk adds to the gradients, those that are not None."""
    parts = _parts(chunk, inputs, options)
    wide = parts[0].key.dtype
    query = chunk.of_queries(inputs[0]).to(wide) * options.scale
    grad_out, lse, delta = saved
    grad_out, lse = grad_out.to(wide) / (1.0 - dropout.share), _finite(lse)
    dquery, dkey, dvalue, dprefix_key, dprefix_value, _, dbias = grads
    found: list[Tensor] = []
    for part, of_keys, of_values in (
        (parts[0], dprefix_key, dprefix_value), (parts[1], dkey, dvalue)
    ):  # fmt: skip
        keep = dropout.draw(part, wide)  # of a part without gradients, too
        wanted = dquery is not None or of_keys is not None or of_values is not None
        if part.shape[2] == 0 or not (wanted or (part.shared and dbias is not None)):
            continue
        rows_query, rows_grad = part.fold(query), part.fold(grad_out)
        weights, tanh = part.scores(rows_query, options.softcap)
        weights.sub_(part.fold(lse)[..., None]).exp_()
        grad = torch.bmm(rows_grad, part.value.mT)
        rows_delta, used = part.fold(delta)[..., None], weights
        if keep is None:
            grad = grad.sub_(rows_delta).mul_(weights)
        else:
            used = keep.mul_(weights)
            grad = grad.mul_(used).addcmul_(weights, rows_delta, value=-1.0)
        if of_values is not None:
            _add(of_values, chunk, part, torch.bmm(used.mT, rows_grad))
        if part.shared and dbias is not None:
            dbias += part.unfold(grad.sum(-1)).sum((0, 2))
        if tanh is not None:
            grad = grad.addcmul_(grad * tanh, tanh, value=-1.0)
        if of_keys is not None:
            _add(of_keys, chunk, part, torch.bmm(grad.mT, rows_query))
        found.append(part.unfold(torch.bmm(grad, part.key)))
    if dquery is not None and found:
        dquery[chunk.rows, :, chunk.queries] = sum(found[1:], found[0]) * options.scale


def _add(whole: Tensor, chunk: Chunk, part: _Part, grad: Tensor) -> None:
    """Adds a part's gradient of keys or values to that of the call."""
    if part.shared:
        whole[:, chunk.columns] += grad
    else:
        b, Hkv = part.rows[0], whole.shape[1]
        whole[chunk.rows, :, chunk.keys] += grad.unflatten(0, (b, Hkv))


def _finite(lse: Tensor) -> Tensor:
    """Inf in place of -inf: exp(score - inf) = 0 gives a row that saw nothing zero gradients."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of a tensor's shape; [B, H, L, D] lies in memory as [B, L, H, D]."""
    if x.dim() == 3:
        return x.new_zeros(x.shape, dtype=dtype)
    B, H, L, D = x.shape
    return x.new_zeros(B, L, H, D, dtype=dtype).transpose(1, 2)
