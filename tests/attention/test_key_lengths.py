"""key_lengths: the keys in use of a longer buffer, such as a static cache's.

``test_features.py`` compares any combination with other features with the row-by-row oracle, and
with reference in float64. The buffers there end in NaN. Here each row is also compared with a call
over its own keys, without a buffer.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from fastprefix import prefix_attention
from fastprefix.attention.backends.composed import plain
from fastprefix.attention.backends.composed.kernels import kernels_of
from fastprefix.options import Options
from fastprefix_testing.calls import assert_as_reference, build

OPTIONS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "sliding_window": 3},
    {"sliding_window": 2},
    {"is_causal": True, "sliding_window": 4, "prefix_in_window": True},
    {"is_causal": True, "pads": True},
    {"is_causal": True, "sliding_window": 4, "prefix_in_window": True, "pads": True},
    {"is_causal": True, "sinks": True, "pads": True},
    {"is_causal": True, "added": True},
]


def tensors(B=3, Hq=4, Hkv=2, Lq=3, Lk=9, P=4, D=8, dtype=torch.float64, backend=""):
    """The five, in a dtype that the backend takes."""
    dtype = torch.float32 if backend == "triton" else dtype
    shapes = [(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D), (Hkv, P, D), (Hkv, P, D)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def options_of(case, B, Hq, Lq, Lk, dtype):
    """Arguments of the operator for one of OPTIONS."""
    options = {k: v for k, v in case.items() if k not in ("pads", "sinks", "added")}
    if "pads" in case:
        options["key_padding_mask"] = torch.rand(B, Lk) < 0.7
    if "sinks" in case:
        options["sinks"] = torch.randn(Hq, dtype=dtype)
    if "added" in case:
        options["attn_mask"] = torch.randn(B, 1, Lq, Lk, dtype=dtype)
    return options


def solve(inputs, grad_out, **options):
    """Output, log-sum-exp and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = prefix_attention(*leaves, **options, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), Lq=st.sampled_from([1, 3]))
def test_a_row_is_a_call_over_its_own_keys(backend, case, lengths, Lq):
    """Output and all gradients, with NaN behind the keys in use. Gradients there are zeros."""
    if backend == "triton":  # one case: the kernels have tests of their own
        if case != {"is_causal": True, "sliding_window": 4, "prefix_in_window": True, "pads": True}:
            return
        lengths = lengths[:2]
    if case.get("is_causal"):
        lengths = [length + Lq for length in lengths]
    B, Lk = len(lengths), 10
    inputs = tensors(B=B, Lq=Lq, Lk=Lk, backend=backend)
    grad_out = torch.randn_like(inputs[0])
    options = options_of(case, B, 4, Lq, Lk, inputs[0].dtype)
    used = torch.arange(Lk) < torch.tensor(lengths)[:, None]
    for x in inputs[1:3]:
        x.masked_fill_(~used[:, None, :, None], math.nan)
    if "attn_mask" in options:
        options["attn_mask"].masked_fill_(~used[:, None, None], math.nan)
    got = solve(inputs, grad_out, **options, key_lengths=torch.tensor(lengths), backend=backend)
    dprefix = [torch.zeros_like(x) for x in inputs[3:]]
    for b, n in enumerate(lengths):
        own = [x[b : b + 1, :, : n if x.shape[2] == Lk else Lq] for x in inputs[:3]]
        cut = {
            name: x[b : b + 1, ..., :n] if name in ("key_padding_mask", "attn_mask") else x
            for name, x in options.items()
        }
        wanted = solve([*own, *inputs[3:]], grad_out[b : b + 1], **cut, backend="reference")
        for x, y in zip(got[:3], wanted[:3], strict=True):
            torch.testing.assert_close(x[b : b + 1], y)
        for x, y in zip(got[3:5], wanted[3:5], strict=True):
            torch.testing.assert_close(x[b : b + 1, :, :n], y)
            assert not x[b, :, n:].any()
        for total, part in zip(dprefix, wanted[5:], strict=True):
            total += part
    torch.testing.assert_close(got[5:], dprefix)


def test_a_mask_in_its_place_would_let_nan_through(backend):
    """So that the test above means something: padding is hidden, but it is read."""
    inputs = tensors(backend=backend)
    for x in inputs[1:3]:
        x[:, :, 5:] = math.nan
    padding = (torch.arange(9) < 5).expand(3, -1)
    assert prefix_attention(*inputs, key_padding_mask=padding, backend=backend).isnan().any()
    lengths = torch.full((3,), 5)
    assert prefix_attention(*inputs, key_lengths=lengths, backend=backend).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [9, 3, 5]])
def test_every_dtype(dtype, lengths):
    call = build(features={"key_lengths"}, dtype=dtype, B=3, Lq=3, past=2, spare=4)
    call.options["key_lengths"] = torch.tensor(lengths).clamp(max=9)
    for name in ("key", "value"):
        call.tensors[name].nan_to_num_()
    assert_as_reference(call, "composed")


def test_lengths_of_the_whole_buffer_change_nothing(backend):
    inputs = tensors(Lq=4, backend=backend)
    grad_out = torch.randn_like(inputs[0])
    whole = torch.full((3,), 9, dtype=torch.int32)
    wanted = solve(inputs, grad_out, is_causal=True, backend=backend)
    got = solve(inputs, grad_out, is_causal=True, key_lengths=whole, backend=backend)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_rows_without_keys(backend):
    """They see their prefix, or nothing."""
    inputs = tensors(backend=backend)
    lengths = torch.tensor([0, 4, 0])
    out, lse = prefix_attention(*inputs, key_lengths=lengths, return_lse=True, backend=backend)
    none = prefix_attention(inputs[0], *(x[:, :, :0] for x in inputs[1:3]), *inputs[3:])
    torch.testing.assert_close(out[::2], none[::2])
    out, lse = prefix_attention(*inputs[:3], key_lengths=lengths, return_lse=True, backend=backend)
    assert not out[::2].any()
    assert (lse[::2] == -math.inf).all()
    assert out[1].any()


@pytest.mark.parametrize("lengths", [[2, 2, 2], [2, 9, 0], [-3, 50, 2**31 - 1]])
@pytest.mark.parametrize("window", [None, 4])
def test_where_values_are_not_read(fused_backend, lengths, window):
    """Under the compiler nothing checks the lengths. They are limited to 0 .. Lk.

    Queries before the first key see nothing.
    """
    torch._dynamo.reset()
    inputs = tensors(P=3, backend=fused_backend)
    grad_out = torch.randn_like(inputs[0])

    def run(*inputs, backend, **options):
        return prefix_attention(*inputs, **options, return_lse=True, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    options = {"is_causal": True, "key_lengths": torch.tensor(lengths), "sliding_window": window}
    options["prefix_in_window"] = window is not None
    found = []
    for backend in ("reference", fused_backend):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = compiled(*leaves, backend=backend, **options)
        found.append([out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out)])
    torch.testing.assert_close(*found)
    limited = torch.tensor(lengths).clamp(0, 9)
    options["key_lengths"] = limited
    torch.testing.assert_close(found[0][0], compiled(*inputs, backend="reference", **options)[0])
    positions = torch.arange(3) + limited[:, None] - 3
    blind = positions < 0
    if window is None:
        only_prefix = prefix_attention(inputs[0], *(x[:, :, :0] for x in inputs[1:3]), *inputs[3:])
        torch.testing.assert_close(
            found[0][0].transpose(1, 2)[blind], only_prefix.transpose(1, 2)[blind]
        )


class TestChecks:
    def refuses(self, error, match, **changes):
        given = {"key_lengths": torch.tensor([5, 4, 3]), **changes}
        with pytest.raises(error, match=match):
            prefix_attention(*tensors(), **given)

    def test_types(self):
        self.refuses(TypeError, "key_lengths: got list", key_lengths=[5, 4, 3])
        self.refuses(TypeError, "key_lengths: got torch.float32", key_lengths=torch.ones(3))
        self.refuses(TypeError, "key_lengths: got torch.int16", key_lengths=torch.ones(3).short())

    def test_shapes(self):
        for wrong in (torch.tensor(5), torch.tensor([5]), torch.ones(3, 1, dtype=torch.long)):
            self.refuses(ValueError, r"key_lengths: got shape .* takes \[3\]", key_lengths=wrong)

    def test_devices(self):
        meta = torch.ones(3, dtype=torch.long, device="meta")
        self.refuses(ValueError, "key_lengths: got device meta", key_lengths=meta)

    def test_values(self):
        for wrong in ([5, 10, 3], [5, -1, 3]):
            lengths = torch.tensor(wrong)
            self.refuses(ValueError, "key_lengths: takes 0 to Lk = 9; got", key_lengths=lengths)

    def test_a_key_for_each_query(self):
        short = torch.tensor([5, 2, 3])
        assert prefix_attention(*tensors(), key_lengths=short).isfinite().all()
        match = r"key_lengths: takes 3 \(Lq = 3, with is_causal or prefix_in_window\) to Lk = 9"
        self.refuses(ValueError, match, key_lengths=short, is_causal=True)
        window = {"sliding_window": 4, "prefix_in_window": True}
        self.refuses(ValueError, match, key_lengths=short, **window)

    def test_packed_sequences(self):
        inputs = tensors(B=1, Lq=9)
        with pytest.raises(ValueError, match="cu_seqlens, key_lengths: got both"):
            prefix_attention(
                *inputs, key_lengths=torch.tensor([9]), cu_seqlens=torch.tensor([0, 9])
            )


@pytest.mark.parametrize("lengths", [[6, 6, 6], [9, 3, 5]])
def test_opcheck(lengths):
    inputs = tensors(Lq=2, dtype=torch.float32)
    for x in inputs:
        x.requires_grad_()
    lengths = torch.tensor(lengths, dtype=torch.int32)
    options = Options(is_causal=True, scale=0.3, key_lengths=lengths)
    arguments = (*inputs, *options, "composed")
    torch.library.opcheck(torch.ops.fastprefix.prefix_attention.default, arguments)
    out, lse = torch.ops.fastprefix.prefix_attention(*arguments)
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attention_backward.default,
        (torch.randn_like(out), *(x.detach() for x in inputs), out.detach(), lse.detach(),
         *options, "composed", [True] * 5 + [False] * 2),
    )  # fmt: skip


def test_a_growing_length_compiles_once():
    """The shapes stay, and the lengths are on the device."""
    inputs = tensors(Lq=1)
    counter = CompileCounterWithBackend("aot_eager")

    def run(*inputs, key_lengths):
        return prefix_attention(*inputs, is_causal=True, key_lengths=key_lengths)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for length in range(1, 9):
        lengths = torch.full((3,), length)
        torch.testing.assert_close(
            compiled(*inputs, key_lengths=lengths), run(*inputs, key_lengths=lengths)
        )
    assert counter.frame_count == 1


def test_torch_func(backend):
    inputs = tensors(backend=backend)
    grad_out = torch.randn_like(inputs[0])
    options = {"is_causal": True, "key_lengths": torch.tensor([5, 9, 3]), "backend": backend}
    wanted = solve(inputs, grad_out, **options)[2:]

    def loss(*inputs):
        return (prefix_attention(*inputs, **options) * grad_out).sum()

    torch.testing.assert_close(list(torch.func.grad(loss, tuple(range(5)))(*inputs)), wanted)


def test_vmap(backend):
    query, *others = tensors(Lq=2, backend=backend)
    queries = torch.stack([query, 2 * query])
    lengths = torch.tensor([5, 9, 3])

    def run(query):
        return prefix_attention(query, *others, key_lengths=lengths, backend=backend)

    got = torch.func.vmap(run)(queries)
    torch.testing.assert_close(got, torch.stack([run(x) for x in queries]))


def test_no_column_behind_the_lengths_is_touched():
    """The flash kernel gets views of the keys in use: memory behind them may not even exist."""
    inputs, seen = tensors(Lq=2), []
    real = kernels_of(inputs[0])
    watched = real._replace(forward=lambda *a: seen.append(a[1]) or real.forward(*a))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "kernels_of", lambda x: watched)
        prefix_attention(*inputs, key_lengths=torch.full((3,), 4), backend="composed")
    assert [x.shape[2] for x in seen] == [4, 4]  # the sequence, and the prefix of 4
    assert seen[0].data_ptr() == inputs[1].data_ptr()
