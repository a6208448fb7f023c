"""Packed prefixes, packed sequences, windows and sinks against calls that do without them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprefix import prefix_attention
from fastprefix.attention.backends import composed
from fastprefix.attention.backends.composed import parts
from fastprefix.options import Options
from fastprefix_testing import calls as feature_calls

BACKENDS = ["reference", "composed"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def normal(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def gradients(out, leaves, grad_out):
    return torch.autograd.grad(out, leaves, grad_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_prefixes_are_one_call_for_each_row(backend, is_causal):
    """Ragged, one of them empty, one that nobody uses, and a row without a prefix."""
    lengths, index = (4, 0, 7, 2), (2, -1, 0, 2, 1)
    query, grad_out = normal(5, 4, 3, 8, requires_grad=True), normal(5, 4, 3, 8)
    key, value = normal(5, 2, 6, 8, requires_grad=True), normal(5, 2, 6, 8, requires_grad=True)
    prefix = [normal(2, sum(lengths), 8, requires_grad=True) for _ in range(2)]
    leaves = [query, key, value, *prefix]
    options = {"is_causal": is_causal, "backend": backend}
    out = prefix_attention(
        *leaves, prefix_lengths=torch.tensor(lengths), prefix_index=torch.tensor(index), **options
    )
    rows = []
    for b, number in enumerate(index):
        mine = (None, None)
        if number >= 0:
            start = sum(lengths[:number])
            mine = [x[:, start : start + lengths[number]] for x in prefix]
        rows.append(
            prefix_attention(query[b : b + 1], key[b : b + 1], value[b : b + 1], *mine, **options)
        )
    expected = torch.cat(rows)
    torch.testing.assert_close(out, expected, **CLOSE)
    found, wanted = (gradients(o, leaves, grad_out) for o in (out, expected))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not found[3][:, 11:].any(), "a gradient for the prefix that nobody uses"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("in_window", [False, True])
def test_packed_sequences_are_one_call_for_each(backend, window, in_window):
    if in_window and window is None:
        pytest.skip("no window, nothing to slide out of")
    ends, lengths, index = (0, 4, 4, 9, 10), (2, 5), (1, 0, -1, 1)
    query, grad_out = normal(1, 4, 10, 8, requires_grad=True), normal(1, 4, 10, 8)
    key, value = normal(1, 2, 10, 8, requires_grad=True), normal(1, 2, 10, 8, requires_grad=True)
    prefix = [normal(2, 7, 8, requires_grad=True) for _ in range(2)]
    bias = normal(4, 10, 7)
    leaves = [query, key, value, *prefix]
    options = {
        "is_causal": True, "sliding_window": window, "prefix_in_window": in_window,
        "backend": backend,
    }  # fmt: skip
    out = prefix_attention(
        *leaves, cu_seqlens=torch.tensor(ends), prefix_lengths=torch.tensor(lengths),
        prefix_index=torch.tensor(index), prefix_bias=bias, **options,
    )  # fmt: skip
    pieces = []
    for (start, end), number in zip(pairwise(ends), index, strict=True):
        if start == end:
            continue
        own = [x[:, :, start:end] for x in (query, key, value)]
        columns = slice(sum(lengths[:number]), sum(lengths[: number + 1])) if number >= 0 else None
        mine = [None, None] if columns is None else [x[:, columns] for x in prefix]
        added = {} if columns is None else {"prefix_bias": bias[:, start:end, columns]}
        pieces.append(prefix_attention(*own, *mine, **added, **options))
    expected = torch.cat(pieces, dim=2)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(
        gradients(out, leaves, grad_out), gradients(expected, leaves, grad_out), **CLOSE
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Lq", [1, 6])
@pytest.mark.parametrize("window", [1, 4, 9, 30])
def test_a_prompt_in_the_window_is_the_text_in_front(backend, Lq, window):
    """PyTorch's own attention over the concatenation, under the window's mask."""
    P, Lk = 5, 8
    query, key, value = normal(2, 2, Lq, 8), normal(2, 2, Lk, 8), normal(2, 2, Lk, 8)
    prefix_key, prefix_value = normal(2, P, 8), normal(2, P, 8)
    got = prefix_attention(
        query, key, value, prefix_key, prefix_value, is_causal=True, sliding_window=window,
        prefix_in_window=True, backend=backend,
    )  # fmt: skip
    whole = [torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in
             ((prefix_key, key), (prefix_value, value))]  # fmt: skip
    behind = torch.arange(P + Lk - Lq, P + Lk)[:, None] - torch.arange(P + Lk)
    sees = (behind >= 0) & (behind < window)
    expected = F.scaled_dot_product_attention(query, *whole, attn_mask=sees)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_the_sequence_leaves_the_prefix_in_sight(backend):
    query, key, value = normal(3, 2, 2, 6, 8)
    prefix_key, prefix_value = normal(2, 5, 8), normal(2, 5, 8)
    got = prefix_attention(
        query, key, value, prefix_key, prefix_value, sliding_window=2, backend=backend
    )
    whole = [torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in
             ((prefix_key, key), (prefix_value, value))]  # fmt: skip
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() < 2  # on both sides
    sees = torch.cat([torch.ones(6, 5, dtype=torch.bool), near], 1)
    expected = F.scaled_dot_product_attention(query, *whole, attn_mask=sees)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_is_a_key_without_a_value(backend):
    query, key, value = normal(3, 2, 2, 4, 8).requires_grad_().unbind()
    sinks = normal(2, requires_grad=True)
    out, lse = prefix_attention(
        query, key, value, sinks=sinks, is_causal=True, return_lse=True, backend=backend
    )
    scores = query @ key.mT / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -math.inf)
    scores = torch.cat([scores, sinks[:, None, None].expand(2, 2, 4, 1)], -1)
    expected = scores.softmax(-1)[..., :-1] @ value
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, scores.logsumexp(-1), **CLOSE)
    grad_out = normal(2, 2, 4, 8)
    found, wanted = (gradients(o, [sinks], grad_out) for o in (out, expected))
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", [0.5, -math.inf])
def test_rows_that_see_a_sink_alone(backend, sink):
    query, key, value = normal(3, 2, 2, 4, 8)
    sinks = torch.full((2,), sink, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    out, lse = prefix_attention(
        query.requires_grad_(), key, value, key_padding_mask=hidden, sinks=sinks, return_lse=True,
        backend=backend,
    )  # fmt: skip
    assert not out.any()
    assert torch.equal(lse, torch.full_like(lse, sink))
    for grad in gradients(out, [query, sinks], torch.ones_like(out)):
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_hides_the_prefix_of_a_head(backend):
    query, key, value = normal(3, 2, 2, 4, 8)
    prefix = [normal(2, 5, 8, requires_grad=True) for _ in range(2)]
    for hidden in (-math.inf, -1e30):
        bias = torch.tensor([hidden, 0.0], dtype=torch.float64, requires_grad=True)
        out = prefix_attention(query, key, value, *prefix, prefix_bias=bias, backend=backend)
        plain = prefix_attention(query, key, value, backend=backend)
        torch.testing.assert_close(out[:, 0], plain[:, 0], **CLOSE)
        dpk, dpv, dbias = gradients(out, [*prefix, bias], torch.ones_like(out))
        assert not dpk[0].any()
        assert not dpv[0].any()
        assert dbias[0] == 0
        assert dbias[1] != 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_by_column_that_is_the_same_everywhere_is_one_by_head(backend):
    leaves = [normal(2, 4, 3, 8), normal(2, 2, 3, 8), normal(2, 2, 3, 8)]
    leaves += [normal(2, 5, 8), normal(2, 5, 8)]
    leaves, bias = [x.requires_grad_() for x in leaves], normal(4)
    outs = [
        prefix_attention(*leaves, prefix_bias=b, is_causal=True, backend=backend)
        for b in (bias, bias[:, None, None].expand(4, 3, 5))
    ]
    torch.testing.assert_close(*outs, **CLOSE)
    grad_out = normal(2, 4, 3, 8)
    torch.testing.assert_close(*(gradients(o, leaves, grad_out) for o in outs), **CLOSE)


class TestComposed:
    """How the composed backend goes about it."""

    def test_masks_that_are_cut_by_rows_change_nothing(self, monkeypatch):
        for features in ({"prefix_bias [Hq, Lq, P]"}, {"prefix_in_window", "packed prefixes"}):
            call = feature_calls.build(
                features=features, B=5, pad="holes", past=3, lengths=(4, 6), window=9
            )
            whole = call.by("composed")
            monkeypatch.setattr(parts, "_MASK_ELEMENTS", 1)
            torch.testing.assert_close(call.by("composed"), whole, **CLOSE)
            monkeypatch.undo()

    def test_one_flash_call_for_each_prefix_and_one_for_the_sequence(self):
        index = torch.tensor([0, 1, 0, 1, 0, -1])
        options = Options(True, 0.3, prefix_index=index, prefix_lengths=torch.tensor([4, 3, 2]))
        x, prefix = torch.randn(6, 2, 4, 8), torch.randn(2, 9, 8)
        with Ops() as ops:
            composed.forward(x, x, x, prefix, prefix, options)
        assert ops.count("flash_attention_for_cpu") == 3

    @pytest.mark.parametrize("Lq", [1, 3])
    def test_keys_behind_the_window_are_not_read(self, Lq):
        """NaN there would show: 0 x NaN is NaN."""
        key, value = torch.randn(2, 2, 2, 50, 8).unbind()
        key, value = key.clone(), value.clone()
        key[:, :, : 50 - Lq - 6], value[:, :, : 50 - Lq - 6] = math.nan, math.nan
        prefix = torch.full((2, 30, 8), math.nan)
        out = prefix_attention(
            torch.randn(2, 4, Lq, 8), key, value, prefix, prefix, is_causal=True,
            sliding_window=7, prefix_in_window=True, backend="composed",
        )  # fmt: skip
        assert out.isfinite().all()

    def test_no_gradient_of_a_prefix_for_each_row(self):
        B, P, D = 16, 256, 32
        options = Options(
            True, 0.2,
            prefix_index=torch.arange(B) % 2, prefix_lengths=torch.tensor([P // 2, P // 2]),
            sinks=torch.zeros(4),
        )  # fmt: skip
        query, x, prefix = torch.randn(B, 4, 1, D), torch.randn(B, 2, 3, D), torch.randn(2, P, D)
        inputs = (query, x, x, prefix, prefix)
        with Ops() as ops:
            out, lse = composed.forward(*inputs, options)
            composed.backward(out, *inputs, out, lse, options, (True,) * 6 + (False,))
        assert ops.largest <= 2 * P * D


class Ops(TorchDispatchMode):
    """Names of the ops that run, and elements of the largest storage that any returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result

    def count(self, name: str) -> int:
        """How many ops have this in their name."""
        return sum(name in op for op in self.names)
