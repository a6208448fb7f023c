"""Decode gives the same bits whatever else is in the batch, with batch_invariant."""

from __future__ import annotations

import pytest
import torch

from fastprefix.kernels.decode import decode_forward
from fastprefix.options import Options
from fastprefix_testing.launchers import interpreted, operands
from fastprefix_testing.problems import decoding

pytestmark = [interpreted, pytest.mark.usefixtures("rounded_once")]


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 30)], ids=str
)
def test_rows_do_not_depend_on_their_batch_mates(dtype, window):
    lengths, reals, index = (150, 0, 40), (5, 90, 64, 33), (0, 2, -1, 0)
    sizes = {"B": 4, "Hq": 3, "Lq": 2, "Lk": 90, "lengths": lengths, "index": index}
    inputs, rule = operands(decoding(**sizes, dtype=dtype, sliding_window=window).draw())
    results = {}
    for batch in ((0,), (1,), (2,), (3,), (3, 2, 1, 0), (2, 2, 3, 0, 0, 0, 0, 0)):
        longest = max(reals[b] for b in batch)
        rows = torch.tensor(batch)
        query, key, value = (x[rows] for x in inputs[:3])
        # Left padded to the longest of the batch, as generate() does.
        key, value = key[:, :, -longest:], value[:, :, -longest:]
        mask = torch.arange(longest) >= longest - torch.tensor(reals)[rows, None]
        chosen = rule | {"prefix_index": rule["prefix_index"][rows], "key_padding_mask": mask}
        out, lse = decode_forward(
            query, key, value, *inputs[3:], Options(**chosen, batch_invariant=True)
        )  # fmt: skip
        for i, b in enumerate(batch):
            first_out, first_lse = results.setdefault(b, (out[i], lse[i]))
            assert torch.equal(out[i], first_out), (batch, b)
            assert torch.equal(lse[i], first_lse), (batch, b)


def test_a_shared_prefix_gives_the_bits_of_a_packed_one():
    inputs, rule = operands(decoding(P=150).draw())
    packed = {"prefix_index": torch.zeros(2, dtype=torch.int32)}
    packed["prefix_lengths"] = torch.tensor([150], dtype=torch.int32)
    one = decode_forward(*inputs, Options(**rule, batch_invariant=True))
    other = decode_forward(*inputs, Options(**rule, **packed, batch_invariant=True))
    assert torch.equal(one[0], other[0])
