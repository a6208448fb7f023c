"""The kernels of each device, behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprefix.attention.backends.composed import cuda, flash


class Kernels(NamedTuple):
    """PyTorch's attention kernels for a device, and what a caller must know of them.

    Attributes:
        forward: (query [B, H, Lq, D], key [B, H, Lk, D], value [B, H, Lk, D], scale, seen) to the
            output [B, H, Lq, D] in the query's dtype and the natural log-sum-exp [B, H, Lq]. A row
            that sees nothing has a log-sum-exp near the floor, or -inf.
        backward: (grad_out, query, key, value, out, lse, scale, seen) to the gradients of query,
            key and value. Output and log-sum-exp may be those of more keys than these. Where the
            log-sum-exp is inf, the gradients are zeros.
        takes_all: whether calls on this query without a mask may have fewer key heads than query
            heads, causality with more keys than queries, a window and packed sequences.
        head_size: the size to pad a head size to.
        can_load: whether the kernels can read a tensor as it lies in memory.
        copies_small: whether a call on small copies of keys is faster than two calls.
        host_reads: whether the host can read values of a tensor without waiting for the device.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    takes_all: Callable[[Tensor], bool]
    head_size: Callable[[int], int]
    can_load: Callable[[Tensor], bool]
    copies_small: bool
    host_reads: bool


KERNELS: dict[str, Kernels] = {
    "cpu": Kernels(
        flash.flash_forward,
        flash.flash_backward,
        takes_all=lambda query: False,
        head_size=lambda size: size,
        can_load=lambda x: x.stride(-1) == 1,
        copies_small=True,
        host_reads=True,
    ),
    "cuda": Kernels(
        cuda.forward,
        cuda.backward,
        takes_all=cuda.is_flash,
        head_size=cuda.head_size,
        can_load=cuda.can_load,
        copies_small=False,
        host_reads=False,
    ),
}


def kernels_of(x: Tensor) -> Kernels:
    """The kernels of a tensor's device."""
    return KERNELS[x.device.type]


def equal_head_sizes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pads the last dimension with zeros to one size, and copies what the kernels cannot load.

    The zeros change no score and no output but their own columns.
    """
    kernels = kernels_of(tensors[0])
    can_load, width = kernels.can_load, tensors[0].shape[-1]
    if kernels.head_size(width) == width:
        for x in tensors:
            if x.shape[-1] != width or not can_load(x):
                break
        else:  # nearly always: every layer of a generated token asks
            return tensors
    width = kernels.head_size(max(x.shape[-1] for x in tensors))
    padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)
    return tuple(
        x if can_load(x) else x.clone(memory_format=torch.contiguous_format) for x in padded
    )
