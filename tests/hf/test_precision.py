"""Half precision, autocast and torch.compile."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix


def error(got, exact):
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_are_as_exact_as_without_fastprefix(architecture, dtype):
    """Both against the same weights in float64: no worse than twice the bare model's error."""
    model, bare = (tiny.build(architecture, dtype) for _ in range(2))
    exact = tiny.build(architecture, dtype).double()
    front, (ids, mask) = tiny.prompt(), tiny.batch((6, 6))
    expected = tiny.concatenated_logits(exact, front, ids, mask)
    plain = tiny.concatenated_logits(bare, front, ids, mask)
    kv = PrefixKV.prefill(model, front)
    assert kv.dtype == dtype
    with use_prefix(model, kv):
        got = model(ids, attention_mask=mask).logits
    assert got.dtype == dtype
    assert error(got, expected) <= 2 * error(plain, expected) + 1e-3


def test_prompts_prefilled_under_autocast(architecture):
    """They are in the dtype that attention computes in, and as exact as the bare model."""
    model, exact = tiny.build(architecture), tiny.build(architecture, torch.float64)
    front, (ids, mask) = tiny.prompt(), tiny.batch((6, 6))
    expected = tiny.concatenated_logits(exact, front, ids, mask)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = tiny.concatenated_logits(tiny.build(architecture), front, ids, mask)
        kv = PrefixKV.prefill(model, front)
        with use_prefix(model, kv):
            got = model(ids, attention_mask=mask).logits
    assert kv.dtype == torch.bfloat16
    assert error(got, expected) <= 2 * error(plain, expected) + 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_generate(architecture, dtype):
    model = tiny.build(architecture, dtype)
    ids, mask = tiny.batch()
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt())):
        assert tiny.generate(model, ids, mask).shape == (3, 8)


def test_a_float32_prefix_suits_a_bfloat16_model(architecture):
    model = tiny.build(architecture, torch.bfloat16)
    ids, mask = tiny.batch()
    kv = PrefixKV.prefill(model, tiny.prompt())
    found = []
    for prefix in (kv, kv.to(dtype=torch.float32)):
        with use_prefix(model, prefix):
            found.append(model(ids, attention_mask=mask).logits)
    assert torch.equal(*found)


def test_autocast_is_as_exact_as_without_fastprefix(architecture, model, bare):
    front, (ids, mask) = tiny.prompt(), tiny.batch((6, 6))
    expected = tiny.concatenated_logits(bare.double(), front, ids, mask)
    bare = tiny.build(architecture)
    kv = PrefixKV.prefill(model, front)
    with torch.autocast("cpu", torch.bfloat16):
        plain = tiny.concatenated_logits(bare, front, ids, mask)
        with use_prefix(model, kv):
            got = model(ids, attention_mask=mask).logits
    assert got.dtype == plain.dtype
    assert error(got, expected) <= 2 * error(plain, expected) + 1e-3


def test_autocast_trains_a_float32_prefix(model):
    patch_model(model)
    kv = tiny.random_kv(model, requires_grad=True)
    ids, mask = tiny.batch()
    labels = ids.masked_fill(~mask.bool(), -100)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), use_prefix(model, kv):
            loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradients.append(torch.cat([g.flatten() for g in tiny.gradients(kv)]))
    assert gradients[1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize(("architecture", "side"), [("llama", "left"), ("gpt2", "right")])
def test_compiled_without_graph_breaks_equals_eager(model, side):
    torch._dynamo.reset()
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = tiny.batch(side=side)
    with torch.no_grad():
        for kv in (tiny.random_kv(model), tiny.random_kv(model, seed=1)):
            with use_prefix(model, kv):
                expected = model(ids, attention_mask=mask).logits
                got = compiled(ids, attention_mask=mask).logits
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("architecture", ["llama"])
def test_compiled_training_gives_the_eager_gradient(model):
    torch._dynamo.reset()
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    kv = tiny.random_kv(model, requires_grad=True)
    ids, mask = tiny.batch()
    gradients = []
    for runs in (model, compiled):
        with use_prefix(model, kv):
            logits = runs(ids, attention_mask=mask).logits
        logits[mask.bool()].logsumexp(-1).sum().backward()
        gradients.append(tiny.gradients(kv))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_a_model_loaded_in_half_precision(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert PrefixKV.prefill(half, tiny.prompt()).dtype == torch.bfloat16
