"""Problems for the operator and for the kernels: sizes and options by name, drawn from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix_testing.calls import Call


@dataclass(frozen=True)
class Problem:
    """Sizes and options of a call.

    Attributes:
        B: rows.
        Hq: query heads.
        Hkv: key/value heads.
        Lq: queries.
        Lk: keys; None for as many as queries.
        P: tokens of the prefix; None for no prefix at all.
        D: head size.
        Dv: head size of the values; None for D.
        dtype: of all tensors of numbers.
        layout: of query, key, value, prefix and gradient in memory; see :func:`laid_out`.
        padding: none, left, right, holes or row (holes, and one row that is all padding).
        in_use: how many keys of each row are in use; the others are NaN. None for all of them.
        lengths: of several packed prefixes; P is then their sum.
        index: the prefix of each row, -1 for none; None draws it. For `lengths`.
        cu_seqlens: ends of packed sequences. B is then 1, and Lq and Lk are the last end.
        attn_mask: none, bool, additive (-inf hides) or lowest (the lowest number hides).
        broadcast: of which dimensions of [B, Hq, Lq, Lk] the mask has one entry.
        sinks: whether there is a sink in each head.
        prefix_bias: none, heads ([Hq]) or columns ([Hq, Lq, P]).
        is_causal: see the operator, as all below.
    """

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    Lq: int = 7
    Lk: int | None = None
    P: int | None = 5
    D: int = 16
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    padding: str = "none"
    in_use: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    index: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    attn_mask: str = "none"
    broadcast: tuple[bool, bool, bool, bool] = (False, False, False, False)
    sinks: bool = False
    prefix_bias: str = "none"
    is_causal: bool = False
    scale: float | None = None
    sliding_window: int | None = None
    prefix_in_window: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0

    def draw(self, seed: int = 0) -> Call:
        """A call with random numbers; the same seed gives the same ones."""
        g = torch.Generator().manual_seed(seed)
        B, Hq, Hkv, D, P = self.B, self.Hq, self.Hkv, self.D, self.P
        Lq, Dv = self.Lq, D if self.Dv is None else self.Dv
        Lk = Lq if self.Lk is None else self.Lk
        if self.lengths is not None:
            P = sum(self.lengths)
        if self.cu_seqlens is not None:
            B, Lq, Lk = 1, self.cu_seqlens[-1], self.cu_seqlens[-1]
        shapes = {
            "query": (B, Hq, Lq, D), "key": (B, Hkv, Lk, D), "value": (B, Hkv, Lk, Dv),
            "prefix_key": None if P is None else (Hkv, P, D),
            "prefix_value": None if P is None else (Hkv, P, Dv),
        }  # fmt: skip

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype)

        tensors = {
            name: None if shape is None else laid_out(normal(shape), self.layout)
            for name, shape in shapes.items()
        }
        if self.in_use is not None:
            unused = torch.arange(Lk) >= torch.tensor(self.in_use)[:, None]
            for x in (tensors["key"], tensors["value"]):
                assert x is not None
                x.masked_fill_(unused[:, None, :, None], math.nan)
        grad_out = laid_out(normal((B, Hq, Lq, Dv)), self.layout)
        options = self._plain_options()
        if self.padding != "none":
            options["key_padding_mask"] = key_padding_mask(self.padding, B, Lk, g)
        if self.in_use is not None:
            options["key_lengths"] = torch.tensor(self.in_use, dtype=torch.int32)
        if self.cu_seqlens is not None:
            options["cu_seqlens"] = torch.tensor(self.cu_seqlens, dtype=torch.int32)
        if self.lengths is not None:
            rows = B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
            index = self.index
            drawn = torch.randint(-1, len(self.lengths), (rows,), generator=g)
            index = tuple(drawn.tolist()) if index is None else index
            options["prefix_lengths"] = torch.tensor(self.lengths, dtype=torch.int32)
            options["prefix_index"] = torch.tensor(index, dtype=torch.int32)
        if self.attn_mask != "none":
            sizes = zip((B, Hq, Lq, Lk), self.broadcast, strict=True)
            shape = tuple(1 if once else size for size, once in sizes)
            hidden = torch.rand(shape, generator=g) < 0.2
            lowest = -math.inf if self.attn_mask == "additive" else torch.finfo(self.dtype).min
            options["attn_mask"] = (
                ~hidden if self.attn_mask == "bool" else normal(shape).masked_fill(hidden, lowest)
            )
        if self.sinks:
            tensors["sinks"] = normal((Hq,))
        if self.prefix_bias == "heads":
            tensors["prefix_bias"] = normal((Hq,))
        elif self.prefix_bias == "columns":
            options["prefix_bias"] = normal((Hq, Lq, P or 0))
        return Call(tensors, options, grad_out, seed)

    def _plain_options(self) -> dict[str, Any]:
        """The options that are no tensors, without those that are not used."""
        names = ("scale", "sliding_window", "prefix_in_window", "softcap", "dropout_p")
        given = {name: getattr(self, name) for name in names}
        return {"is_causal": self.is_causal} | {
            name: value
            for name, value in given.items()
            if value or (name == "scale" and value == 0)
        }


def key_padding_mask(padding: str, B: int, Lk: int, g: torch.Generator) -> Tensor:
    """[B, Lk], True = a real token. At least half of the first row is real but for "row"."""
    if padding in ("left", "right"):
        pads = torch.randint(0, Lk + 1, (B, 1), generator=g)
        pads[:1] //= 2
        real = torch.arange(Lk) >= pads
        return real if padding == "left" else real.flip(1)
    real = torch.rand(B, Lk, generator=g) < 0.6
    if padding == "row":
        real[:1] = False
    return real


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in memory of another layout.

    dense; transposed, with positions before heads; strided, every second element of the last
    dimension with NaN between; or islands, inside a larger buffer of NaN.
    """
    if layout == "transposed":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "strided":
        return torch.stack([torch.full_like(x, math.nan), x], -1)[..., 1]
    if layout == "islands":
        sea = torch.full([n + 3 for n in x.shape], math.nan, dtype=x.dtype)
        return sea[tuple(slice(2, 2 + n) for n in x.shape)].copy_(x)
    assert layout == "dense", layout
    return x


def tiles(**fields: Any) -> Problem:
    """A problem of more than one tile of the kernels, none of which is full; causal."""
    sizes = {"Lq": 37, "Lk": 37, "P": 63, "D": 64, "is_causal": True, "scale": 0.3}
    return Problem(**{**sizes, **fields})


def decoding(**fields: Any) -> Problem:
    """A problem of one query a row over a cache; causal."""
    sizes = {"Hq": 2, "Hkv": 1, "Lq": 1, "Lk": 40, "P": 50, "is_causal": True, "scale": 0.3}
    return Problem(**{**sizes, **fields})
