"""generate() with a prefix gives the ids of the prompt and the text in one sequence."""

import pytest
import torch
from transformers import DynamicCache, set_seed

from fastprefix import PrefixKV, patch_model, use_prefix

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(7, 4, 1), (5, 5)], ids=["left padded", "no padding"])
def test_ids_equal_the_concatenation(tiny, model, bare, mode, lengths):
    front, (ids, mask) = tiny.prompt(), tiny.batch(lengths)
    full, full_mask = tiny.concatenate(front, ids, mask)
    kv = PrefixKV.prefill(model, front)

    set_seed(3)
    expected = tiny.generate(bare, full, full_mask, **MODES[mode])
    set_seed(3)
    with use_prefix(model, kv):
        got = tiny.generate(model, ids, mask, **MODES[mode])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ids_equal_whatever_the_attention_was_before(tiny, architecture, attention):
    model, bare = (tiny.build(architecture, attn_implementation=attention) for _ in range(2))
    front, (ids, mask) = tiny.prompt(), tiny.batch()
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask)
    assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("mode", ["greedy", "static cache"])
def test_a_row_of_a_batch_gets_what_it_gets_alone(tiny, model, mode):
    ids, mask = tiny.batch()
    kv = PrefixKV.prefill(model, tiny.prompt())
    with use_prefix(model, kv):
        together = tiny.generate(model, ids, mask, **MODES[mode])
        for row in range(len(ids)):
            text = ids[row][mask[row].bool()][None]
            assert torch.equal(tiny.generate(model, text, **MODES[mode]), together[row : row + 1])


def test_prompt_lookup_gives_greedy_ids(tiny, model, bare):
    # a text that repeats itself, so that there is something to look up
    text = tiny.prompt(4).repeat(1, 3)
    front = tiny.prompt()
    full = torch.cat([front, text], dim=1)
    kv = PrefixKV.prefill(model, front)
    with use_prefix(model, kv):
        got = tiny.generate(model, text, prompt_lookup_num_tokens=3)
        greedy = tiny.generate(model, text)
    assert torch.equal(got, greedy)
    assert torch.equal(got, tiny.generate(bare, full))


def test_assisted_by_a_bare_model_gives_greedy_ids(tiny, model, bare):
    text = tiny.prompt(6, seed=5)
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt())):
        assert torch.equal(
            tiny.generate(model, text, assistant_model=bare), tiny.generate(model, text)
        )


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)], ids=["no padding", "left padded"])
def test_second_turn_continues_from_the_cache(tiny, model, bare, lengths):
    front, (ids, mask) = tiny.prompt(), tiny.batch(lengths)
    more = torch.cat([tiny.prompt(3, seed=7), tiny.prompt(3, seed=8)])
    ones = torch.ones_like

    def two_turns(m, ids, mask):
        cache = DynamicCache()
        first = tiny.generate(m, ids, mask, past_key_values=cache)
        ids = torch.cat([ids, first, more], dim=1)
        mask = torch.cat([mask, ones(first), ones(more)], dim=1)
        second = tiny.generate(m, ids, mask, past_key_values=cache)
        return first, second, cache.get_seq_length()

    kv = PrefixKV.prefill(model, front)
    with use_prefix(model, kv):
        first, second, held = two_turns(model, ids, mask)
    first_plain, second_plain, held_plain = two_turns(bare, *tiny.concatenate(front, ids, mask))
    assert torch.equal(first, first_plain)
    assert torch.equal(second, second_plain)
    assert held == held_plain - kv.num_virtual_tokens, "the cache holds the text alone"


def test_generate_from_inputs_embeds(tiny, model, bare):
    front, (ids, mask) = tiny.prompt(), tiny.batch()
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model.generate(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=tiny.PAD,
        )
    assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))


def test_second_block_with_another_prompt_forgets_the_first(tiny, model, bare):
    ids, mask = tiny.batch()
    patch_model(model)
    for seed in (1, 2, 1):
        front = tiny.prompt(4 + seed, seed=seed)
        with use_prefix(model, PrefixKV.prefill(model, front)):
            got = tiny.generate(model, ids, mask)
        assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))


def test_prefill_under_another_prefix_ignores_it(tiny, model):
    front = tiny.prompt()
    alone = PrefixKV.prefill(model, front)
    with use_prefix(model, tiny.random_kv(model)):
        within = PrefixKV.prefill(model, front)
    for one, other in zip(alone.keys + alone.values, within.keys + within.values, strict=True):
        assert torch.equal(one, other)
