"""Under autocast a tuned model is as exact as a bare one with the prefix in its cache."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel


def error(got, exact):
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize(("architecture", "projection"), [("llama", True), ("gpt2", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradients(architecture, projection, dtype):
    """Both against float64: no worse than twice the bare model's error."""
    config = PrefixConfig(num_virtual_tokens=5, prefix_projection=projection, init_std=1.0)
    tuned = PrefixTuningModel(tiny.build(architecture), config)
    bare, exact = tiny.build(architecture), tiny.build(architecture, torch.float64)
    ids, mask = tiny.batch((6, 6), "right")
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}

    def solve(run):
        tuned.zero_grad()
        loss = run().loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in tuned.encoder.parameters())]

    def oracle(model):
        kv = tuned.encoder().to(dtype=model.dtype)
        return tiny.expanded_forward(model, kv, ids, mask, labels=ids)

    expected = solve(lambda: oracle(exact))
    with torch.autocast("cpu", dtype):
        plain = solve(lambda: oracle(bare))
        got = solve(lambda: tuned(**inputs))
    assert all(gradient.dtype == torch.float32 for gradient in got)
    for ours, theirs, want in zip(got, plain, expected, strict=True):
        assert error(ours, want) <= 2 * error(theirs, want) + 1e-3 * want.abs().max().item()
