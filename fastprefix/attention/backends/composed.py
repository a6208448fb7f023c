"""Two calls of PyTorch's own flash kernel, one for the prefix and one for the sequence, merged.

The prefix call folds batch and query group into rows: [1, Hkv, B·g·Lq, D] against one copy of the
prefix [1, Hkv, P, D]. Its backward therefore returns the prefix's gradient already summed over
the batch. In the backward both calls get the GLOBAL output and log-sum-exp, which makes each
part's gradient the exact share of the whole (FlashAttention-2, section 3.1: dS = P * (dP - delta),
where P and delta depend on the other part only through lse and out).

Runs on the CPU, whose flash kernel returns the log-sum-exp and takes a broadcast mask.

This file has the two calls and what surrounds them; what only some calls use (several prefixes,
packed sequences, windows, sinks, a bias) is in :mod:`.composed_features`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprefix.attention.call import Options

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# PyTorch's half-precision backward takes up to nine times as long as its float32 one where queries
# or keys are fewer than this (2.13, a processor with AMX), and 0.7 to 1.8 times as long beyond.
_SHORT = 256

# Masked scores get this instead of -inf: the kernel reports lse = 0 for a row whose scores are
# all -inf, which a merge would take for a real weight. A finite floor drops out of every merge by
# underflow, and a row whose lse is still near the floor has seen nothing.
_FLOOR = -1e30


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`."""
    inputs = (query, key, value, prefix_key, prefix_value)
    if _plain(options):
        return _plain_forward(
            *inputs,
            options.key_padding_mask,
            options.attn_mask,
            is_causal=options.is_causal,
            scale=options.scale,
        )
    from fastprefix.attention.backends import composed_features  # which builds on this file

    return composed_features.forward(*inputs, options)


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
    """Gradients of query, key, value, prefix_key, prefix_value, sinks and prefix_bias.

    Args:
        grad_out: gradient of out, [B, Hq, Lq, Dv].
        query: as in the forward, like key, value, the prefix and the options.
        key: see query.
        value: see query.
        prefix_key: see query.
        prefix_value: see query.
        out: the forward's output.
        lse: the forward's log-sum-exp.
        options: see query.
        needs: which of the seven gradients to compute.

    Returns:
        The gradients, None where not needed; that of prefix_bias only where it is [Hq].
    """
    inputs = (grad_out, query, key, value, prefix_key, prefix_value)
    if _plain(options):
        grads = _plain_backward(
            *inputs,
            options.key_padding_mask,
            options.attn_mask,
            out,
            lse,
            is_causal=options.is_causal,
            scale=options.scale,
            needs=(needs[0], needs[1], needs[2], needs[3], needs[4]),
        )
        return (*grads, None, None)
    from fastprefix.attention.backends import composed_features  # which builds on this file

    return composed_features.backward(*inputs, out, lse, options, needs)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradients of query, key and value; float32 where it is faster in float32."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and min(query.shape[-2], key.shape[-2]) < _SHORT:
        grad_out, query, key, value, out = (x.float() for x in (grad_out, query, key, value, out))
        attn_mask = None if attn_mask is None else attn_mask.float()
    return _flash_backward_kernel(
        grad_out, query, key, value, out, lse, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )


def _plain(options: Options) -> bool:
    """Whether one prefix, one sequence a row and the masks are all there is."""
    return (
        options.prefix_lengths is None
        and options.cu_seqlens is None
        and options.sliding_window is None
        and options.sinks is None
        and options.prefix_bias is None
    )


def _plain_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The forward of :func:`_plain` calls."""
    Dv = value.shape[-1]
    query, key, value, prefix_key, prefix_value = _equal_head_sizes(
        query, key, value, prefix_key, prefix_value
    )
    B, Hq, Lq, _ = query.shape
    P, Lk = prefix_key.shape[1], key.shape[2]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if query.numel() == 0 or P + Lk == 0:
        lse = torch.full((B, Hq, Lq), float("-inf"), dtype=lse_dtype, device=query.device)
        return query.new_zeros(B, Hq, Lq, Dv), lse
    if Lq == 1 and P > 0 and Lk > 0 and key_padding_mask is None and attn_mask is None:
        out, lse = _decode(query, key, value, prefix_key, prefix_value, scale)
        return out[..., :Dv], lse

    if Lk > 0:
        part = _SequencePart(query, key, key_padding_mask, attn_mask, is_causal)
        out, lse = _flash(
            part.fold(query), part.keys(key), part.keys(value), 0.0, part.is_causal,
            attn_mask=part.bias, scale=scale,
        )  # fmt: skip
        out, lse = part.unfold(out), part.unfold(lse)
    if P > 0:
        Hkv = prefix_key.shape[0]
        prefix_out, prefix_lse = _flash(
            _rows(query, Hkv), prefix_key[None], prefix_value[None], 0.0, False, scale=scale
        )
        prefix_out = _unrows(prefix_out, query.shape)
        prefix_lse = _unrows(prefix_lse, query.shape[:3])
        if Lk == 0:
            out, lse = prefix_out, prefix_lse
        else:
            # exp(lse_p) / (exp(lse_p) + exp(lse_s)), in the accumulation dtype
            weight = torch.sigmoid(prefix_lse - lse)[..., None]
            out = torch.lerp(out.to(lse_dtype), prefix_out.to(lse_dtype), weight).to(query.dtype)
            lse = torch.logaddexp(lse, prefix_lse)
    elif key_padding_mask is not None or attn_mask is not None:
        blind = lse < _FLOOR / 2
        out = out.masked_fill(blind[..., None], 0.0)
        lse = lse.masked_fill(blind, float("-inf"))
    return out[..., :Dv], lse


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query per row that sees everything: the general path's result in fewer small steps.

    A generated token calls this once a layer, where each PyTorch call costs about as much as the
    arithmetic; the flash calls should be most of what is left.
    """
    B, Hq, _, D = query.shape
    Hkv = prefix_key.shape[0]
    grouped = query.reshape(B, Hkv, Hq // Hkv, D)
    out, lse = _flash(grouped, key, value, 0.0, False, scale=scale)
    rows = grouped.transpose(0, 1).reshape(1, Hkv, -1, D)
    prefix_out, prefix_lse = _flash(
        rows, prefix_key[None], prefix_value[None], 0.0, False, scale=scale
    )
    prefix_out = prefix_out.view(Hkv, B, -1, D).transpose(0, 1)
    prefix_lse = prefix_lse.view(Hkv, B, -1).transpose(0, 1)
    weight = torch.sigmoid(prefix_lse - lse)[..., None]
    merged = torch.lerp(out.to(weight.dtype), prefix_out.to(weight.dtype), weight)
    lse = torch.logaddexp(lse, prefix_lse)
    return merged.to(query.dtype).reshape(query.shape), lse.reshape(B, Hq, 1)


def _plain_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The backward of :func:`_plain` calls: five gradients."""
    D, Dv = query.shape[-1], value.shape[-1]
    query, key, value, prefix_key, prefix_value, out, grad_out = _equal_head_sizes(
        query, key, value, prefix_key, prefix_value, out, grad_out
    )
    P, Lk = prefix_key.shape[1], key.shape[2]
    inputs = (query, key, value, prefix_key, prefix_value)
    if query.numel() == 0 or P + Lk == 0:
        return tuple(
            torch.zeros_like(x)[..., :width] if need else None
            for x, width, need in zip(inputs, (D, D, Dv, D, Dv), needs, strict=True)
        )
    need_query, need_key, need_value, need_prefix_key, need_prefix_value = needs
    # a row that saw nothing: exp(score - inf) = 0 gives zero gradients
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))

    dq: Tensor | None = None
    dk = torch.zeros_like(key) if need_key else None
    dv = torch.zeros_like(value) if need_value else None
    if Lk > 0 and (need_query or need_key or need_value):
        part = _SequencePart(query, key, key_padding_mask, attn_mask, is_causal)
        dq, dk, dv = flash_backward(
            part.fold(grad_out), part.fold(query), part.keys(key), part.keys(value),
            part.fold(out), part.fold(lse),
            is_causal=part.is_causal, attn_mask=part.bias, scale=scale,
        )  # fmt: skip
        dq, dk, dv = part.unfold(dq), part.sum_keys(dk), part.sum_keys(dv)
    dpk = torch.zeros_like(prefix_key) if need_prefix_key else None
    dpv = torch.zeros_like(prefix_value) if need_prefix_value else None
    if P > 0 and (need_query or need_prefix_key or need_prefix_value):
        Hkv = prefix_key.shape[0]
        dq_prefix, dpk, dpv = flash_backward(
            _rows(grad_out, Hkv), _rows(query, Hkv), prefix_key[None], prefix_value[None],
            _rows(out, Hkv), _rows(lse, Hkv), is_causal=False, attn_mask=None, scale=scale,
        )  # fmt: skip
        dq_prefix = _unrows(dq_prefix, query.shape)
        dq = dq_prefix if dq is None else dq + dq_prefix
        dpk, dpv = dpk[0], dpv[0]
    widths = (D, D, Dv, D, Dv)
    return tuple(
        grad[..., :width].to(query.dtype) if need and grad is not None else None
        for grad, width, need in zip((dq, dk, dv, dpk, dpv), widths, needs, strict=True)
    )


class _SequencePart:
    """How the sequence part is laid out for the kernel, which knows neither groups nor offsets.

    Without a mask that differs by query, a group's queries become rows of one head:
    [B, Hkv, g·Lq, D]. Otherwise batch and KV head become the batch and each group gets a
    stride-0 view of its keys: [B·Hkv, g, Lk, D]. Keys and values are never repeated.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        sliding_window: int | None = None,
    ) -> None:
        self.B, self.Hq, self.Lq, _ = query.shape
        self.Hkv, self.Lk = key.shape[1], key.shape[2]
        self.group = self.Hq // self.Hkv
        is_causal = is_causal and self.Lq > 1  # one query, aligned to the end, sees every key
        bias = None
        if key_padding_mask is not None:
            bias = torch.zeros(key_padding_mask.shape, dtype=query.dtype, device=query.device)
            if query.dtype is torch.float16:  # which cannot hold the floor
                bias = bias.float()
            bias = bias.masked_fill_(~key_padding_mask, _FLOOR)[:, None, None, :]
        if attn_mask is not None:
            added = _additive(attn_mask, query.dtype)
            bias = added if bias is None else torch.clamp(bias + added, min=_FLOOR)
        # the kernel knows no window, and aligns its own causal mask to the start
        if sliding_window is not None or (is_causal and self.Lk > self.Lq):
            offset, reach = (
                self.Lk - self.Lq,
                self.Lk if sliding_window is None else sliding_window - 1,
            )
            seen = torch.ones(self.Lq, self.Lk, dtype=torch.bool, device=query.device)
            seen = seen.tril_(offset + (0 if is_causal else reach)).triu_(offset - reach)
            if bias is None:
                wide = torch.promote_types(query.dtype, torch.float32)
                bias = torch.zeros(1, 1, 1, 1, dtype=wide, device=query.device)
            bias = bias.masked_fill(~seen, _FLOOR)
            is_causal = False
        self.is_causal = is_causal
        self.as_rows = not is_causal and (bias is None or bias.shape[1] == bias.shape[2] == 1)
        if bias is not None and not self.as_rows:
            bias = self._fold_bias(bias)
        self.bias = bias

    def _fold_bias(self, bias: Tensor) -> Tensor:
        _, h, q, k = bias.shape
        heads = 1 if h == 1 else self.group
        bias = bias.expand(self.B, self.Hkv if h == 1 else h, q, k)
        return bias.reshape(self.B * self.Hkv, heads, q, k)

    def fold(self, x: Tensor) -> Tensor:
        """[B, Hq, Lq, ...] to the kernel's layout."""
        tail = x.shape[3:]
        if self.as_rows:
            return x.reshape(self.B, self.Hkv, self.group * self.Lq, *tail)
        return x.reshape(self.B * self.Hkv, self.group, self.Lq, *tail)

    def unfold(self, x: Tensor) -> Tensor:
        """The kernel's layout to [B, Hq, Lq, ...]."""
        return x.reshape(self.B, self.Hq, self.Lq, *x.shape[3:])

    def keys(self, x: Tensor) -> Tensor:
        """Key or value [B, Hkv, Lk, D] in the kernel's layout, as a view where strides allow."""
        if self.as_rows:
            return x
        return x.reshape(self.B * self.Hkv, 1, self.Lk, -1).expand(-1, self.group, -1, -1)

    def sum_keys(self, grad: Tensor) -> Tensor:
        """Gradient in the kernel's layout to [B, Hkv, Lk, D]."""
        if self.as_rows:
            return grad
        return grad.sum(1).reshape(self.B, self.Hkv, self.Lk, -1)


def _rows(x: Tensor, Hkv: int) -> Tensor:
    """[B, Hq, Lq, ...] -> [1, Hkv, B·g·Lq, ...]: every query of a KV head, of the whole batch."""
    B, Hq, Lq, *tail = x.shape
    rows = x.reshape(B, Hkv, (Hq // Hkv) * Lq, *tail).transpose(0, 1)
    return rows.reshape(1, Hkv, -1, *tail)


def _unrows(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_rows`."""
    B, Hq, Lq, *tail = shape
    Hkv = x.shape[1]
    x = x.reshape(Hkv, B, (Hq // Hkv) * Lq, *tail).transpose(0, 1)
    return x.reshape(B, Hq, Lq, *tail)


def _additive(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool (True = attend) or additive mask as a finite additive one of four dimensions."""
    wide = torch.promote_types(dtype, torch.float32)
    if attn_mask.dtype is torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=wide, device=attn_mask.device)
        bias = bias.masked_fill_(~attn_mask, _FLOOR)
    else:
        bias = attn_mask.to(wide).clamp(min=_FLOOR)
    return bias[(None,) * (4 - bias.dim())]


def _equal_head_sizes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pads the last dimension with zeros to the largest: exact, and what the kernel asks for.

    It also takes that dimension for contiguous without looking.
    """
    width = max(x.shape[-1] for x in tensors)
    padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in padded)
