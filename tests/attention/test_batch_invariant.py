"""`batch_invariant`: a row has the same bits alone and in any batch, or the call is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastprefix import prefix_attention
from fastprefix.options import Options

pytestmark = pytest.mark.usefixtures("triton", "rounded_once")

HEADS = {"Hq": 4, "Hkv": 2}
LENGTHS = (70, 0, 33)
INDEX = torch.tensor([0, 2, -1, 1, 0])


def operands(Lq: int, Lk: int, P: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """query, key, value [B, H, L, 16] for the rows of INDEX, and prefixes [Hkv, P, 16]."""
    g = torch.Generator().manual_seed(Lq)
    B, Hq, Hkv = len(INDEX), HEADS["Hq"], HEADS["Hkv"]
    shapes = (B, Hq, Lq), (B, Hkv, Lk), (B, Hkv, Lk), (Hkv, P), (Hkv, P)
    return [torch.randn(*shape, 16, generator=g).to(dtype) for shape in shapes]


def attend(*tensors, **options):
    options = {"batch_invariant": True, "backend": "triton", "return_lse": True} | options
    return prefix_attention(*tensors, **options)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "sliding_window": 9, "sinks": torch.tensor([0.5, -1, 0, 2])},
    "cap": {"softcap": 2.0, "prefix_bias": torch.tensor([0.5, -1, 0, 2])},
    "prompt": {"is_causal": True, "sliding_window": 50, "prefix_in_window": True},
}


@pytest.mark.parametrize(("Lq", "Lk"), [(1, 90), (3, 40), (20, 20)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_row_alone_is_the_row_in_a_batch(options, Lq, Lk):
    """The row has its own prefix, packed with others or not, or has none."""
    dtype = torch.float32 if options else torch.bfloat16
    query, key, value, prefix_key, prefix_value = operands(Lq, Lk, sum(LENGTHS), dtype)
    packed = {"prefix_lengths": torch.tensor(LENGTHS), "prefix_index": INDEX}
    out, lse = attend(query, key, value, prefix_key, prefix_value, **packed, **options)
    keys, values = (x.split(LENGTHS, 1) for x in (prefix_key, prefix_value))
    for i, n in enumerate(INDEX.tolist()):
        row = [x[i : i + 1] for x in (query, key, value)]
        prefix = (None, None) if n < 0 else (keys[n], values[n])
        one, one_lse = attend(*row, *prefix, **options)
        assert torch.equal(one[0], out[i]), i
        assert torch.equal(one_lse[0], lse[i]), i


@pytest.mark.parametrize(("Lq", "P"), [(1, 0), (1, 1), (1, 200), (20, 63)])
def test_one_prefix_for_all(Lq, P):
    query, key, value, *prefix = operands(Lq, 40, P)
    out, lse = attend(query, key, value, *prefix, is_causal=True)
    for rows in ([0], [3, 1], [4, 4, 2, 0, 1, 3, 3]):
        some, some_lse = attend(*(x[rows] for x in (query, key, value)), *prefix, is_causal=True)
        assert torch.equal(some, out[rows])
        assert torch.equal(some_lse, lse[rows])


def test_without_the_option_bits_follow_the_batch():
    """The tests above can fail: the splits of a decoding step follow the size of the batch."""
    query, key, value, *prefix = operands(1, 90, 600)
    out, _ = attend(query, key, value, *prefix, batch_invariant=False)
    row, _ = attend(query[:1], key[:1], value[:1], *prefix, batch_invariant=False)
    assert not torch.equal(row[0], out[0])


@pytest.mark.parametrize("P", [20, 150])
def test_padding_of_a_decoding_step(P):
    """A row padded to the longest of its batch."""
    query, key, value, *prefix = operands(2, 90, P)
    reals = (90, 5, 64, 33, 1)
    mask = torch.arange(90) >= 90 - torch.tensor(reals)[:, None]
    out, lse = attend(query, key, value, *prefix, is_causal=True, key_padding_mask=mask)
    for i, n in enumerate(reals[:4]):  # the last row has fewer keys than queries
        keys = (x[i : i + 1, :, -n:] for x in (key, value))
        one, one_lse = attend(query[i : i + 1], *keys, *prefix, is_causal=True)
        assert torch.equal(one[0], out[i]), n
        assert torch.equal(one_lse[0], lse[i]), n


@pytest.mark.parametrize("Lq", [1, 20])
def test_a_row_of_a_longer_buffer(Lq):
    """It has the bits of a call over its own keys."""
    query, key, value, *prefix = operands(Lq, 150, 20)
    lengths = (150, 25, 64, 33, 20)
    in_use = torch.tensor(lengths)
    out, lse = attend(query, key, value, *prefix, is_causal=True, key_lengths=in_use)
    for i, n in enumerate(lengths):
        keys = (x[i : i + 1, :, :n] for x in (key, value))
        one, one_lse = attend(query[i : i + 1], *keys, *prefix, is_causal=True)
        assert torch.equal(one[0], out[i]), n
        assert torch.equal(one_lse[0], lse[i]), n


@pytest.mark.parametrize("lengths", [(5, 37, 12, 1), (3, 2)])
def test_a_sequence_alone_is_the_sequence_among_packed_ones(lengths):
    total, index = sum(lengths), torch.tensor([0, 2, -1, 1][: len(lengths)])
    tensors = operands(total, total, sum(LENGTHS))
    query, key, value = (x[:1] for x in tensors[:3])
    prefix = {"prefix_lengths": torch.tensor(LENGTHS), "is_causal": True}
    ends = torch.tensor((0, *lengths)).cumsum(0)
    out, lse = attend(
        query, key, value, *tensors[3:], cu_seqlens=ends, prefix_index=index, **prefix
    )
    for i, (first, end) in enumerate(itertools.pairwise(ends)):
        one, one_lse = attend(
            *(x[:, :, first:end] for x in (query, key, value)), *tensors[3:],
            cu_seqlens=torch.tensor([0, lengths[i]]), prefix_index=index[i : i + 1], **prefix,
        )  # fmt: skip
        assert torch.equal(one, out[:, :, first:end]), i
        assert torch.equal(one_lse, lse[:, :, first:end]), i


def test_padding_of_a_prefill_is_refused():
    """It would move a row's keys from tile to tile."""
    mask = torch.ones(len(INDEX), 65, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"batch_invariant: key_padding_mask .* Lq = 65"):
        attend(*operands(65, 65, 5), key_padding_mask=mask)


def test_no_other_backend_promises_it():
    tensors = operands(1, 9, 5)
    for backend in ("auto", "reference", "composed"):
        with pytest.raises(RuntimeError, match=r"cannot do batch_invariant.*can: 'triton'"):
            attend(*tensors, backend=backend)


def test_opcheck():
    tensors = [x[:2].requires_grad_() for x in operands(2, 3, 4)]
    options = Options(is_causal=True, scale=0.25, batch_invariant=True)
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attention.default, (*tensors, *options, "triton")
    )


def test_gradients_and_the_compiler():
    tensors = [x.requires_grad_() for x in operands(2, 3, 4)]

    def run(*tensors, batch_invariant=True):
        return attend(*tensors, batch_invariant=batch_invariant)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for out in (run(*tensors, batch_invariant=False), run(*tensors), compiled(*tensors)):
        found.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=0)
