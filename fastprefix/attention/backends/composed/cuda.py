"""PyTorch's attention kernels for CUDA: flash attention, and the memory-efficient one for the rest.

Flash attention is for float16 and bfloat16 and for head sizes up to 256. It has no mask. It takes
fewer key heads than query heads, windows and packed sequences, and it aligns causality to the last
key. It needs a device of compute capability 8.0 or more.

The memory-efficient kernel is for float32, too, and for any head size. It takes a mask in the dtype
of the query, and it aligns causality to the first key. On newer devices it makes a float32 product
out of three TF32 products, which is about as exact. A call whose mask has a wider dtype than its
query (float16 cannot hold the floor; a user may add float32 numbers to the scores) runs in that
dtype.

Nothing here waits for the device, and no shape depends on the values of a tensor.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprefix.attention.backends.composed.seen import Seen

_flash_forward = torch.ops.aten._flash_attention_forward.default
_flash_backward = torch.ops.aten._flash_attention_backward.default
_efficient_forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default

_FLASH_HEAD_SIZE = 256
# The memory-efficient kernel loads a row of a mask in pieces of this many elements at most, and
# keeps so many log-sum-exps at least; PyTorch itself pads to these sizes.
_MASK_STEP = 16
_LSE_STEP = 32


def is_flash(query: Tensor) -> bool:
    """Whether flash attention can compute calls without a mask on this query."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and query.shape[-1] <= _FLASH_HEAD_SIZE


def head_size(size: int) -> int:
    """The next multiple of 8; from 193 to 256 it is 256.

    The backward of head size 224 does not fit the shared memory of smaller devices. That of 256
    does.
    """
    return _FLASH_HEAD_SIZE if 192 < size <= _FLASH_HEAD_SIZE else -(-size // 8) * 8


def can_load(x: Tensor) -> bool:
    """Whether 16 bytes can be loaded at once from every row. The kernels do so without asking."""
    step = 16 // x.element_size()
    rows = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(size == 1 or stride % step == 0 for size, stride in rows)
    )


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Seen
) -> tuple[Tensor, Tensor]:
    """See :class:`fastprefix.attention.backends.composed.kernels.Kernels`."""
    query, scale, _ = _positive(query, scale)
    if seen.mask is None and is_flash(query):
        return _flash(query, key, value, scale, seen)
    return _efficient(query, key, value, scale, seen)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    seen: Seen,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fastprefix.attention.backends.composed.kernels.Kernels`."""
    query, scale, sign = _positive(query, scale)
    flash = seen.mask is None and is_flash(query)
    gradients = _flash_gradients if flash else _efficient_gradients
    dq, dk, dv = gradients(grad_out, query, key, value, out, lse, scale, seen)
    return (dq if sign == 1.0 else dq * sign), dk, dv


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """The same scores from a scale above 0: query, scale, and the factor on the query.

    The kernels take the maximum of a row before they scale it.
    """
    if scale > 0.0:
        return query, scale, 1.0
    sign = -1.0 if scale < 0.0 else 0.0
    return query * sign, -scale or 1.0, sign


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Seen
) -> tuple[Tensor, Tensor]:
    packed, Lq, Lk = seen.cu_seqlens is not None, query.shape[2], key.shape[2]
    query, key, value = (_tokens(x, packed) for x in (query, key, value))
    ends = None if seen.cu_seqlens is None else seen.cu_seqlens.contiguous()
    left, right = _window(seen)
    out, lse, *_ = _flash_forward(
        query, key, value, ends, ends, Lq, Lk, 0.0, seen.is_causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    if packed:
        out, lse = out[None], lse[None]
    if Lk < Lq and (seen.is_causal or seen.window is not None):  # inf where a query sees nothing
        lse = lse.masked_fill(lse == math.inf, -math.inf)
    return out.transpose(1, 2), lse


def _flash_gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    seen: Seen,
) -> tuple[Tensor, Tensor, Tensor]:
    packed, Lq, Lk = seen.cu_seqlens is not None, query.shape[2], key.shape[2]
    grad_out, query, key, value, out = (
        _tokens(x, packed) for x in (grad_out, query, key, value, out)
    )
    ends = None if seen.cu_seqlens is None else seen.cu_seqlens.contiguous()
    left, right = _window(seen)
    lse = (lse[0] if packed else lse).contiguous()
    state = query.new_empty(2, dtype=torch.uint64)  # of dropout: not read
    grads = _flash_backward(
        grad_out, query, key, value, out, lse, ends, ends, Lq, Lk, 0.0, seen.is_causal, state,
        state, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    dq, dk, dv = ((x[None] if packed else x).transpose(1, 2) for x in grads)
    return dq, dk, dv


def _tokens(x: Tensor, packed: bool) -> Tensor:
    """[B, H, L, D] to flash attention's [B, L, H, D], or [L, H, D] for packed sequences."""
    return x[0].transpose(0, 1) if packed else x.transpose(1, 2)


def _window(seen: Seen) -> tuple[int | None, int | None]:
    """How many keys a query sees to the left and to the right of its own position."""
    if seen.window is None:
        return None, None
    return seen.window - 1, 0 if seen.is_causal else seen.window - 1


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Seen
) -> tuple[Tensor, Tensor]:
    dtype, Lq = query.dtype, query.shape[2]
    mask = _laid_out(seen.mask, query, key)
    if mask is not None:
        query, key, value = (x.to(mask.dtype) for x in (query, key, value))
    out, lse, *_ = _efficient_forward(
        query, key, value, mask, True, 0.0, seen.is_causal, scale=scale
    )
    return out.to(dtype), lse[..., :Lq]


def _efficient_gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    seen: Seen,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _laid_out(seen.mask, query, key)
    if mask is not None:
        grad_out, query, key, value, out = (
            x.to(mask.dtype) for x in (grad_out, query, key, value, out)
        )
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as the kernel's forward leaves it
    lse = F.pad(lse, (0, -lse.shape[-1] % _LSE_STEP), value=math.inf).contiguous()
    seed = lse.new_empty((), dtype=torch.int64)  # of dropout: not read
    dq, dk, dv, _ = _efficient_backward(
        grad_out, query, key, value, mask, out, lse, seed, seed, 0.0, [True, True, True, False],
        seen.is_causal, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _laid_out(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask [B, H, Lq, Lk] with aligned rows, as views where it is broadcast."""
    if mask is None:
        return None
    *some, Lk = *mask.shape[:3], key.shape[2]
    mask = mask.expand(*some, Lk)
    if Lk % _MASK_STEP:
        mask = F.pad(mask.contiguous(), (0, -Lk % _MASK_STEP))[..., :Lk]
    elif not can_load(mask):
        mask = mask.clone(memory_format=torch.contiguous_format)
    return mask.expand(*query.shape[:3], Lk)
