"""PyTorch's attention kernels for CUDA in plain float64 maths, as strict as the real ones.

A function here has the arguments of the aten op of its name. It does what the CUDA code of PyTorch
2.9 to 2.14 does with them. It fails where that would fail, and where that would read memory that
it must not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


# The names of the kernels that ran.
CALLS: list[str] = []


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten._flash_attention_forward."""
    CALLS.append("flash")
    assert not return_debug_mask
    window = (window_size_left, window_size_right)
    _check_flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, scale)
    out = torch.empty_like(query)
    lse_shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    lse = torch.full(lse_shape, math.nan, dtype=torch.float32, device=query.device)
    for q, k in _sequences(query, key, cum_seq_q, cum_seq_k):
        scores = _scores(query[q], key[k], scale)
        scores = scores.masked_fill(~_seen(scores, is_causal, window), -math.inf)
        part_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - part_lse[..., None]).nan_to_num(0.0)
        out[q] = _per_query_head(weights, value[k]).to(query.dtype)
        lse[_of_lse(q)] = part_lse.masked_fill(part_lse == -math.inf, math.inf).float()
    state = torch.empty(2, dtype=torch.uint64)
    return out, lse, state, state[0], query.new_empty(0)


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten._flash_attention_backward."""
    CALLS.append("flash backward")
    window = (window_size_left, window_size_right)
    _check_flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, scale)
    for x in (grad_out, out):
        assert x.dtype == query.dtype
        assert x.shape == query.shape
        assert x.stride(-1) == 1
    _check_lse(logsumexp, (*query.shape[:-3], query.shape[-2], query.shape[-3]))
    assert logsumexp.is_contiguous()
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (query, key, value))
    for q, k in _sequences(query, key, cum_seq_q, cum_seq_k):
        scores = _scores(query[q], key[k], scale)
        scores = scores.masked_fill(~_seen(scores, is_causal, window), -math.inf)
        grads = _gradients(
            scores, grad_out[q], query[q], key[k], value[k], out[q], logsumexp[_of_lse(q)], scale
        )
        dq[q], dk[k], dv[k] = (grad.to(query.dtype) for grad in grads)
    return dq, dk, dv


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """aten._scaled_dot_product_efficient_attention."""
    CALLS.append("efficient")
    assert compute_log_sumexp
    _check_efficient(query, key, value, attn_bias, dropout_p, scale)
    scores = _efficient_scores(query, key, attn_bias, is_causal, scale)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    out = (weights @ value.double()).to(query.dtype)
    lse = lse.masked_fill(lse == -math.inf, 0.0).float()
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    seed = torch.empty((), dtype=torch.int64)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse, seed, seed


def efficient_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """aten._scaled_dot_product_efficient_attention_backward."""
    CALLS.append("efficient backward")
    assert grad_input_mask == [True, True, True, False]
    _check_efficient(query, key, value, attn_bias, dropout_p, scale)
    Lq = query.shape[2]
    assert grad_out.shape == out.shape == query.shape
    assert grad_out.dtype == out.dtype == query.dtype
    # the kernel takes the stride of a token for H * D
    assert out.transpose(1, 2).is_contiguous()
    _check_lse(logsumexp, (*query.shape[:2], -(-Lq // 32) * 32))
    assert logsumexp.is_contiguous()
    assert (logsumexp[..., Lq:] == math.inf).all()
    scores = _efficient_scores(query, key, attn_bias, is_causal, scale)
    g, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = _gradients(scores, g, q, k, v, o, logsumexp[..., :Lq], scale)
    dq, dk, dv = (grad.to(query.dtype).contiguous().transpose(1, 2) for grad in grads)
    return dq, dk, dv, None


# The ops that the kernels here stand for, by the names in the module `cuda`.
STAND_INS: dict[str, Callable[..., Any]] = {
    "_flash_forward": flash_attention_forward,
    "_flash_backward": flash_attention_backward,
    "_efficient_forward": efficient_attention,
    "_efficient_backward": efficient_attention_backward,
}


def _check_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    scale: float,
) -> None:
    assert dropout_p == 0.0
    _check_scale(scale)
    assert query.dtype in HALF
    assert key.dtype == value.dtype == query.dtype
    assert key.shape == value.shape
    *_, Hq, D = query.shape
    assert key.shape[-1] == D
    assert Hq % key.shape[-2] == 0
    assert D % 8 == 0
    assert D <= 256
    assert D <= 192 or D == 256, "the backward does not fit smaller devices"
    for x in (query, key, value):
        assert x.numel() > 0
        _check_loads(x)
    if cum_seq_q is None or cum_seq_k is None:
        assert cum_seq_q is cum_seq_k
        assert query.dim() == key.dim() == 4
        assert query.shape[0] == key.shape[0]
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
        return
    assert query.dim() == key.dim() == 3
    assert max_q > 1, "with one query the kernel takes every sequence to have one"
    for ends, longest, x in ((cum_seq_q, max_q, query), (cum_seq_k, max_k, key)):
        assert ends.dtype == torch.int32
        assert ends.dim() == 1
        assert ends.is_contiguous()
        assert ends.numel() == cum_seq_q.numel() > 1
        assert ends[-1] == x.shape[0]
        assert ends.diff().max() <= longest


def _check_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    dropout_p: float,
    scale: float,
) -> None:
    assert dropout_p == 0.0
    _check_scale(scale)
    assert query.dtype in (*HALF, torch.float32)
    assert key.dtype == value.dtype == query.dtype
    B, H, Lq, D = query.shape
    Lk = key.shape[2]
    assert key.shape == (B, H, Lk, D)
    assert value.shape[:3] == key.shape[:3]
    for x in (query, key, value):
        assert x.numel() > 0
        assert x.shape[-1] % (16 // x.element_size()) == 0
        _check_loads(x)
    if attn_bias is None:
        return
    assert attn_bias.dtype == query.dtype
    assert attn_bias.shape == (B, H, Lq, Lk)
    _check_loads(attn_bias)
    # rows are loaded 16 bytes at a time, the last of them past its end
    step = 16 // attn_bias.element_size()
    last = sum(
        (n - 1) * s for n, s in zip(attn_bias.shape[:3], attn_bias.stride()[:3], strict=True)
    )
    read = attn_bias.storage_offset() + last + -(-Lk // step) * step
    assert read * attn_bias.element_size() <= attn_bias.untyped_storage().nbytes()


def _check_scale(scale: float) -> None:
    assert type(scale) is float
    assert scale > 0.0, "the kernels take a row's maximum before they scale it"


def _check_loads(x: Tensor) -> None:
    step = 16 // x.element_size()
    assert x.stride(-1) == 1
    assert x.data_ptr() % 16 == 0
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        assert size == 1 or stride % step == 0


def _check_lse(lse: Tensor, shape: tuple[int, ...]) -> None:
    assert lse.dtype == torch.float32
    assert lse.shape == shape
    assert not (lse == -math.inf).any(), "a row that sees nothing would get infinite weights"


def _sequences(
    query: Tensor, key: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Where the queries and the keys of each sequence lie."""
    if cum_seq_q is None or cum_seq_k is None:
        yield slice(None), slice(None)
        return
    for m in range(cum_seq_q.numel() - 1):
        q, k = slice(*cum_seq_q[m : m + 2].tolist()), slice(*cum_seq_k[m : m + 2].tolist())
        if q.stop > q.start:
            yield q, k


def _of_lse(tokens: slice) -> Any:
    return slice(None) if tokens == slice(None) else (slice(None), tokens)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[..., L, H, D] in float64 as [..., heads, L, D], each key head repeated for its group."""
    x = x.double().transpose(-3, -2)
    return x.repeat_interleave(heads // x.shape[-3], dim=-3)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    q = _heads(query, query.shape[-2])
    return q @ _heads(key, query.shape[-2]).transpose(-1, -2) * scale


def _per_query_head(weights: Tensor, value: Tensor) -> Tensor:
    return (weights @ _heads(value, weights.shape[-3])).transpose(-3, -2)


def _seen(scores: Tensor, is_causal: bool, window: tuple[int | None, int | None]) -> Tensor:
    """Flash attention's causality and windows, both aligned to the last key."""
    Lq, Lk = scores.shape[-2:]
    left, right = (-1 if side is None else side for side in window)
    if is_causal:
        right = 0
    gap = torch.arange(Lk) - torch.arange(Lk - Lq, Lk)[:, None]
    seen = torch.ones(Lq, Lk, dtype=torch.bool)
    if right >= 0:
        seen &= gap <= right
    if left >= 0:
        seen &= gap >= -left
    return seen


def _efficient_scores(
    query: Tensor, key: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    if attn_bias is not None:
        scores = scores + attn_bias.double()
    if is_causal:  # aligned to the first key
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)
    return scores


def _gradients(
    scores: Tensor,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tensors [..., L, H, D] from an output and log-sum-exp [..., H, L] given."""
    heads, own = query.shape[-2], key.shape[-2]
    weights = torch.exp(scores - lse.double()[..., None])
    g, q, o = (_heads(x, heads) for x in (grad_out, query, out))
    k, v = _heads(key, heads), _heads(value, heads)
    ds = weights * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale

    def summed(x: Tensor) -> Tensor:
        return x.unflatten(-3, (own, heads // own)).sum(-3).transpose(-3, -2)

    dk, dv = ds.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g
    return (ds @ k).transpose(-3, -2), summed(dk), summed(dv)
