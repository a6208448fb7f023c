"""What decode reads, writes and allocates."""

from __future__ import annotations

import pytest
import torch

from fastprefix.kernels.decode import decode_forward
from fastprefix.options import Options
from fastprefix_testing.decode import Operators
from fastprefix_testing.launchers import interpreted, operands
from fastprefix_testing.problems import decoding

pytestmark = interpreted


@pytest.mark.parametrize("lengths", [None, (40, 0, 100, 7)], ids=["shared", "packed"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_output_element_is_written_and_nothing_else(poisoned, lengths, batch_invariant):
    sizes = {"Hq": 3, "Lq": 3, "Lk": 90, "D": 24, "Dv": 40, "lengths": lengths}
    case = decoding(**sizes, layout="islands", sliding_window=50, padding="left")
    inputs, rule = operands(case.draw())
    buffers = [x._base for x in inputs]
    before = [x.clone() for x in buffers]
    out, lse = decode_forward(*inputs, Options(**rule, batch_invariant=batch_invariant))
    assert not out.isnan().any()
    assert not lse.isnan().any()
    assert len(poisoned()) >= 4
    for buffer, copy in zip(buffers, before, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_mask_neighbours_are_not_read():
    inputs, rule = operands(decoding(padding="holes", Lk=70).draw())
    results = []
    for sea in (False, True):
        around = torch.full((4, 140), sea)
        mask = around[1:-1, 3:73].copy_(rule["key_padding_mask"])
        results += [decode_forward(*inputs, Options(**rule | {"key_padding_mask": mask}))]
    assert torch.equal(results[0][0], results[1][0])


def test_wrong_tables_are_read_within_bounds(poisoned):
    # Only a host read could refuse these; the kernels must not stray because of them.
    inputs, rule = operands(decoding(B=3, lengths=(20, 30), layout="islands").draw())
    rule["prefix_lengths"] = torch.tensor([20, 1000], dtype=torch.int32)
    rule["prefix_index"] = torch.tensor([1, 7, -5], dtype=torch.int32)
    out, _ = decode_forward(*inputs, Options(**rule))
    assert not out.isnan().any()
    poisoned()


def test_no_buffer_grows_with_the_prefix():
    seen = []
    for P in (200, 300):
        inputs, rule = operands(decoding(B=10, Hq=8, Hkv=1, Lk=8, P=P).draw())
        with Operators() as operators:
            decode_forward(*inputs, Options(**rule))
        seen.append({s for s in operators.shapes if s != (0,)})  # the interpreter's own
    assert seen[0] == seen[1]
    # 80 rows are 3 tiles of 32; 2 * 4 stand-in multiprocessors allow 2 splits of each, and every
    # sequence has one. Out, lse, and one partial row and lse for every row and split.
    rows = 3 * 2 * 32 + 10 * 8
    assert seen[0] == {(10, 1, 8, 16), (10, 8, 1), (rows, 16), (rows,)}
