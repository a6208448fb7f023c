"""generate() with a prefix gives the ids of the prompt and the text in one sequence."""

import contextlib
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    OPTConfig,
    QuantizedCache,
    StaticCache,
    TextStreamer,
    cache_utils,
    set_seed,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.continuous_batching import PagedAttentionCache

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "several of each": {"do_sample": True, "num_return_sequences": 2},
    "prompt in chunks": {"prefill_chunk_size": 3},
    "prompt in chunks, static cache": {"prefill_chunk_size": 3, "cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(7, 4, 1), (5, 5)], ids=["left padded", "no padding"])
def test_ids_equal_the_concatenation(model, bare, mode, lengths):
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
def test_ids_equal_whatever_the_attention_was_before(architecture, attention):
    model, bare = (tiny.build(architecture, attn_implementation=attention) for _ in range(2))
    front, (ids, mask) = tiny.prompt(), tiny.batch()
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask)
    assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("mode", ["greedy", "static cache"])
def test_a_row_of_a_batch_gets_what_it_gets_alone(model, mode):
    ids, mask = tiny.batch()
    kv = PrefixKV.prefill(model, tiny.prompt())
    with use_prefix(model, kv):
        together = tiny.generate(model, ids, mask, **MODES[mode])
        for row in range(len(ids)):
            text = ids[row][mask[row].bool()][None]
            assert torch.equal(tiny.generate(model, text, **MODES[mode]), together[row : row + 1])


def test_prompt_lookup_gives_greedy_ids(model, bare):
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


@pytest.mark.parametrize("own", [True, False], ids=["its own prefix", "no prefix"])
def test_assisted_gives_greedy_ids(model, bare, own):
    """An assistant with the prompt as its prefix saves as many steps as one that reads it."""
    assistant, reader = (tiny.build(model.config.model_type) for _ in range(2))
    front, text = tiny.prompt(), tiny.prompt(6, seed=5)
    full = torch.cat([front, text], 1)
    expected = tiny.generate(bare, full)
    kv, steps = PrefixKV.prefill(model, front), {}
    for side in (model, bare):
        side.register_forward_hook(lambda m, *_: steps.update({m: steps.get(m, 0) + 1}))
    assert torch.equal(tiny.generate(bare, full, assistant_model=reader), expected)
    with contextlib.ExitStack() as blocks:
        blocks.enter_context(use_prefix(model, kv))
        if own:
            blocks.enter_context(use_prefix(assistant, kv))
        steps[model] = 0  # patching runs the model
        got = tiny.generate(model, text, assistant_model=assistant)
    assert torch.equal(got, expected)
    assert (steps[model] == steps[bare]) == own


def test_an_early_exit_of_the_model_itself_assists():
    """The first layers guess, on the prefix's first layers."""
    model, bare = tiny.build(), tiny.build()
    front, text = tiny.prompt(), tiny.prompt(6, seed=5)
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, text, assistant_early_exit=2)
    assert torch.equal(got, tiny.generate(bare, torch.cat([front, text], 1)))


class Behind(CacheLayerMixin):
    """A layer of a cache, and copies of a prefix in front of what it returns: the oracle."""

    def __init__(self, layer, key, value):
        super().__init__()
        self.layer, self.front = layer, (key, value)

    def update(self, key, value, *args, **kwargs):
        held = self.layer.update(key, value, *args, **kwargs)
        rows = len(key)
        return tuple(
            torch.cat([x.expand(rows, -1, -1, -1), y], 2)
            for x, y in zip(self.front, held, strict=True)
        )

    def get_mask_sizes(self, length):
        return self.get_seq_length() + length, 0

    def get_seq_length(self):
        return self.layer.get_seq_length() + self.front[0].shape[1]

    def get_max_length(self):
        return -1

    def lazy_initialization(self, *_):
        pass


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_a_quantized_cache_holds_the_text_alone(model, bare, backend):
    """So the prefix is not rounded. The oracle keeps it in front of such a cache."""
    config = {"backend": backend}
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this release of transformers has no class of this kind")
    if backend == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        config |= {"nbits": 4, "q_group_size": 16, "residual_length": 4}
    (ids, mask), kv = tiny.batch(), PrefixKV.prefill(model, tiny.prompt())
    with use_prefix(model, kv):
        got = tiny.generate(model, ids, mask, cache_implementation="quantized", cache_config=config)
        exact = tiny.generate(model, ids, mask)
    cache = QuantizedCache(config=bare.config, **config)
    pairs = zip(cache.layers, kv.keys, kv.values, strict=True)
    cache.layers = [Behind(*pair) for pair in pairs]
    front = mask.new_ones(len(mask), kv.num_virtual_tokens)
    places, expected, step = tiny.positions(mask) + kv.position_offset, [], ids
    for _ in range(got.shape[1]):
        options = {"attention_mask": torch.cat([front, mask], 1), "past_key_values": cache}
        with torch.no_grad():
            step = bare(step, position_ids=places, **options).logits[:, -1:].argmax(-1)
        expected.append(step)
        mask, places = torch.cat([mask, torch.ones_like(step)], 1), places[:, -1:] + 1
    assert torch.equal(got, torch.cat(expected, 1))
    assert not torch.equal(got, exact), "nothing was quantized"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading a cache needs a CUDA device")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache(model, bare, implementation):
    model, bare = model.cuda(), bare.cuda()
    front, (ids, mask) = tiny.prompt(), tiny.batch()
    expected = tiny.generate(bare, *(x.cuda() for x in tiny.concatenate(front, ids, mask)))
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids.cuda(), mask.cuda(), cache_implementation=implementation)
    assert torch.equal(got, expected)


class Ids(TextStreamer):
    """A streamer without a tokenizer."""

    def __init__(self):
        self.found = []

    def put(self, value):
        self.found.append(value.reshape(-1))

    def end(self):
        self.found = torch.cat(self.found)


def test_streaming(model, bare):
    """In this thread, in a thread with its own block, and in a thread that forgot the block."""
    front, text = tiny.prompt(), tiny.prompt(6, seed=5)
    kv = PrefixKV.prefill(model, front)
    expected = tiny.generate(bare, torch.cat([front, text], 1))[0]
    streamer = Ids()
    with use_prefix(model, kv):
        tiny.generate(model, text, streamer=streamer)
    assert torch.equal(streamer.found, torch.cat([text[0], expected]))

    def work(streamer, errors, *prefix):
        try:
            with contextlib.ExitStack() as blocks:
                for one in prefix:
                    blocks.enter_context(use_prefix(model, one))
                tiny.generate(model, text, streamer=streamer)
        except RuntimeError as error:
            errors.append(str(error))

    with use_prefix(model, kv):
        for prefix in [(kv,), ()]:
            streamer, errors = Ids(), []
            thread = threading.Thread(target=work, args=(streamer, errors, *prefix), daemon=True)
            thread.start()
            thread.join(60)
            if prefix:
                assert not errors
                assert torch.equal(streamer.found, torch.cat([text[0], expected]))
            else:
                assert "use_prefix" in errors[0]


def test_continuous_batching_is_refused(model):
    """Its cache is paged; never without the prefix, whenever it was started."""
    patch_model(model)
    with use_prefix(model, tiny.random_kv(model)):
        with pytest.raises(ValueError, match=r"fastprefix.* is not supported"):
            model.generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=2, eos_token_id=-1))
        with pytest.raises(NotImplementedError, match="continuous batching"):
            model(tiny.prompt(), cache=object.__new__(PagedAttentionCache))
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model(tiny.prompt(), cache=object.__new__(PagedAttentionCache))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_no_more_tokens_than_learned_positions(name):
    """The model generates as many as there are behind the prefix."""

    def build():
        if name == "gpt2":
            return tiny.build(name, n_positions=24)
        sizes = {"hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32, "init_std": 0.15}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": tiny.VOCAB}
        return tiny.from_config(OPTConfig(**sizes, max_position_embeddings=24, eos_token_id=None))

    model, bare = build(), build()
    front, (ids, mask) = tiny.prompt(9), tiny.batch((7, 4))
    full = tiny.concatenate(front, ids, mask)
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask, max_new_tokens=9)
        with pytest.raises(ValueError, match=r"got 9, which moves .* to position 24"):
            tiny.generate(model, ids, mask, max_new_tokens=10)
        with pytest.raises(ValueError, match=r"got 9, which moves .* to position 24"):
            model(ids[:, :2], position_ids=torch.tensor([[14, 15]]))
    assert torch.equal(got, tiny.generate(bare, *full, max_new_tokens=9))


def test_rotary_positions_have_no_end():
    model = tiny.build(max_position_embeddings=16)
    with use_prefix(model, tiny.random_kv(model)):
        model(tiny.prompt(20))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)], ids=["no padding", "left padded"])
def test_a_chat_of_three_turns_over_one_cache(model, bare, lengths, kind):
    front, (ids, mask) = tiny.prompt(), tiny.batch(lengths)

    def chat(m, ids, mask):
        options = {"max_cache_len": 60} if kind is StaticCache else {}
        cache, said = kind(config=m.config, **options), []
        for turn in range(3):
            answer = tiny.generate(m, ids, mask, past_key_values=cache, max_new_tokens=5)
            more = torch.cat([tiny.prompt(3, seed=7 + turn), tiny.prompt(3, seed=17 + turn)])
            ids = torch.cat([ids, answer, more], 1)
            mask = torch.cat([mask, torch.ones_like(ids)[:, mask.shape[1] :]], 1)
            said.append(answer)
        return torch.cat(said, 1), int(cache.get_seq_length())

    kv = PrefixKV.prefill(model, front)
    with use_prefix(model, kv):
        said, held = chat(model, ids, mask)
    expected, held_plain = chat(bare, *tiny.concatenate(front, ids, mask))
    assert torch.equal(said, expected)
    assert held == held_plain - kv.num_virtual_tokens, "the cache holds the text alone"


def test_generate_from_inputs_embeds(model, bare):
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


def test_second_block_with_another_prompt_forgets_the_first(model, bare):
    ids, mask = tiny.batch()
    patch_model(model)
    for seed in (1, 2, 1):
        front = tiny.prompt(4 + seed, seed=seed)
        with use_prefix(model, PrefixKV.prefill(model, front)):
            got = tiny.generate(model, ids, mask)
        assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))


def test_prefill_under_another_prefix_ignores_it(model):
    front = tiny.prompt()
    alone = PrefixKV.prefill(model, front)
    with use_prefix(model, tiny.random_kv(model)):
        within = PrefixKV.prefill(model, front)
    for one, other in zip(alone.keys + alone.values, within.keys + within.values, strict=True):
        assert torch.equal(one, other)
