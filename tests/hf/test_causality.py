"""What comes later, or is padded, changes nothing that comes before."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import patch_model, use_prefix


@pytest.fixture(params=["prefix", "no prefix"])
def logits(request, model):
    """A function from ids and mask to logits, of a patched model."""
    patch_model(model)
    kv = tiny.random_kv(model, requires_grad=False)

    def run(ids, mask):
        if request.param == "no prefix":
            return model(ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits
        with use_prefix(model, kv):
            return model(ids, attention_mask=mask).logits

    return torch.no_grad()(run)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_later_token_does_not_leak(logits, side):
    ids, mask = tiny.batch((9, 6), side)
    before = logits(ids, mask)
    for j in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, j] = (ids[:, j] % (tiny.VOCAB - 1)) + 1
        after = logits(changed, mask)
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-6)
        seen = mask[:, j].bool()
        assert (after[seen, j] - before[seen, j]).abs().amax(-1).min() > 1e-3, "j itself counts"


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_under_padding_does_not_matter(logits, side):
    ids, mask = tiny.batch((9, 6, 2), side)
    real = mask.bool()
    before = logits(ids, mask)[real]
    after = logits(ids.masked_fill(~real, 77), mask)[real]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_other_rows_do_not_matter(logits):
    ids, mask = tiny.batch((9, 6, 2))
    changed = ids.clone()
    changed[1] = 77
    before, after = logits(ids, mask), logits(changed, mask)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-6)


def test_padding_gives_no_nan(logits):
    """Pads on the left see no text at all: without a prefix they see nothing."""
    ids, mask = tiny.batch((9, 1))
    assert torch.isfinite(logits(ids, mask)).all()
