"""A bank's prefixes on a model: switched, in one batch, out of files where there is no room."""

from __future__ import annotations

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import KVBudget, PrefixBank, use_prefix


def test_rows_of_a_bank_are_each_what_they_are_alone(model, bare, tmp_path):
    ids, mask = tiny.batch((5, 3, 4))
    kvs = {name: tiny.random_kv(model, 3 + i, seed=i) for i, name in enumerate("abc")}
    bank = PrefixBank(KVBudget(kvs["a"].nbytes, tmp_path))
    for name, kv in kvs.items():
        bank[name] = kv
    with use_prefix(model, bank, rows=["c", None, "a"]), torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits
    for row, name in enumerate(("c", None, "a")):
        text, real = ids[row : row + 1], mask[row].bool()
        text = text[:, real]
        alone = torch.ones_like(text)
        with torch.no_grad():
            if name is None:
                expected = bare(text).logits
            else:
                expected = tiny.expanded_forward(bare, kvs[name], text, alone).logits
        torch.testing.assert_close(logits[row, real], expected[0], rtol=1e-4, atol=1e-4)
    with use_prefix(model, bank["b"]), torch.no_grad():
        switched = model(ids[:1, -3:]).logits
        expected = tiny.expanded_forward(bare, kvs["b"], ids[:1, -3:], mask[:1, -3:]).logits
    torch.testing.assert_close(switched, expected, rtol=1e-4, atol=1e-4)


def test_only_what_rows_name_is_loaded(tmp_path):
    model = tiny.build()
    kvs = {name: tiny.random_kv(model, 3, seed=i) for i, name in enumerate("abc")}
    bank = PrefixBank(KVBudget(0, tmp_path))
    for name, kv in kvs.items():
        bank[name] = kv
    (tmp_path / "b.safetensors").write_bytes(b"broken")
    ids, mask = tiny.batch((5, 3))
    with use_prefix(model, bank, rows=["c", "a"]):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"rows: got 'x', takes one of \['a', 'b', 'c'\]"):
        use_prefix(model, bank, rows=["x", None]).__enter__()
