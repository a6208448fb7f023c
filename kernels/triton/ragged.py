"""The real tokens before each query, where a prefix slides out of a window."""

from __future__ import annotations

import torch
from torch import Tensor


def query_ranks(key_padding_mask: Tensor, Lq: int) -> Tensor:
    """[B, Lq] int32: how many real tokens come before each query.

    The queries are the last Lq tokens.
    """
    real = key_padding_mask.to(torch.int32)
    before = torch.nn.functional.pad(real.cumsum(1) - real, (max(Lq - real.shape[1], 0), 0))
    return before[:, before.shape[1] - Lq :].to(torch.int32).contiguous()
