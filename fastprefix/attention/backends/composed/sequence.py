"""How the sequence part of a call is laid out for the flash kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.flash import (
    FLOOR,
    additive,
    hiding,
    hiding_dtype,
)
from fastprefix.attention.backends.composed.kernels import kernels_of
from fastprefix.attention.backends.composed.seen import Seen


def numbers(lengths: Tensor, total: int) -> Tensor:
    """[total]: lengths[0] times 0, lengths[1] times 1, and so on. Waits for no device."""
    return torch.repeat_interleave(lengths, output_size=total)


class SequencePart:
    """How the sequence part is laid out for the kernel, and what its queries see.

    Where every query sees the same keys, a group's queries become rows of one head:
    [B, Hkv, g·Lq, D]. Otherwise a kernel that takes all gets its tensors as they are. For the
    others, which know neither groups nor offsets, batch and KV head become the batch and each
    group gets a stride-0 view of its keys: [B·Hkv, g, Lk, D]. Keys and values are never repeated.

    Attributes:
        seen: what the queries see, for the kernel.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        sliding_window: int | None = None,
        cu_seqlens: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> None:
        self.B, self.Hq, self.Lq, _ = query.shape
        self.Hkv, self.Lk = key.shape[1], key.shape[2]
        self.group = self.Hq // self.Hkv
        if self.Lq == 1:  # aligned to the end, it sees every key, and is a sequence of its own
            is_causal, cu_seqlens = False, None
        bias = None
        if key_padding_mask is not None:
            bias = hiding(key_padding_mask, query.dtype)
        if attn_mask is not None:
            added = additive(attn_mask, query.dtype)
            bias = added if bias is None else torch.clamp(bias + added, min=FLOOR)
        self.as_is = bias is None and key_lengths is None and kernels_of(query).takes_all(query)
        by_place = not (sliding_window is cu_seqlens is key_lengths is None)
        if not self.as_is and (by_place or (is_causal and self.Lk != self.Lq)):
            if bias is None:
                bias = query.new_zeros(1, 1, 1, 1, dtype=hiding_dtype(query.dtype))
            seen = self._seen(query, is_causal, sliding_window, cu_seqlens, key_lengths)
            bias = bias.masked_fill(~seen, FLOOR)
            is_causal, sliding_window, cu_seqlens, by_place = False, None, None, False
        same_keys = not is_causal and not by_place
        self.as_rows = same_keys and (bias is None or bias.shape[1] == bias.shape[2] == 1)
        if bias is not None and not self.as_rows:
            bias = self._fold_bias(bias)
        self.seen = Seen(is_causal, bias, sliding_window, cu_seqlens)

    def _seen(
        self,
        query: Tensor,
        is_causal: bool,
        window: int | None,
        cu_seqlens: Tensor | None,
        key_lengths: Tensor | None,
    ) -> Tensor:
        """Which keys a query sees by its place, bool [B or 1, 1, Lq or 1, Lk]."""
        if key_lengths is not None:
            return self._seen_in_use(is_causal, window, key_lengths)
        offset, reach = self.Lk - self.Lq, self.Lk if window is None else window - 1
        seen = torch.ones(self.Lq, self.Lk, dtype=torch.bool, device=query.device)
        seen = seen.tril_(offset + (0 if is_causal else reach)).triu_(offset - reach)
        if cu_seqlens is not None:
            number = numbers(cu_seqlens.diff(), self.Lq)
            seen &= number[:, None] == number
        return seen[None, None]

    def _seen_in_use(self, is_causal: bool, window: int | None, key_lengths: Tensor) -> Tensor:
        """The same where each row has its own number of keys."""
        column = torch.arange(self.Lk, device=key_lengths.device)
        seen = (column < key_lengths[:, None])[:, None, None]
        if is_causal or window is not None:
            place = torch.arange(self.Lq, device=key_lengths.device)
            place = place + (key_lengths[:, None] - self.Lq)
            gap = place[:, None, :, None] - column
            seen = seen & (gap >= 0) if is_causal else seen
            seen = seen & (gap.abs() < window) if window is not None else seen
        return seen

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
        if self.as_is:
            return x
        return x.reshape(self.B * self.Hkv, self.group, self.Lq, *tail)

    def unfold(self, x: Tensor) -> Tensor:
        """The kernel's layout to [B, Hq, Lq, ...]."""
        return x.reshape(self.B, self.Hq, self.Lq, *x.shape[3:])

    def keys(self, x: Tensor) -> Tensor:
        """Key or value [B, Hkv, Lk, D] in the kernel's layout, as a view where strides allow."""
        if self.as_rows or self.as_is:
            return x
        return x.reshape(self.B * self.Hkv, 1, self.Lk, -1).expand(-1, self.group, -1, -1)

    def sum_keys(self, grad: Tensor) -> Tensor:
        """Gradient in the kernel's layout to [B, Hkv, Lk, D]."""
        if self.as_rows or self.as_is:
            return grad
        return grad.sum(1).reshape(self.B, self.Hkv, self.Lk, -1)
