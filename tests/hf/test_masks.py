"""Each mask has the form that fastprefix.hf.layer.masks documents; users may give their own."""

import pytest
import torch
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf.layer.masks import prefix_attention_mask

ALL = torch.ones(2, 6, dtype=torch.bool)
PADDED = ALL.clone()
PADDED[1, :3] = False


def mask_of(function=causal_mask_function, q=6, kv=6, padding=None, **options):
    options = {"q_offset": kv - q, **options}
    return prefix_attention_mask(
        2, q, kv, mask_function=function, attention_mask=padding, **options
    )


@pytest.mark.parametrize("padding", [None, ALL])
@pytest.mark.parametrize("q", [6, 2, 1])
def test_causal_without_padding_needs_no_mask(padding, q):
    assert mask_of(q=q, padding=padding) is None


@pytest.mark.parametrize("q", [6, 2, 1])
def test_causal_with_padding_stays_two_dimensional(q):
    assert torch.equal(mask_of(q=q, padding=PADDED), PADDED)


def test_bidirectional_with_padding_is_one_row():
    options = {"allow_is_bidirectional_skip": True}
    assert mask_of(bidirectional_mask_function, **options) is None
    assert mask_of(bidirectional_mask_function, padding=ALL, **options) is None
    found = mask_of(bidirectional_mask_function, padding=PADDED, **options)
    assert torch.equal(found, PADDED[:, None, None, :])


EXPLICIT = {
    "window": {"function": sliding_window_causal_mask_function(3)},
    "no skip": {"allow_is_causal_skip": False},
    "queries not at the end": {"q": 2, "q_offset": 1},
    "a cache that begins later": {"q": 4, "kv": 4, "q_offset": 2, "kv_offset": 2},
    "offset as a tensor": {"q": 2, "q_offset": torch.tensor(4)},
    "bidirectional, no skip": {"function": bidirectional_mask_function},
}


@pytest.mark.parametrize("padding", [None, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("case", EXPLICIT)
def test_anything_else_is_the_mask_of_sdpa(case, padding):
    options = {"q": 6, "kv": 6, "function": causal_mask_function, **EXPLICIT[case]}
    found = mask_of(padding=padding, **options)
    q, kv, function = (options.pop(name) for name in ("q", "kv", "function"))
    options = {"q_offset": kv - q, **options, "allow_is_causal_skip": False}
    expected = sdpa_mask(2, q, kv, mask_function=function, attention_mask=padding, **options)
    assert found.dim() == 4
    assert torch.equal(found, expected)


def test_a_padding_mask_longer_than_the_keys_is_not_taken_as_it_is():
    """A static cache leads to this: the user gives a mask for the text seen so far."""
    longer = torch.cat([PADDED, ALL], dim=1)
    found = mask_of(padding=longer)
    assert found.dim() == 4
    assert torch.equal(found, sdpa_mask(2, 6, 6, attention_mask=longer, allow_is_causal_skip=False))


def blocks(dtype, rows=2, length=6):
    """A mask that no flag describes: causal, but every third query misses the second token."""
    sees = torch.ones(length, length, dtype=torch.bool).tril().repeat(rows, 1, 1, 1)
    sees[:, :, 2::3, 1] = False
    sees[1, :, 4:, 0] = False
    if dtype == torch.bool:
        return sees
    bias = torch.randn(sees.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    return bias.masked_fill(~sees, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_mask_without_a_prefix(model, bare, dtype):
    ids, _ = tiny.batch((6, 6))
    mask = blocks(dtype)
    expected = bare(ids, attention_mask=mask).logits
    assert not torch.allclose(expected, bare(ids).logits, atol=1e-3)
    got = patch_model(model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("explicit", [True, False], ids=["position_ids", "no position_ids"])
def test_custom_mask_with_a_prefix_covers_the_text_alone(model, bare, dtype, explicit):
    front, (ids, _) = tiny.prompt(), tiny.batch((6, 6))
    mask, P = blocks(dtype), front.shape[1]
    whole = torch.ones(P + 6, P + 6, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if dtype != torch.bool:
        whole = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(dtype).min)
    whole[:, :, P:, P:] = mask
    expected = bare(torch.cat([front.expand(2, -1), ids], 1), attention_mask=whole).logits[:, P:]

    options = {"position_ids": torch.arange(6)[None]} if explicit else {}
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(ids, attention_mask=mask, **options).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def additive(sees, nothing):
    return torch.zeros(sees.shape).masked_fill(~sees, nothing)


FORMS = {
    "bool": lambda sees: sees,
    "lowest number": lambda sees: additive(sees, torch.finfo(torch.float32).min),
    "minus infinity": lambda sees: additive(sees, float("-inf")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 4])
def test_prefix_lm_by_a_custom_mask_and_a_cache(form, heads):
    """The text's first tokens see each other in both directions; the rest comes in a second call.

    The head of each row sees another number of them, where the mask has heads.
    """
    model, bare = (tiny.build("gpt2", attn_implementation="eager") for _ in range(2))
    front, (ids, _) = tiny.prompt(), tiny.batch((7, 7))
    P, first, L = front.shape[1], 4, 7
    sees = torch.ones(L, L, dtype=torch.bool).tril().repeat(2, heads, 1, 1)
    for head in range(heads):
        sees[:, head, : first - head, : first - head] = True
    whole = torch.ones(P + L, P + L, dtype=torch.bool).tril().repeat(2, heads, 1, 1)
    whole[:, :, P:, P:] = sees
    full = torch.cat([front.expand(2, -1), ids], 1)
    # the oracle adds its mask: transformers makes such masks for eager attention
    seen = additive(whole, torch.finfo(torch.float32).min)
    expected = bare(full, attention_mask=seen).logits[:, P:]
    cache, found = DynamicCache(), []
    with use_prefix(model, PrefixKV.prefill(model, front)):
        for piece in (slice(0, first), slice(first, L)):
            mask = FORMS[form](sees[:, :, piece, : piece.stop])
            out = model(ids[:, piece], attention_mask=mask, past_key_values=cache)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def gemma3():
    """Gemma 3 as it takes images, whose tokens see each other in both directions."""
    text = {**tiny.GROUPED, "sliding_window": 64, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        image_token_id=tiny.VOCAB - 1,
        boi_token_id=tiny.VOCAB - 2,
        eoi_token_id=tiny.VOCAB - 3,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefix_lm_by_token_types(side):
    """The model's own mask, which is causal but for tokens of type 1."""
    model, bare = gemma3(), gemma3()
    front, (ids, mask) = tiny.prompt(5), tiny.batch((9, 7), side)
    types = torch.zeros_like(ids)
    types[:, 3:6] = 1
    full, full_mask = tiny.concatenate(front, ids, mask, side)
    full_types = torch.zeros_like(full)
    for row in range(len(ids)):
        text = full_mask[row].nonzero()[5:, 0]
        full_types[row, text] = types[row][mask[row].bool()]
    places = tiny.positions(full_mask)
    options = {"attention_mask": full_mask, "position_ids": places}
    expected = bare(full, token_type_ids=full_types, **options).logits
    causal = bare(full, **options).logits
    real = mask.bool()
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(ids, attention_mask=mask, token_type_ids=types).logits
    start = full.shape[1] - ids.shape[1]
    at = slice(start, None) if side == "left" else slice(5, None)
    torch.testing.assert_close(got[real], expected[:, at][real], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got[real], causal[:, at][real], atol=1e-2)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(1, 1, 4, 9, dtype=torch.bool), ValueError),  # with columns for the prefix
        (torch.ones(1, 1, 4, 4, dtype=torch.long), TypeError),
    ],
    ids=["prefix columns", "integers"],
)
def test_other_custom_masks_are_refused(mask, error):
    model = tiny.build()
    with use_prefix(model, tiny.random_kv(model)), pytest.raises(error, match="attn_mask: got"):
        model(tiny.prompt(4), attention_mask=mask)


def test_a_custom_mask_of_a_single_query_is_not_taken_for_padding(model, bare):
    """[B, 1, 1, Lk] with one query: causality adds nothing, so both readings must agree."""
    ids = tiny.prompt(1)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    got = patch_model(model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(got, bare(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("length", [1, 2, 4, 6])
def test_a_user_s_integers_are_not_taken_for_a_mask_of_ours(dtype, length):
    """Masks for buffers of keys travel as integers [B, 1, 1, n] between the model's own parts."""
    mask = torch.ones(1, 1, 1, length, dtype=dtype)
    model = tiny.build()
    with use_prefix(model, tiny.random_kv(model)), pytest.raises(TypeError, match="attn_mask: got"):
        model(tiny.prompt(length), attention_mask=mask)
