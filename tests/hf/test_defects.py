"""What fails or is silently wrong with a prefix elsewhere, on decoders.

PEFT's prefix tuning puts a learned prefix into every row's cache. With it gradient checkpointing,
static caches, prompt lookup and assisted decoding fail, and left-padded batches are wrong where
windows or relative positions count the padding between prefix and text. The oracle has the prefix
in its cache as well, but runs each text alone, without padding, and says by a mask who sees whom.
"""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import patch_model, use_prefix
from fastprefix.hf.versions import enable_checkpointing

PLAIN = ["llama", "qwen2", "gpt2"]
WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss"]
LENGTHS = (11, 6, 1)
P = 4


def build(name, dtype=torch.float32):
    return tiny.windowed(name, dtype=dtype) if name in WINDOWED else tiny.build(name, dtype)


def masks(model, length):
    """Who sees whom in a text behind the prefix, as additive masks that transformers takes."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    sees = {"full_attention": causal, "sliding_attention": causal.triu(1 - tiny.WINDOW)}
    everyone = torch.ones(length, P, dtype=torch.bool)
    additive = {}
    for name, mask in sees.items():
        whole = torch.cat([everyone, mask], 1)[None, None]
        bias = torch.zeros(whole.shape, dtype=model.dtype)
        additive[name] = bias.masked_fill(~whole, torch.finfo(model.dtype).min)
    layers = set(getattr(model.config, "layer_types", None) or ())
    if len(layers) > 1:
        return additive
    windowed = getattr(model.config, "sliding_window", None) is not None and not layers
    return additive["sliding_attention" if windowed else (layers or {"full_attention"}).pop()]


def alone(bare, kv, text):
    """Logits [L, V] of one text behind copies of the prefix."""
    length = len(text)
    return bare(
        text[None],
        attention_mask=masks(bare, length),
        position_ids=torch.arange(P, P + length)[None],
        past_key_values=tiny.expanded(kv, 1),
    ).logits[0]


@torch.no_grad()
def greedy(bare, kv, text, steps):
    """New ids [steps], each from a forward pass of its own."""
    whole = text
    for _ in range(steps):
        best = alone(bare, kv, whole)[-1:].argmax(-1)
        whole = torch.cat([whole, best])
    return whole[len(text) :]


def rows(ids, mask):
    return [row[real.bool()] for row, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", PLAIN + WINDOWED)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_on_left_padded_batches(name, cache):
    """Windows must not count pads, nor a static cache's empty places."""
    model, bare = build(name), build(name)
    kv, (ids, mask) = tiny.random_kv(model, P), tiny.batch(LENGTHS)
    with use_prefix(model, kv):
        got = tiny.generate(model, ids, mask, max_new_tokens=4, cache_implementation=cache)
    expected = [greedy(bare, kv, text, 4) for text in rows(ids, mask)]
    assert torch.equal(got, torch.stack(expected))


@pytest.mark.parametrize("name", PLAIN + WINDOWED)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit", [True, False], ids=["position_ids", "no position_ids"])
def test_logits_of_padded_batches(name, side, explicit):
    """Without position_ids pads must not stand between prefix and text."""
    model, bare = build(name), build(name)
    kv, (ids, mask) = tiny.random_kv(model, P), tiny.batch(LENGTHS, side)
    options = {"position_ids": tiny.positions(mask)} if explicit else {}
    with use_prefix(model, kv):
        got = model(ids, attention_mask=mask, **options).logits
    expected = [alone(bare, kv, text) for text in rows(ids, mask)]
    torch.testing.assert_close(got[mask.bool()], torch.cat(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PLAIN + WINDOWED)
@pytest.mark.parametrize("way", ["prompt lookup", "assisted"])
def test_lookup_and_assistants_give_greedy_ids(name, way):
    model, bare = build(name), build(name)
    kv, text = tiny.random_kv(model, P), tiny.prompt(3).repeat(1, 2)
    options = (
        {"prompt_lookup_num_tokens": 2}
        if way == "prompt lookup"
        else {"assistant_model": tiny.build("llama", seed=1)}
    )
    with use_prefix(model, kv):
        got = tiny.generate(model, text, max_new_tokens=6, **options)
    assert torch.equal(got[0], greedy(bare, kv, text[0], 6))


@pytest.mark.parametrize("name", PLAIN + WINDOWED)
def test_gradient_checkpointing(name):
    """Rows are padded on the left. Their copies of the prefix give the expected gradient."""
    # GPT-OSS's experts multiply in float32 at most
    dtype = torch.float32 if name == "gpt_oss" else torch.float64
    model, bare = (build(name, dtype) for _ in range(2))
    kv, (ids, mask) = tiny.random_kv(model, P, requires_grad=True), tiny.batch(LENGTHS)
    for text in rows(ids, mask):
        alone(bare, kv, text).logsumexp(-1).sum().backward()
    expected = tiny.gradients(kv)
    assert all(gradient.abs().max() > 1e-6 for gradient in expected)
    patch_model(model).train().requires_grad_(False)
    enable_checkpointing(model, {"use_reentrant": False})
    with use_prefix(model, kv):
        logits = model(ids, attention_mask=mask).logits
    logits[mask.bool()].logsumexp(-1).sum().backward()
    near = {"rtol": 1e-3, "atol": 1e-4} if name == "gpt_oss" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(tiny.gradients(kv), expected, **near)
