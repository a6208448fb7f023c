"""Models with sliding windows, capped scores, sinks and dropout: a prompt equals its text in front.

The window is smaller than prompt and text, so that the prompt slides out of it as the text grows;
layers without a window keep it whole.
"""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix

NAMES = ["mistral", "gemma2", "gemma3", "gpt_oss", "qwen2"]


def pair(name, **changes):
    """A model to patch, and the same weights untouched."""
    return tiny.windowed(name, **changes), tiny.windowed(name, **changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [3, 12])
def test_generated_tokens_are_those_of_the_concatenation(name, P):
    """Left-padded rows of different lengths, until the prompt is out of every window."""
    model, bare = pair(name)
    front, (ids, mask) = tiny.prompt(P), tiny.batch((6, 3, 1))
    expected = tiny.generate(bare, *tiny.concatenate(front, ids, mask), max_new_tokens=14)
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask, max_new_tokens=14)
        again = tiny.generate(model, ids, mask, max_new_tokens=14, use_cache=False)
    assert torch.equal(got, expected)
    assert torch.equal(again, expected)
    assert not torch.equal(tiny.generate(bare, ids, mask, max_new_tokens=14), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["lookup", "assisted", "beams"])
def test_other_ways_to_generate(name, way):
    """Some of them take tokens back, out of windows that have moved on."""
    model, bare = pair(name)
    front, text = tiny.prompt(5), tiny.prompt(4, seed=7).repeat(1, 2)
    options = {  # the assistant has other weights and guesses wrong
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": tiny.windowed(name, hidden_size=32)},
        "beams": {"num_beams": 3},
    }[way]
    beams = {"num_beams": 3} if way == "beams" else {}
    expected = tiny.generate(bare, torch.cat([front, text], 1), max_new_tokens=10, **beams)
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, text, max_new_tokens=10, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_concatenation(name, side):
    model, bare = pair(name)
    front, (ids, mask) = tiny.prompt(5), tiny.batch((20, 14), side=side)
    expected = tiny.concatenated_logits(bare, front, ids, mask, side)
    if side == "left":
        expected = expected[:, -20:]
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_text_that_arrives_in_pieces(name):
    """A second turn on the cache of the first, whose windows have forgotten its beginning."""
    model, bare = pair(name)
    front, text = tiny.prompt(5), tiny.prompt(23, seed=7)
    expected = bare(torch.cat([front, text], 1)).logits[:, 5:]
    found, cache = [], None
    with use_prefix(model, PrefixKV.prefill(model, front)):
        for piece in text.split([6, 10, 1, 6], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_generates_what_the_concatenation_does(name):
    """Its layers' keys do not end at the newest token: their masks say how far the prompt slid."""
    model, bare = pair(name)
    front, (ids, mask) = tiny.prompt(12), tiny.batch((6, 3, 1))
    expected = tiny.generate(bare, *tiny.concatenate(front, ids, mask), max_new_tokens=14)
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask, max_new_tokens=14, cache_implementation="static")
    assert torch.equal(got, expected)


def test_packed_sequences_behind_a_prompt():
    """Positions that start anew: transformers keeps the sequences apart, each behind the prompt."""
    model, bare = pair("mistral")
    front, texts = tiny.prompt(5), [tiny.prompt(4, seed=11), tiny.prompt(9, seed=12)]
    expected = [bare(torch.cat([front, text], 1)).logits[:, 5:] for text in texts]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, torch.cat(expected, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_prefix_the_model_computes_what_it_did(name):
    model, bare = pair(name)
    ids, mask = tiny.batch((20, 14))
    options = {"attention_mask": mask, "position_ids": tiny.positions(mask)}
    got, expected = patch_model(model)(ids, **options).logits, bare(ids, **options).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-3, atol=1e-3)


def test_a_window_wider_than_prompt_and_text_is_none():
    model, bare = pair("mistral", window=64)
    front, (ids, mask) = tiny.prompt(5), tiny.batch((20, 14))
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask)
    assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_learned_prefix_stays_in_sight_of_a_window(name):
    """It is no text, so it does not slide out: the window concerns only the sequence."""
    changes = {"layer_types": ["sliding_attention"] * 3} if name == "gpt_oss" else {}
    model, bare = pair(name, **changes)
    kv, (ids, mask) = tiny.random_kv(model, 4), tiny.batch((20, 20))
    near = torch.ones(20, 20, dtype=torch.bool).tril().triu(1 - tiny.WINDOW)
    sees = torch.cat([torch.ones(20, 4, dtype=torch.bool), near], 1).expand(2, 1, -1, -1)
    sees = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    options = {"position_ids": tiny.positions(mask) + 4, "past_key_values": tiny.expanded(kv, 2)}
    expected = bare(ids, attention_mask=sees, **options).logits
    with use_prefix(model, kv):
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_gradients_of_sinks_and_prefix_are_those_of_the_copied_prefix():
    model, bare = pair("gpt_oss", window=256)
    ids, mask = tiny.batch((12, 7))
    found = []
    for side in (model, bare):
        kv = tiny.random_kv(model, 5, requires_grad=True)
        if side is model:
            with use_prefix(model, kv):
                logits = model(ids, attention_mask=mask).logits
        else:
            logits = tiny.expanded_forward(bare, kv, ids, mask).logits
        (logits.softmax(-1)[mask.bool()] ** 2).sum().backward()
        sinks = [p.grad for name, p in side.named_parameters() if name.endswith("sinks")]
        assert len(sinks) == 3
        assert all(grad.abs().sum() > 0 for grad in sinks)
        found.append([*sinks, *tiny.gradients(kv)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "option"), [("gpt2", "attn_pdrop"), ("llama", "attention_dropout")]
)
def test_attention_dropout_in_training(architecture, option):
    """Drawn anew in each step, the same from the same seed, and none in evaluation."""
    model = patch_model(tiny.build(architecture, **{option: 0.3}))
    ids, mask = tiny.batch()
    kv = tiny.random_kv(model, requires_grad=True)
    with use_prefix(model, kv):
        plain = model(ids, attention_mask=mask).logits
        assert torch.equal(plain, model(ids, attention_mask=mask).logits)
        model.train()
        torch.manual_seed(1)
        first, second = (model(ids, attention_mask=mask).logits for _ in range(2))
        torch.manual_seed(1)
        again = model(ids, attention_mask=mask).logits
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, plain)
    first.sum().backward()
    assert all(grad.isfinite().all() for grad in tiny.gradients(kv))


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_compiled_whole(name):
    """No graph break, and the window's arithmetic is the same."""
    model, _ = pair(name)
    ids, mask = tiny.batch((12, 7))
    options = {"attention_mask": mask, "use_cache": False}
    kv = PrefixKV.prefill(model, tiny.prompt(5))
    torch._dynamo.reset()
    with use_prefix(patch_model(model), kv), torch.no_grad():
        expected = model(ids, **options).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(ids, **options).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-3)
