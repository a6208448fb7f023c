"""How the sequence part of a call is laid out for the flash kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprefix.attention.backends.composed.flash import FLOOR, additive


class SequencePart:
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
            bias = bias.masked_fill_(~key_padding_mask, FLOOR)[:, None, None, :]
        if attn_mask is not None:
            added = additive(attn_mask, query.dtype)
            bias = added if bias is None else torch.clamp(bias + added, min=FLOOR)
        # the kernel knows no window, and aligns its own causal mask to the start
        if sliding_window is not None or (is_causal and self.Lk != self.Lq):
            offset, reach = (
                self.Lk - self.Lq,
                self.Lk if sliding_window is None else sliding_window - 1,
            )
            seen = torch.ones(self.Lq, self.Lk, dtype=torch.bool, device=query.device)
            seen = seen.tril_(offset + (0 if is_causal else reach)).triu_(offset - reach)
            if bias is None:
                wide = torch.promote_types(query.dtype, torch.float32)
                bias = torch.zeros(1, 1, 1, 1, dtype=wide, device=query.device)
            bias = bias.masked_fill(~seen, FLOOR)
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
