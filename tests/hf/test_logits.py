"""One forward with a prefix equals the model run on prompt and text in one sequence (float64)."""

import inspect

import pytest
import torch
from transformers import DynamicCache

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix

EXACT = {"rtol": 0, "atol": 1e-9}
LENGTHS = [(7, 4, 1), (5, 5, 5)]


@pytest.fixture
def model(architecture):
    return tiny.build(architecture, torch.float64)


@pytest.fixture
def bare(architecture):
    return tiny.build(architecture, torch.float64)


@pytest.fixture(params=[True, False], ids=["patched before", "patched by the block"])
def maybe_patched(request, model):
    return patch_model(model) if request.param else model


@pytest.mark.parametrize("explicit", [True, False], ids=["position_ids", "no position_ids"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=["padded", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_the_concatenation(model, bare, side, lengths, explicit):
    front, (ids, mask) = tiny.prompt(), tiny.batch(lengths, side)
    expected = tiny.concatenated_logits(bare, front, ids, mask, side)
    options = {"position_ids": tiny.positions(mask)} if explicit else {}
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(ids, attention_mask=mask, **options).logits
    if side == "left":  # pads sit before the prompt there, behind it here
        expected = torch.stack([row[-ids.shape[1] :] for row in expected])
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], **EXACT)


def test_logits_without_mask(maybe_patched, bare):
    front, (ids, mask) = tiny.prompt(), tiny.batch((6, 6))
    with use_prefix(maybe_patched, PrefixKV.prefill(maybe_patched, front)):
        got = maybe_patched(ids).logits
    torch.testing.assert_close(got, tiny.concatenated_logits(bare, front, ids, mask), **EXACT)


def test_float_and_bool_masks_mean_the_same(model, bare):
    ids, mask = tiny.batch()
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt())):
        expected = model(ids, attention_mask=mask).logits
        for dtype in (torch.bool, torch.float32):
            torch.testing.assert_close(
                model(ids, attention_mask=mask.to(dtype)).logits, expected, **EXACT
            )


def test_a_row_of_a_batch_gets_what_it_gets_alone(model):
    ids, mask = tiny.batch()
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt())):
        together = model(ids, attention_mask=mask).logits
        for row in range(len(ids)):
            real = mask[row].bool()
            alone = model(ids[row][real][None]).logits[0]
            torch.testing.assert_close(together[row][real], alone, **EXACT)


def test_inputs_embeds(model, bare):
    front, (ids, mask) = tiny.prompt(), tiny.batch(side="right")
    expected = tiny.concatenated_logits(bare, front, ids, mask, "right")
    with use_prefix(model, PrefixKV.prefill(model, front)):
        embeds = model.get_input_embeddings()(ids)
        got = model(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **EXACT)


def test_arguments_by_position(model):
    ids, mask = tiny.batch()
    between = list(inspect.signature(model.forward).parameters).index("attention_mask") - 1
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt())):
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(ids, *[None] * between, mask).logits, expected)


def test_text_in_two_chunks_with_a_cache(model, bare):
    """The second chunk's positions follow the mask, or the cache where there is no mask."""
    front, (ids, mask) = tiny.prompt(), tiny.batch((8, 5))
    expected = tiny.concatenated_logits(bare, front, ids, mask)[:, -3:]
    with use_prefix(model, PrefixKV.prefill(model, front)):
        cache = DynamicCache()
        model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        got = model(ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(got, expected, **EXACT)

        cache = DynamicCache()
        model(ids[:1, :5], past_key_values=cache)
        got = model(ids[:1, 5:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected[:1], **EXACT)


def test_decoder_called_alone_has_the_prefix_once(model, bare):
    front, (ids, _) = tiny.prompt(), tiny.batch((6, 6))
    full = torch.cat([front.expand(2, -1), ids], dim=1)
    expected = bare.base_model(full).last_hidden_state[:, front.shape[1] :]
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(got, expected, **EXACT)


def test_prefill_gives_what_the_cache_holds(model, bare):
    front = tiny.prompt()
    cache = bare(front, use_cache=True).past_key_values
    kv = PrefixKV.prefill(model, front)
    assert kv.position_offset == front.shape[1]
    assert kv.num_layers == len(cache.layers)
    for layer, held in enumerate(cache.layers):
        torch.testing.assert_close(kv.keys[layer], held.keys[0], **EXACT)
        torch.testing.assert_close(kv.values[layer], held.values[0], **EXACT)


def test_prefill_leaves_the_model_as_it_was(model):
    model.train()
    list(model.modules())[3].eval()
    before = [module.training for module in model.modules()]
    PrefixKV.prefill(model, tiny.prompt())
    assert [module.training for module in model.modules()] == before
    assert not any("_fastprefix" in name for m in model.modules() for name in vars(m))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(1, 1, 3, dtype=torch.long),
        torch.ones(1, 0, dtype=torch.long),
        torch.ones(4),
        torch.tensor(3),
    ],
    ids=["empty", "two rows", "3-D", "no tokens", "float", "scalar"],
)
def test_prefill_refuses_anything_but_one_prompt(wrong):
    with pytest.raises(ValueError, match="input_ids"):
        PrefixKV.prefill(tiny.build(), wrong)
