"""Every side's way to one result. A side takes a problem and returns a call without arguments.

What a side cannot do it refuses with NotImplementedError, what is missing with ImportError; both
are written down with the figures.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fastprefix.attention import prefix_attention
from fastprefix.attention.selection import interpreting
from fastprefix.bench.problem import Problem, Shape

Call = Callable[[], list[Tensor]]
PAGE = 16  # tokens in a page of FlashInfer's cache
MOST_SCORES = 2**22  # that the yardstick is timed with


@dataclass(frozen=True)
class Side:
    """One way to compute the result.

    Attributes:
        make: from a problem, the call that is timed.
        expanded: whether it works on keys and values with a copy of the prefix in each row.
        doc: what it is, for the tables' legend.
    """

    make: Callable[[Problem], Call]
    expanded: bool
    doc: str


def by_backend(backend: str) -> Callable[[Problem], Call]:
    """prefix_attention by a backend, or "auto"."""

    def make(p: Problem) -> Call:
        return lambda: p.finish(prefix_attention(*p.inputs, is_causal=True, backend=backend))

    return make


def reference(p: Problem) -> Call:
    """prefix_attention's yardstick, which holds every score in memory."""
    s = p.shape
    scores = s.B * s.Hq * s.Lq * (s.P + s.L)
    if scores > MOST_SCORES:
        raise NotImplementedError(f"{scores} scores, more than {MOST_SCORES}: takes too long")
    return by_backend("reference")(p)


def triton(p: Problem) -> Call:
    """prefix_attention through the Triton kernels."""
    if p.query.device.type == "cpu":
        raise NotImplementedError("needs a GPU: times in Triton's interpreter say nothing")
    return by_backend("triton")(p)


def sdpa(p: Problem) -> Call:
    """SDPA with a causal mask that its flash kernel can run: aligned to the last key."""
    s = p.shape
    if not p.train:
        p.expand()
    mask = _causal(p)

    def run() -> list[Tensor]:
        key, value = p.expand()
        return p.finish(
            F.scaled_dot_product_attention(
                p.query, key, value, attn_mask=mask, enable_gqa=s.Hq != s.Hkv
            )
        )

    return run


def _causal(p: Problem) -> Any:
    """The mask of SDPA, made beforehand; on the CPU dense, because its kernel takes no other."""
    s = p.shape
    if s.work == "decode":
        return None
    if p.query.device.type == "cpu":
        return torch.ones(s.L, s.P + s.L, dtype=torch.bool).tril(s.P)
    return causal_lower_right(s.L, s.P + s.L)


def sdpa_concatenated(p: Problem) -> Call:
    """SDPA on expanded keys that get the new ones by a copy in every call, as a cache does it."""
    s = p.shape
    if p.train:
        raise NotImplementedError("the same as sdpa when training: both make their keys in a step")
    full, mask = p.expand(), _causal(p)
    kept = [x[:, :, : -s.Lq].contiguous() for x in full]
    new = [x[:, :, -s.Lq :].contiguous() for x in full]
    rows = s.work == "decode" and s.Hq != s.Hkv
    query = p.query.reshape(s.B, s.Hkv, -1, s.D) if rows else p.query

    def run() -> list[Tensor]:
        key, value = (torch.cat(parts, dim=2) for parts in zip(kept, new, strict=True))
        gqa = s.Hq != s.Hkv and not rows
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=gqa)
        return [out.reshape(p.query.shape)]

    return run


def sdpa_rows(p: Problem) -> Call:
    """SDPA for decoding with the query heads of a group as rows of one head, as models do it."""
    s = p.shape
    if s.work != "decode" or s.Hq == s.Hkv:
        raise NotImplementedError("only for decoding with groups of query heads")
    key, value = p.expand()
    rows = p.query.reshape(s.B, s.Hkv, s.Hq // s.Hkv, s.D)
    return lambda: [F.scaled_dot_product_attention(rows, key, value).reshape(p.query.shape)]


@functools.lru_cache
def compiled_flex(shape: Shape, device: str) -> Callable[..., Tensor]:
    """FlexAttention compiled for one shape; in eager mode where kernels are interpreted."""
    from torch.nn.attention.flex_attention import flex_attention

    eager = device == "cpu" and interpreting()  # a test: nothing is timed
    chosen: Any = flex_attention if eager else torch.compile(flex_attention, dynamic=False)
    return chosen


@functools.lru_cache
def flex_mask(shape: Shape, device: str, one_copy: bool) -> Any:
    """The block mask of :func:`flex` or :func:`flex_one_copy`."""
    from torch.nn.attention.flex_attention import create_block_mask

    s, P, L, Lq = shape, shape.P, shape.L, shape.Lq

    def rows(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + (P + L - Lq)

    def once(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = j - P
        mine = (own // L == i // Lq) & (own % L <= i % Lq + (L - Lq))
        return (j < P) | mine

    if one_copy:
        return create_block_mask(once, None, None, s.B * Lq, P + s.B * L, device=device)
    return create_block_mask(rows, None, None, Lq, P + L, device=device)


def flex(p: Problem) -> Call:
    """FlexAttention on expanded keys and values."""
    s, device = _flex_shape(p)
    mask = None if s.work == "decode" else flex_mask(s, device, False)
    attention = compiled_flex(s, device)

    def run() -> list[Tensor]:
        key, value = p.expand()
        out = attention(p.query, key, value, block_mask=mask, enable_gqa=s.Hq != s.Hkv)
        return p.finish(out)

    return run


def flex_one_copy(p: Problem) -> Call:
    """FlexAttention on one copy: all rows are one sequence, and a mask keeps them apart."""
    s, device = _flex_shape(p)
    mask, attention = flex_mask(s, device, True), compiled_flex(s, device)
    held = None if p.train else p.one_copy()

    def run() -> list[Tensor]:
        key, value = held or p.one_copy()
        query = p.query.transpose(0, 1).reshape(1, s.Hq, s.B * s.Lq, s.D)
        out = attention(query, key, value, block_mask=mask, enable_gqa=s.Hq != s.Hkv)
        return p.finish(out[0].unflatten(1, (s.B, s.Lq)).transpose(0, 1))

    return run


def _flex_shape(p: Problem) -> tuple[Shape, str]:
    if not p.shape.flex:
        raise NotImplementedError("not timed at this shape: its compilation takes long")
    if p.train and p.query.device.type == "cpu":
        raise NotImplementedError("has no backward on the CPU")
    return p.shape, p.query.device.type


def hydragen(p: Problem) -> Call:
    """The prefix's part for all rows at once and the rows' own parts, merged by their lse.

    Both parts are PyTorch's flash kernel, as in Hydragen. Its operators do not differentiate the
    lse, so this side has no backward.
    """
    s = p.shape
    if p.train:
        raise NotImplementedError("has no backward")
    if not s.P:  # PyTorch's kernel for the CPU divides by the number of keys
        raise NotImplementedError("needs a prefix")
    group = s.Hq // s.Hkv
    prefix_key, prefix_value = p.prefix_key[None], p.prefix_value[None]

    def run() -> list[Tensor]:
        # [1, Hkv, B group Lq, D]: all that attends to one head of the prefix, as rows
        folded = p.query.unflatten(1, (s.Hkv, group)).transpose(0, 1).reshape(1, s.Hkv, -1, s.D)
        shared, shared_lse = _flash(folded, prefix_key, prefix_value, causal=False)
        split = (s.B, group, s.Lq)
        shared = shared[0].unflatten(1, split).transpose(0, 1).flatten(1, 2)
        shared_lse = shared_lse[0].unflatten(1, split).transpose(0, 1).flatten(1, 2)
        own, own_lse = _flash(p.query, p.key, p.value, causal=s.work != "decode")
        weight = torch.sigmoid(shared_lse - own_lse)[..., None]
        return [torch.lerp(own.float(), shared.float(), weight).to(own.dtype)]

    return run


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of PyTorch's flash kernel."""
    ops = torch.ops.aten
    if query.device.type == "cpu":
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        return ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
    return ops._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[:2]


@functools.lru_cache
def workspace(device: str) -> Tensor:
    """FlashInfer's, shared by calls that run one after the other."""
    return torch.empty(128 << 20, dtype=torch.uint8, device=device)


def flashinfer(p: Problem) -> Call:
    """FlashInfer's two-level cascade over pages: the prefix's once, then each row's own."""
    _installed("flashinfer")
    s, device = p.shape, p.query.device
    if s.work != "decode":
        raise NotImplementedError("compared for decoding only")
    if s.P % PAGE or s.L % PAGE:
        raise NotImplementedError(f"whole pages of {PAGE} only")
    from flashinfer import MultiLevelCascadeAttentionWrapper

    # [tokens, 2, Hkv, D]: the prefix, then the rows end to end
    shared = torch.stack([p.prefix_key, p.prefix_value]).permute(2, 0, 1, 3)
    own = torch.stack([p.key, p.value]).permute(1, 3, 0, 2, 4).flatten(0, 1)
    tokens = torch.cat([shared, own]).unflatten(0, (-1, PAGE))
    pages = tokens.transpose(1, 2).contiguous()  # [pages, 2, PAGE, Hkv, D]

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    first, each = s.P // PAGE, s.L // PAGE
    count = torch.arange(s.B + 1, dtype=torch.int32, device=device)
    wrapper = MultiLevelCascadeAttentionWrapper(2, workspace(str(device)), "NHD")
    wrapper.plan(
        [ints(0, s.B), count],
        [ints(0, first), count * each],
        [ints(*range(first)), ints(*range(first, first + s.B * each))],
        [ints(PAGE), ints(PAGE).expand(s.B).contiguous()],
        s.Hq, s.Hkv, s.D, PAGE,
        q_data_type=p.query.dtype,
    )  # fmt: skip
    query = p.query[:, :, 0].contiguous()
    return lambda: [wrapper.run(query, pages).unsqueeze(2)]


def flash_attention(module: str) -> Callable[[Problem], Call]:
    """FlashAttention 2 (flash_attn) or 3 (flash_attn_interface) on expanded keys and values."""

    def make(p: Problem) -> Call:
        _installed(module)
        function = importlib.import_module(module).flash_attn_func
        if not p.train:
            p.expand()

        def run() -> list[Tensor]:
            key, value = p.expand()
            out = function(*(x.transpose(1, 2) for x in (p.query, key, value)), causal=True)
            out = out[0] if isinstance(out, tuple) else out
            return p.finish(out.transpose(1, 2))

        return run

    return make


def _installed(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError("not installed")


SIDES = {
    "ours": Side(by_backend("auto"), False, "prefix_attention"),
    "sdpa": Side(sdpa, True, "SDPA on expanded keys, causal_lower_right"),
    "sdpa rows": Side(sdpa_rows, True, "SDPA on expanded keys, a group's heads as rows"),
    "sdpa concatenated": Side(
        sdpa_concatenated, True, "SDPA on expanded keys, concatenated in each call as in a cache"
    ),
    "hydragen": Side(hydragen, False, "Hydragen in plain PyTorch"),
    "composed": Side(by_backend("composed"), False, "our backend composed: flash kernels"),
    "flashinfer": Side(flashinfer, False, "FlashInfer's cascade"),
    "fa2": Side(flash_attention("flash_attn"), True, "FlashAttention 2 on expanded keys"),
    "fa3": Side(flash_attention("flash_attn_interface"), True, "FlashAttention 3 on expanded keys"),
    "flex": Side(flex, True, "FlexAttention on expanded keys"),
    "flex one copy": Side(flex_one_copy, False, "FlexAttention on one copy"),
}
