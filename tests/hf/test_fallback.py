"""fallback="expand": models that cannot be patched get prefixes through their own KV cache.

The oracle runs each row alone, unpadded, in plain transformers: behind the prompt in one sequence,
or behind the same keys and values in a DynamicCache.
"""

import pytest
import torch
import transformers
from transformers import (
    BloomConfig,
    BloomForSequenceClassification,
    DynamicCache,
    FalconConfig,
    FalconForQuestionAnswering,
)

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixKV,
    patch_model,
    use_prefix,
)
from fastprefix.hf import patch_of
from fastprefix_testing.fallback import (
    BERTS,
    COUNT_PADS,
    MAY_BE_PATCHED,
    MODELS,
    P,
    close,
    fill,
    learned,
    make,
    plain_logits,
    rows_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fallback='expand' the prefix is copied")


def is_causal(name):
    """Release 5.17 lets the BERT-like decoders see their text in both directions."""
    model, ids = make(name), torch.arange(1, 6)[None]
    other = ids.clone()
    other[0, -1] = 0
    return torch.equal(model(ids).logits[:, 0], model(other).logits[:, 0])


@pytest.fixture(params=MODELS)
def name(request):
    if request.param in BERTS and not is_causal(request.param):
        pytest.skip(f"{request.param} is no causal model in this release of transformers")
    return request.param


@pytest.mark.parametrize("bert", BERTS)
def test_decoders_that_are_none_take_no_prompt(bert):
    """What the model does counts, not what its configuration says."""
    if is_causal(bert):
        PrefixKV.prefill(make(bert), tiny.prompt(3), fallback="expand")
    else:
        with pytest.raises(ValueError, match="takes a decoder-only model"):
            PrefixKV.prefill(make(bert), tiny.prompt(3), fallback="expand")


def sides(name):
    return ("right",) if name in COUNT_PADS else ("right", "left")


def test_a_prompt_is_the_concatenation(name):
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    assert kv.in_window
    assert kv.position_offset == 9
    for side, lengths in [(s, (7, 4, 1)) for s in sides(name)] + [("right", (6, 6))]:
        ids, mask = tiny.batch(lengths, side)
        with use_prefix(model, kv, fallback="expand"):
            logits = model(ids, attention_mask=mask).logits
            if min(lengths) == max(lengths):
                close(model(ids).logits, logits)
        for row, text in enumerate(rows_of(ids, mask)):
            wanted = bare(torch.cat([front, text], 1)).logits[0, 9:]
            close(logits[row][mask[row].bool()], wanted)
    # the test can fail: one token of the prompt less is not the same
    less = kv.map(lambda x: x[:, 1:])
    less = PrefixKV(less.keys, less.values, 8, in_window=True)
    with use_prefix(model, less, fallback="expand"):
        assert (model(ids).logits - logits).abs().max() > 0.05


def test_a_learned_prefix_and_its_gradient(name):
    model, bare = patch_model(make(name), fallback="expand"), make(name)
    assert patch_of(model).expanded is not None or name in MAY_BE_PATCHED
    assert patch_of(model).groups == ("decoder",) * 2
    assert patch_of(model).default_offset(P) == P
    kv = learned(model)
    leaves = [*kv.keys, *kv.values]
    for side in sides(name):
        ids, mask = tiny.batch((7, 4, 2), side)
        model.train(side == "left")  # nothing of it drops anything
        weight = torch.randn(101, generator=torch.Generator().manual_seed(1))
        with use_prefix(model, kv):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        real = [logits[row][mask[row].bool()] for row in range(3)]
        wanted = [plain_logits(bare, text, kv) for text in rows_of(ids, mask)]
        for found, want in zip(real, wanted, strict=True):
            close(found, want)
        found = torch.autograd.grad(torch.cat(real).sigmoid().matmul(weight).sum(), leaves)
        want = torch.autograd.grad(torch.cat(wanted).sigmoid().matmul(weight).sum(), leaves)
        for x, y in zip(found, want, strict=True):
            close(x, y)
        assert min(x.abs().max() for x in found) > 1e-3


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3},
     {"num_beams": 2, "num_return_sequences": 2}],
    ids=lambda how: " ".join(how) or "greedy",
)  # fmt: skip
def test_generate(name, how):
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    batches = [tiny.batch((6, 6))]
    if name not in COUNT_PADS:
        batches.append(tiny.batch((7, 4, 1)))
    if "prompt_lookup_num_tokens" in how:
        batches = [tiny.batch((6,))]
    for ids, mask in batches:
        with use_prefix(model, kv, fallback="expand"):
            found = tiny.generate(model, ids, mask, **how)
        texts = rows_of(ids, mask)
        wanted = [tiny.generate(bare, torch.cat([front, text], 1), **how) for text in texts]
        assert torch.equal(found, torch.cat(wanted))
        assert not any(torch.equal(tiny.generate(bare, texts[0], **how), x) for x in wanted[:1])


def test_generate_samples_the_same(name):
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    ids, _ = tiny.batch((6, 6))
    torch.manual_seed(3)
    with use_prefix(model, kv, fallback="expand"):
        found = tiny.generate(model, ids, do_sample=True)
    torch.manual_seed(3)
    both = torch.cat([front.expand(2, -1), ids], 1)
    assert torch.equal(found, tiny.generate(bare, both, do_sample=True))


def test_generate_goes_on_from_a_cache(name):
    """The cache shows only the text, in and between two blocks with the prefix."""
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    cache, ids = DynamicCache(config=model.config), tiny.prompt(4, seed=5)
    text = ids
    for turn in range(2):
        with use_prefix(model, PrefixKV(kv.keys, kv.values, 9, True), fallback="expand"):
            text = model.generate(
                text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False,
                pad_token_id=0, past_key_values=cache,
            )  # fmt: skip
        assert cache.get_seq_length() == text.shape[1] - 1
        text = torch.cat([text, tiny.prompt(3, seed=6 + turn)], 1)
    both = torch.cat([front, ids], 1)
    for turn in range(2):
        both = bare.generate(
            both, attention_mask=torch.ones_like(both), max_new_tokens=4, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        both = torch.cat([both, tiny.prompt(3, seed=6 + turn)], 1)
    assert torch.equal(text, both[:, 9:])


def test_rows_with_prefixes_of_their_own(name):
    model, bare = patch_model(make(name), fallback="expand"), make(name)
    long, short = learned(model), learned(model, 3 if name not in COUNT_PADS else P, seed=1)
    rows = ["long", "short", None, "long"] if name not in COUNT_PADS else ["long", "short"] * 2
    for side in sides(name):
        ids, mask = tiny.batch((5, 7, 4, 6), side)
        with use_prefix(model, {"long": long, "short": short}, rows):
            logits = model(ids, attention_mask=mask).logits
            if side == "left":
                new = tiny.generate(model, ids, mask, max_new_tokens=3)
        for row, (text, own) in enumerate(zip(rows_of(ids, mask), rows, strict=True)):
            prefix = {"long": long, "short": short, None: None}[own]
            close(logits[row][mask[row].bool()], plain_logits(bare, text, prefix))
            if side == "left":
                for token in new[row]:
                    assert plain_logits(bare, text, prefix)[-1].argmax() == token
                    text = torch.cat([text, token.view(1, 1)], 1)


def test_encoders_that_look_into_their_cache():
    """RemBERT's encoder attends to what is there; a prompt is refused, since it sees the text."""
    fields = {**MODELS["rembert"][1], "is_decoder": False}
    config = transformers.RemBertConfig(**fields)
    model = patch_model(fill(transformers.RemBertForMaskedLM(config)), fallback="expand")
    bare = fill(transformers.RemBertForMaskedLM(config))
    assert set(patch_of(model).groups) == {"encoder"}
    front, text = tiny.prompt(P), tiny.prompt(6, seed=3)
    # the keys that all layers make of the first tokens of one sequence are a prefix of the rest
    cache = DynamicCache()
    whole = bare.rembert(torch.cat([front, text], 1), past_key_values=cache).last_hidden_state
    keys = tuple(layer.keys[0, :, :P] for layer in cache.layers)
    values = tuple(layer.values[0, :, :P] for layer in cache.layers)
    with use_prefix(model, PrefixKV(keys, values, P)):
        close(model.base_model(text).last_hidden_state, whole[:, P:])
    with pytest.raises(ValueError, match="decoder-only"):
        PrefixKV.prefill(model, front)


def test_heads_on_top():
    """What a model makes of the last token, or of every one, is the text's."""
    fields = {**MODELS["bloom"][1], "num_labels": 3}
    model = fill(BloomForSequenceClassification(BloomConfig(**fields)))
    bare = fill(BloomForSequenceClassification(BloomConfig(**fields)))
    front = tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    ids, mask = tiny.batch((7, 4), "right")
    with use_prefix(model, kv, fallback="expand"):
        logits = model(ids, attention_mask=mask).logits
    for row, text in enumerate(rows_of(ids, mask)):
        close(logits[row], bare(torch.cat([front, text], 1)).logits[0])
    # a head that takes no cache itself
    config = FalconConfig(**MODELS["falcon new"][1])
    model, bare = (fill(FalconForQuestionAnswering(config)) for _ in range(2))
    kv = PrefixKV.prefill(model, front, fallback="expand")
    with use_prefix(model, kv, fallback="expand"):
        close(model(ids[:1]).start_logits, bare(torch.cat([front, ids[:1]], 1)).start_logits[:, 9:])
        hidden = model.base_model(ids[:1], return_dict=False, use_cache=False)
        assert len(hidden) == 1
