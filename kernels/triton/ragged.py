"""The real tokens before each query, where a prefix slides out of a window."""

from __future__ import annotations

import torch
from torch import Tensor


def query_ranks(key_padding_mask: Tensor, key_lengths: Tensor | None, Lq: int) -> Tensor:
    """[B, Lq] int32: how many real tokens come before each query.

    The queries are the last Lq tokens, or of a buffer the last ones in use.

    Args:
        key_padding_mask: [B, Lk], True for real tokens.
        key_lengths: [B], how many of the Lk tokens are in use; None for all.
        Lq: how many queries.
    """
    real = key_padding_mask.to(torch.int32)
    if key_lengths is not None:
        Lk = real.shape[1]
        position = torch.arange(Lq, device=real.device) + key_lengths.clamp(0, Lk)[:, None] - Lq
        before = torch.nn.functional.pad(real.cumsum(1), (1, 0))  # [B, Lk + 1]
        return before.gather(1, position.clamp(min=0).long()).to(torch.int32)
    before = torch.nn.functional.pad(real.cumsum(1) - real, (max(Lq - real.shape[1], 0), 0))
    return before[:, before.shape[1] - Lq :].to(torch.int32).contiguous()
