"""Calls of the operator with any of its features, and an oracle that goes query by query.

The oracle follows the contract to the letter, one query of one head at a time: which tokens does it
see, what are their scores, what is their softmax. It shares nothing with the library, not even the
random numbers of the dropout, for which it computes Philox in Python's integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastprefix import prefix_attention
from fastprefix.attention import philox
from fastprefix.attention.backends.composed import scores
from fastprefix.attention.selection import BACKENDS, FEATURES
from fastprefix.options import Options
from fastprefix_testing.oracle import HIDDEN, concatenated_attention
from fastprefix_testing.tolerance import LSE_OF_HALF, assert_accurate

DIFFERENTIABLE = (
    "query", "key", "value", "prefix_key", "prefix_value", "sinks", "prefix_bias", "attn_mask"
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """Arguments of :func:`fastprefix.prefix_attention`, and a gradient for its output.

    Attributes:
        tensors: what may need a gradient, by name; None for a prefix that is not there.
        options: the rest.
        grad_out: [B, Hq, Lq, Dv].
        seed: of PyTorch's generator when the call is made, which dropout draws from.
    """

    tensors: dict[str, Any]
    options: dict[str, Any]
    grad_out: Tensor
    seed: int = 0

    def to(self, dtype: torch.dtype) -> Call:
        """The same numbers in another dtype; strides are not kept."""
        return self._each(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def on(self, device: torch.device | str) -> Call:
        """The same call on another device."""
        return self._each(lambda x: x.to(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Call:
        tensors, options = (
            {name: function(x) if isinstance(x, Tensor) else x for name, x in given.items()}
            for given in (self.tensors, self.options)
        )
        return Call(tensors, options, function(self.grad_out), self.seed)

    def changed(self, *, grad_out: Tensor | None = None, **given: Any) -> Call:
        """The same call with other tensors or options."""
        tensors = {name: x for name, x in given.items() if name in self.tensors}
        options = {name: x for name, x in given.items() if name not in self.tensors}
        grad_out = self.grad_out if grad_out is None else grad_out
        return Call({**self.tensors, **tensors}, {**self.options, **options}, grad_out, self.seed)

    def solve(
        self, function: Callable[..., Any], wanted: Collection[str] = DIFFERENTIABLE
    ) -> dict[str, Tensor]:
        """`out`, `lse`, and the wanted gradients by the names of the tensors."""
        given = {name: None if x is None else x.detach() for name, x in self.tensors.items()}
        leaves = {
            name: x.requires_grad_()
            for name, x in given.items()
            if x is not None and name in wanted
        }
        torch.manual_seed(self.seed)
        out, lse = function(**given, **self.options)
        found = {"out": out.detach(), "lse": lse.detach()}
        grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if out.requires_grad:  # where nothing is seen it is a constant
            grads = torch.autograd.grad(
                out, list(leaves.values()), self.grad_out, allow_unused=True
            )
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[name] = torch.zeros_like(leaf) if grad is None else grad
        return found

    def by(self, backend: str, wanted: Collection[str] = DIFFERENTIABLE) -> dict[str, Tensor]:
        """What a backend of the library makes of the call."""

        def function(**arguments: Any) -> tuple[Tensor, Tensor]:
            return prefix_attention(**arguments, return_lse=True, backend=backend)

        return self.solve(function, wanted)

    def by_concatenation(self, wanted: Collection[str] = DIFFERENTIABLE) -> dict[str, Tensor]:
        """What the contract says, by the oracle that concatenates."""
        return self.solve(concatenated_attention, wanted)

    def by_rows(self) -> dict[str, Tensor]:
        """What the contract says, by the oracle that goes query by query."""
        return self.solve(attention_by_rows)


def assert_as_concatenated(call: Call, found: Mapping[str, Tensor]) -> None:
    """Asserts the rule of ``tolerance.py`` for results of a call, against the concatenation."""
    exact, plain = call.to(torch.float64).by_concatenation(), call.by_concatenation()
    dtype = call.grad_out.dtype
    assert_accurate(found, exact, plain, dtype, lse_of_half=LSE_OF_HALF)


def assert_as_reference(call: Call, backend: str, gradient_floor: float = 1.0) -> None:
    """Asserts the rule of ``tolerance.py`` for the results of a backend, against reference.

    Reference drops the weights that the backend drops. `gradient_floor` is that of
    :func:`assert_accurate`.
    """
    with dropping_as(backend, call):
        exact, plain = call.to(torch.float64).by("reference"), call.by("reference")
    dtype = call.grad_out.dtype
    found = call.by(backend)
    assert_accurate(
        found, exact, plain, dtype, gradient_floor=gradient_floor, lse_of_half=LSE_OF_HALF
    )


def kept_by_composed(call: Call) -> Tensor:
    """Which weights composed keeps, [B, Hq, Lq, P + Lk], in a call with dropout."""
    torch.manual_seed(call.seed)
    tensors = call.tensors
    given: dict[str, Any] = {"scale": 1.0, **call.options}
    given |= {name: tensors[name] for name in ("sinks", "prefix_bias") if name in tensors}
    options = Options(**given, dropout_seed=torch.randint(2**63 - 1, (1,)))
    prefix_key = tensors["prefix_key"]
    if prefix_key is None:
        prefix_key = tensors["key"][0, :, :0]
    return scores.kept(tensors["query"], tensors["key"], prefix_key, options)


@contextmanager
def dropping_as(backend: str, call: Call) -> Iterator[None]:
    """Reference drops the weights that a backend drops in a call: composed drops others."""
    if backend != "composed" or not call.options.get("dropout_p"):
        yield
        return
    kept = kept_by_composed(call)
    with mock.patch.object(philox, "keep", return_value=kept):
        yield


def build(
    *,
    features: frozenset[str] | set[str] = frozenset(),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    B: int = 2,
    Hkv: int = 2,
    group: int = 2,
    Lq: int = 7,
    past: int = 0,
    D: int = 16,
    Dv: int = 16,
    spare: int = 4,
    lengths: tuple[int, ...] = (5,),
    sequences: tuple[int, ...] = (4, 3),
    window: int = 4,
    is_causal: bool = True,
    pad: str = "none",
    layout: str = "plain",
    mask: str = "bool",
    wide_parameters: bool = False,
) -> Call:
    """A call with the named features.

    Args:
        features: of `selection.FEATURES`.
        seed: of all numbers.
        dtype: of the tensors.
        B: rows, without cu_seqlens.
        Hkv: key/value heads.
        group: query heads per key/value head.
        Lq: queries, without cu_seqlens.
        past: keys before the first query's own.
        spare: keys that no row uses, all NaN, with the feature "key_lengths".
        D: head size.
        Dv: head size of the values with the feature "D != Dv".
        lengths: of the prefixes with the feature "packed prefixes"; one of their sum without.
        sequences: lengths with the feature "cu_seqlens".
        window: sliding_window.
        is_causal: see the operator.
        pad: none, left, holes or row (one row of padding alone).
        layout: plain, blhd or strided.
        mask: bool or additive, of the feature "attn_mask".
        wide_parameters: sinks and prefix_bias in float32.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    packed = "cu_seqlens" in features
    if packed:
        B, Lq, past, pad = 1, sum(sequences), 0, "none"
    Lk, Hq, P = Lq + past, Hkv * group, sum(lengths)
    buffered = "key_lengths" in features
    Lk += spare if buffered else 0
    Dv = Dv if "D != Dv" in features else D
    shapes = {
        "query": (B, Hq, Lq, D), "key": (B, Hkv, Lk, D), "value": (B, Hkv, Lk, Dv),
        "prefix_key": (Hkv, P, D), "prefix_value": (Hkv, P, Dv),
    }  # fmt: skip
    tensors = {name: _laid_out(normal(*shape), layout) for name, shape in shapes.items()}
    parameters = torch.float32 if wide_parameters and dtype != torch.float64 else dtype
    options: dict[str, Any] = {"is_causal": is_causal}
    if packed:
        ends = torch.tensor((0, *sequences)).cumsum(0)
        options["cu_seqlens"] = ends.to(torch.int32 if seed % 2 else torch.int64)
    if buffered:
        least = Lq if is_causal or "prefix_in_window" in features else 0
        used = torch.randint(least, Lq + past + 1, (B,), generator=g)
        if seed % 3 == 0:
            used = used[:1].expand(B)
        options["key_lengths"] = used.to(torch.int32 if seed % 2 else torch.int64)
        unused = (torch.arange(Lk) >= used[:, None])[:, None, :, None]
        for name in ("key", "value"):
            tensors[name].masked_fill_(unused, math.nan)
    if pad != "none":
        options["key_padding_mask"] = _padding(pad, B, Lk, g)
    if "packed prefixes" in features:
        rows = len(sequences) if packed else B
        options["prefix_lengths"] = torch.tensor(lengths)
        options["prefix_index"] = torch.randint(-1, len(lengths), (rows,), generator=g)
    if "attn_mask gradient" in features:
        hidden = torch.rand(1, Hq, Lq, Lk, generator=g) < 0.3
        tensors["attn_mask"] = normal(1, Hq, Lq, Lk).to(parameters).masked_fill(hidden, -math.inf)
    elif "attn_mask" in features:
        sees = torch.rand(B, 1, Lq, Lk, generator=g) < 0.7
        added = normal(1, Hq, Lq, Lk).masked_fill(~sees[:1], -math.inf)
        options["attn_mask"] = sees if mask == "bool" else added
    if "sliding_window" in features or "prefix_in_window" in features:
        options["sliding_window"] = window
        options["prefix_in_window"] = "prefix_in_window" in features
    if "sinks" in features:
        tensors["sinks"] = normal(Hq).to(parameters)
    if "prefix_bias [Hq]" in features:
        tensors["prefix_bias"] = normal(Hq).to(parameters)
        if seed % 5 == 0:
            tensors["prefix_bias"][0] = -math.inf
    elif "prefix_bias 3D gradient" in features:
        hidden = torch.rand(Hq, Lq, P, generator=g) < 0.2
        tensors["prefix_bias"] = normal(Hq, Lq, P).to(parameters).masked_fill(hidden, -math.inf)
    elif "prefix_bias [Hq, Lq, P]" in features:
        hidden = torch.rand(Hq, Lq, P, generator=g) < 0.2
        options["prefix_bias"] = normal(Hq, Lq, P).to(parameters).masked_fill(hidden, -math.inf)
    if "softcap" in features:
        options["softcap"] = 1.5
    if "dropout_p" in features:
        options["dropout_p"] = 0.3
    if "batch_invariant" in features:
        options["batch_invariant"] = True
    return Call(tensors, options, normal(B, Hq, Lq, Dv), seed)


# What reference can be asked for; how many bits two results share is not its matter.
COMPARED = [name for name in FEATURES if name in BACKENDS["reference"].features]


@st.composite
def drawn(
    draw: st.DrawFn,
    backend: str,
    longest: int | None = None,
    without: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Arguments of :func:`build`: any combination of what a backend can do, and any shape.

    `longest` limits Lq; `without` are features that are not drawn.
    """
    if longest is None:  # Triton's interpreter is slow
        longest = 7 if backend == "triton" else 20
    can = [name for name in COMPARED if name in BACKENDS[backend].features - without]
    features = {name for name in can if draw(st.booleans())}
    if "cu_seqlens" in features:
        features -= {"attn_mask", "attn_mask gradient", "key_lengths"}
    if "prefix_bias [Hq]" in features:
        features -= {"prefix_bias [Hq, Lq, P]", "prefix_bias 3D gradient"}
    length = st.sampled_from([n for n in (0, 1, 2, 5, 17, 63) if n <= 4 * longest])
    many = draw(st.integers(1, 3)) if "packed prefixes" in features else 1
    sequences = draw(st.lists(st.integers(0, longest // 2), min_size=1, max_size=4))
    return {
        "features": frozenset(features),
        "seed": draw(st.integers(0, 999)),
        "B": draw(st.integers(1, 3)),
        "Hkv": draw(st.integers(1, 2)),
        "group": draw(st.integers(1, 3)),
        "Lq": draw(st.sampled_from([n for n in (1, 1, 2, 7, 16, 19) if n <= longest])),
        "past": draw(st.sampled_from([0, 0, 1, 9])),
        "spare": draw(st.sampled_from([0, 1, 12])),
        "D": draw(st.sampled_from([8, 16, 17])),
        "Dv": draw(st.sampled_from([5, 24])),
        "lengths": tuple(draw(length) for _ in range(many)),
        "sequences": tuple(sequences) if sum(sequences) else (1,),
        "window": draw(st.sampled_from([1, 2, 5, 8, 100])),
        "is_causal": draw(st.booleans()),
        "pad": draw(st.sampled_from(["none", "left", "holes", "row"])),
        "layout": draw(st.sampled_from(["plain", "blhd", "strided"])),
        "mask": draw(st.sampled_from(["bool", "additive"])),
        "wide_parameters": draw(st.booleans()),
    }


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "blhd":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "strided":
        return torch.stack([torch.full_like(x, math.nan), x], -1)[..., 1]
    return x


def _padding(pad: str, B: int, Lk: int, g: torch.Generator) -> Tensor:
    if pad == "left":
        return torch.arange(Lk) >= torch.randint(0, Lk, (B, 1), generator=g)
    real = torch.rand(B, Lk, generator=g) < 0.7
    if pad == "row":
        real[0] = False
    return real


def attention_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    sinks: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix_in_window: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The oracle; scale is 1 / sqrt(D). For sizes that Python's loops can bear."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1:3]
    seed = int(torch.randint(2**63 - 1, (1,))) if dropout_p else 0
    ends = [0, *(prefix_lengths.cumsum(0).tolist() if prefix_lengths is not None else ())]
    mask = None if attn_mask is None else attn_mask.expand(B, Hq, Lq, Lk)
    outs, lses = [], []
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (B, Hq, Lq))).tolist():
        # the query's sequence: its number, where its keys start, how many there are, and i
        m, start, many, i = b, 0, Lk if key_lengths is None else int(key_lengths[b]), t
        if cu_seqlens is not None:
            m = int((cu_seqlens[1:] <= t).sum())
            start = int(cu_seqlens[m])
            many, i = int(cu_seqlens[m + 1]) - start, t - start
        p = i + many - (Lq if cu_seqlens is None else many)
        first, last = 0, prefix_key.shape[1]
        if prefix_index is not None:
            n = int(prefix_index[m])
            first, last = (0, 0) if n < 0 else ends[n : n + 2]

        def is_real(j: int, b: int = b) -> bool:
            return key_padding_mask is None or bool(key_padding_mask[b, j])

        columns, keys, added = [], [], []
        real_before = sum(is_real(j) for j in range(p)) if prefix_in_window else 0
        for c in range(first, last):
            bias = query.new_zeros(())
            if prefix_bias is not None:
                bias = prefix_bias[h] if prefix_bias.dim() == 1 else prefix_bias[h, t, c]
            hidden = float(bias.detach()) <= HIDDEN
            if prefix_in_window and sliding_window is not None:
                hidden = hidden or (last - c) + real_before >= sliding_window
            if not hidden:
                columns.append(c)
                added.append(bias)
        for j in range(many):
            bias = query.new_zeros(())
            hidden = not is_real(j) or (is_causal and j > p)
            if sliding_window is not None and abs(p - j) >= sliding_window:
                hidden = True
            if mask is not None and mask.dtype is torch.bool:
                hidden = hidden or not mask[b, h, t, j]
            elif mask is not None:
                hidden = hidden or float(mask[b, h, t, j]) <= HIDDEN
                bias = mask[b, h, t, j]
            if not hidden:
                keys.append(j)
                added.append(bias)
        hk = h // (Hq // Hkv)
        places = [start + j for j in keys]
        own_keys = torch.cat([prefix_key[hk, columns], key[b, hk, places]])
        own_values = torch.cat([prefix_value[hk, columns], value[b, hk, places]])
        scores = own_keys @ query[b, h, t] / math.sqrt(D)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if added:
            scores = scores + torch.stack([x.to(scores.dtype) for x in added])
        sink = [] if sinks is None else [sinks[h : h + 1].to(scores.dtype)]
        if len(scores) + len(sink) == 0:
            outs.append(query.new_zeros(value.shape[-1]))
            lses.append(query.new_full((), -math.inf))
            continue
        lse = torch.cat([scores, *sink]).logsumexp(0)
        weights = torch.exp(scores - lse)
        if dropout_p:
            numbers = [c - first for c in columns] + [last - first + j for j in keys]
            kept = [_word(seed, n, i, m * Hq + h) >= int(dropout_p * 2**32) for n in numbers]
            weights = weights * torch.tensor(kept, dtype=weights.dtype) / (1 - dropout_p)
        outs.append(weights @ own_values)
        lses.append(lse)
    out = torch.stack(outs).reshape(B, Hq, Lq, value.shape[-1])
    return out, torch.stack(lses).reshape(B, Hq, Lq)


def _word(seed: int, c0: int, c1: int, c2: int) -> int:
    """The first output word of Philox 4x32-10."""
    c, k = [c0, c1, c2, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0]
