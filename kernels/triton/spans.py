"""Where the real tokens of a padded batch lie, found once for all layers of a forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprefix.options import Options

from . import launch, plans
from .arguments import strides
from .target import Tile

CHUNK = 2048  # tokens that a step of the kernel looks at


@triton.jit(do_not_specialize=["Lk", "s_pb"])
def prefix_attn_spans_kernel(pad, spans, s_pb, s_pn, Lk, CHUNK: tl.constexpr):
    """One program: the `Span` of one sequence."""
    i_b = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, CHUNK)
    first = tl.zeros([CHUNK], tl.int32) + Lk
    hole = tl.zeros([CHUNK], tl.int32) + Lk
    end = tl.zeros([CHUNK], tl.int32)
    for i_x in tl.range(0, Lk, CHUNK):
        o_k = i_x + o_x
        p_pad = pad + i_b * s_pb + o_k.to(tl.int64) * s_pn
        m_real = tl.load(p_pad, mask=o_k < Lk, other=0) != 0
        # Padding behind a real token. Nothing waits for the steps before: they are read at once.
        m_before = tl.load(p_pad - s_pn, mask=(o_k > 0) & (o_k < Lk), other=0) != 0
        first = tl.minimum(first, tl.where(m_real, o_k, Lk))
        hole = tl.minimum(hole, tl.where(m_before & (m_real == 0), o_k, Lk))
        end = tl.maximum(end, tl.where(m_real, o_k + 1, 0))
    last = tl.max(end, 0)
    tl.store(spans + i_b * 3, tl.min(first, 0))
    tl.store(spans + i_b * 3 + 1, tl.minimum(tl.min(hole, 0), last))
    tl.store(spans + i_b * 3 + 2, last)


def launch_spans(key_padding_mask: Tensor) -> Tensor:
    """The option `spans` of calls with this padding mask [B, Lk] bool, and of their backward.

    Returns:
        [B, 3] int32, of each row a :class:`~fastprefix.kernels.arguments.Span`.
    """
    options = Options(is_causal=False, scale=1.0)
    (made,) = plans.planned(_launch_spans, (key_padding_mask,), options)
    return made


def _launch_spans(key_padding_mask: Tensor, options: Options) -> tuple[Tensor]:
    """`launch_spans` without a plan."""
    B = key_padding_mask.shape[0]
    spans = torch.empty((B, 3), dtype=torch.int32, device=key_padding_mask.device)
    if B:
        spans_launch(key_padding_mask, spans).run()
    return (spans,)


def spans_launch(key_padding_mask: Tensor, spans: Tensor) -> launch.Launch:
    """The launch that fills the contiguous `spans`."""
    s = strides(pad=key_padding_mask)
    B, Lk = key_padding_mask.shape
    return launch.Launch(
        prefix_attn_spans_kernel,
        (B,),
        {"pad": key_padding_mask, "spans": spans, "s_pb": s.pb, "s_pn": s.pn, "Lk": Lk},
        {"CHUNK": CHUNK},
        Tile(rows=1, keys=CHUNK, warps=8, stages=1),
    )
