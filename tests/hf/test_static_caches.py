"""Static caches: layers get the number of keys in use, and no mask over the whole buffer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, LlamaConfig
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.attention.selection import BACKENDS
from fastprefix.hf.layer import call as layer_call
from fastprefix.hf.layer import masks
from fastprefix.hf.layer.buffered import is_packed, pack, unpack
from fastprefix_testing.launchers import interpreted

FULL = ["llama", "gpt2"]
WINDOWED = ["mistral", "gemma3", "gpt_oss", "qwen2"]


def build(name: str) -> Any:
    """A tiny model; those with windows have windows of 8."""
    return tiny.build(name) if name in FULL else tiny.windowed(name)


@pytest.fixture
def calls(monkeypatch):
    """The options of each call of the operator by a layer, with the number of keys and queries."""
    made = []
    real = layer_call.attention_with_options

    def run(query, key, value, prefix_key, prefix_value, options, *others):
        made.append((query.shape[2], key.shape[2], options))
        return real(query, key, value, prefix_key, prefix_value, options, *others)

    monkeypatch.setattr(layer_call, "attention_with_options", run)
    return made


@pytest.mark.parametrize("name", FULL + WINDOWED)
@pytest.mark.parametrize("lengths", [(7, 4, 1), (12, 12)], ids=["left padded", "no padding"])
@pytest.mark.parametrize("prefix", ["prompt", "no prefix"])
def test_no_layer_gets_a_mask_of_queries_and_keys(calls, name, lengths, prefix):
    """And the ids are those of the concatenation, or of the model without us."""
    model, bare = build(name), build(name)
    ids, mask = tiny.batch(lengths)
    full, full_mask = ids, mask
    kv = None
    if prefix == "prompt":
        front = tiny.prompt(12)
        full, full_mask = tiny.concatenate(front, ids, mask)
        kv = PrefixKV.prefill(model, front)
    expected = tiny.generate(bare, full, full_mask, max_new_tokens=12)
    with use_prefix(model, kv):
        calls.clear()
        got = tiny.generate(model, ids, mask, max_new_tokens=12, cache_implementation="static")
    assert torch.equal(got, expected)
    assert all(options.attn_mask is None for _, _, options in calls)
    assert all(options.is_causal for _, _, options in calls)
    buffers = [options for _, keys, options in calls if keys == ids.shape[1] + 11]
    if name == "mistral":  # whose layers all have a window, and no buffer of that size
        assert not buffers
        return
    in_use = {tuple(options.key_lengths.tolist()) for options in buffers}
    assert in_use == {(ids.shape[1] + step,) * len(ids) for step in range(12)}
    assert {options.key_padding_mask is None for options in buffers} == {bool(mask.all())}


@interpreted
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_kernels_get_no_mask_either(calls, name):
    model, bare = build(name), build(name)
    front, (ids, mask) = tiny.prompt(), tiny.batch((7, 4))
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    expected = tiny.generate(bare, *tiny.concatenate(front, ids, mask), **options)
    patch_model(model, backend="triton")
    with use_prefix(model, PrefixKV.prefill(model, front)):
        calls.clear()
        got = tiny.generate(model, ids, mask, **options, cache_implementation="static")
    assert torch.equal(got, expected)
    assert all(options.attn_mask is None for _, _, options in calls)
    assert any(options.key_lengths is not None for _, _, options in calls)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_compiled_once_as_generate_does(name):
    """The model is compiled at the first new token, and not again while the text grows.

    A sliding layer of transformers' static cache counts in a Python integer, which the compiler
    takes for a constant until it changes: such a model, ours or not, is compiled once more.
    """
    model, bare = build(name), build(name)
    front, (ids, mask) = tiny.prompt(), tiny.batch((12, 9, 5))
    expected = tiny.generate(bare, *tiny.concatenate(front, ids, mask))
    patch_model(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):  # generate() copies the configuration, but no function
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    compiled = []

    def count(ids, scores):
        compiled.append(len(graphs))
        return scores

    options = {
        "cache_implementation": "static",
        "compile_config": compile_config,
        "logits_processor": [count],
    }
    with use_prefix(model, PrefixKV.prefill(model, front)):
        assert torch.equal(tiny.generate(model, ids, mask, **options), expected)
    assert compiled[0] == 0  # the prompt is not compiled
    steady = 1 if name in FULL else 2
    assert 0 < compiled[steady] == compiled[-1]
    torch._dynamo.reset()


def test_compiled_with_its_masks_inside():
    """A forward that makes its masks in the graph, over a static cache, step by step."""
    from transformers import StaticCache

    model = patch_model(tiny.build("llama"))
    text = tiny.prompt(12)
    kv = PrefixKV.prefill(model, tiny.prompt())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with use_prefix(model, kv), torch.no_grad():
        expected = model(text, use_cache=False).logits
        frames, found = [], [model(text[:, :6], past_key_values=cache).logits]
        for step in range(6, 12):
            found.append(compiled(text[:, step : step + 1], past_key_values=cache).logits)
            frames.append(counter.frame_count)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-3, atol=1e-3)
    assert 0 < frames[0] == frames[-1]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_backends_that_need_masks_get_them(calls, name, monkeypatch):
    """Without key_lengths everything is as with any other mask."""
    for backend in BACKENDS.values():
        without = backend.features - {"key_lengths"}
        monkeypatch.setitem(vars(backend), "features", without)
    model, bare = build(name), build(name)
    front, (ids, mask) = tiny.prompt(), tiny.batch((12, 9, 5))
    expected = tiny.generate(bare, *tiny.concatenate(front, ids, mask))
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask, cache_implementation="static")
    assert torch.equal(got, expected)
    assert all(options.key_lengths is None for _, _, options in calls)
    assert any(options.attn_mask is not None for _, _, options in calls)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_named_backend_that_needs_masks_gets_them(calls, name, monkeypatch):
    """Masks are packed if the default backend can do it; the layers unpack them for another."""
    monkeypatch.setattr("fastprefix.hf.layer.windows.has_feature", lambda *_: False)
    model, bare = build(name), build(name)
    front, (ids, mask) = tiny.prompt(), tiny.batch((12, 9, 5))
    expected = tiny.generate(bare, *tiny.concatenate(front, ids, mask))
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask, cache_implementation="static")
    assert torch.equal(got, expected)
    assert all(options.key_lengths is None for _, _, options in calls)


def test_mixed_rows():
    model, bare = tiny.build(), tiny.build()
    fronts = {"a": tiny.prompt(5, seed=1), "b": tiny.prompt(9, seed=2)}
    kv = {name: PrefixKV.prefill(model, front) for name, front in fronts.items()}
    ids, mask = tiny.batch((7, 4, 3))
    rows = ["b", None, "a"]
    with use_prefix(model, kv, rows=rows):
        got = tiny.generate(model, ids, mask, cache_implementation="static")
    for row, name in enumerate(rows):
        text = ids[row][mask[row].bool()][None]
        full = text if name is None else torch.cat([fronts[name], text], 1)
        assert torch.equal(got[row : row + 1], tiny.generate(bare, full))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_patched_model(calls, copied, picklable):
    model = copied(patch_model(tiny.build()))
    calls.clear()
    tiny.generate(model, tiny.prompt(), cache_implementation="static")
    assert all(options.key_lengths is not None for _, _, options in calls)
    assert all(options.key_padding_mask is None for _, _, options in calls)


STANDARD = {"batch_size": 2, "q_length": 1, "kv_length": 9, "q_offset": torch.tensor(3)}


class TestMasks:
    def make(self, own_use=False, **request):
        config = LlamaConfig()
        config.sliding_window = request.pop("sliding_window", None)
        masks.add_patched(config, own_use)
        made = masks.prefix_attention_mask(**request, config=config, device="cpu")
        return made, sdpa_mask(
            **{**request, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
            device="cpu",
        )

    @settings(max_examples=60)
    @given(data=st.data())
    def test_a_packed_mask_says_what_the_dense_one_says(self, data):
        Lq, past, free = (data.draw(st.integers(low, 9)) for low in (1, 0, 0))
        start = data.draw(st.integers(0, past))
        window = data.draw(st.sampled_from([None, 1, 3, 20]))
        B, Lk = 2, past + Lq + free - start
        offset = torch.tensor(past) if data.draw(st.booleans()) else past
        padding = None
        if data.draw(st.booleans()):
            columns = data.draw(st.integers(1, past + Lq + free + 2))
            real = data.draw(st.lists(st.booleans(), min_size=B * columns, max_size=B * columns))
            padding = torch.tensor(real).reshape(B, columns)
        function = causal_mask_function
        if window is not None:
            function = sliding_window_causal_mask_function(window)
        made, dense = self.make(
            batch_size=B, q_length=Lq, kv_length=Lk, q_offset=offset, kv_offset=start,
            mask_function=function, attention_mask=padding, local_size=window,
            allow_is_causal_skip=Lq > 1 or data.draw(st.booleans()), sliding_window=window,
        )  # fmt: skip
        if not is_packed(made):  # nothing to say, or padding of keys that end with the queries
            assert window is None
            assert free == start == 0
            assert made is None or torch.equal(made, padding)
            return
        buffered = unpack(made, Lk)
        assert buffered.key_lengths.tolist() == [past + Lq - start] * B
        assert buffered.windowed == (window is not None)
        query = torch.empty(B, 1, Lq, 1)
        assert torch.equal(buffered.dense(query, Lk, window), dense.expand(B, 1, Lq, Lk))

    @pytest.mark.parametrize("allowed", [True, False])
    def test_models_that_use_their_masks_get_them_whole(self, allowed):
        made, dense = self.make(**STANDARD, own_use=True, allow_is_causal_skip=allowed)
        assert torch.equal(made, dense)

    @pytest.mark.parametrize(
        "function",
        [
            chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
            lambda *places: sliding_window_causal_mask_function(4)(*places),
            sliding_window_causal_mask_function(5),  # not the window of the config
        ],
    )
    def test_what_is_not_standard_stays_a_mask(self, function):
        made, dense = self.make(**STANDARD, mask_function=function, local_size=4, sliding_window=4)
        assert torch.equal(made, dense)

    @pytest.mark.parametrize(("device", "packed"), [("cuda", True), ("meta", False)])
    def test_other_devices(self, device, packed):
        """Where there is no default backend, masks stay what they were."""
        request = {**STANDARD, "q_offset": 3, "mask_function": causal_mask_function}
        config = LlamaConfig()
        masks.add_patched(config, own_use=False)
        request = {**request, "kv_offset": 0, "config": config, "device": device}
        assert masks._may_be_packed(request, True) == packed

    def test_queries_ahead_of_the_keys(self):
        made, dense = self.make(**{**STANDARD, "q_offset": 9})
        assert torch.equal(made, dense)

    @pytest.mark.parametrize("windowed", [True, False])
    @pytest.mark.parametrize("Lk", [1, 4, 5, 8, 13])
    def test_packing(self, windowed, Lk):
        lengths = torch.tensor([0, Lk], dtype=torch.int32)
        padding = torch.rand(2, Lk) < 0.5
        for pads in (padding, None):
            mask = pack(lengths, pads, windowed)
            assert is_packed(mask)
            found = unpack(mask.contiguous(), Lk)
            assert torch.equal(found.key_lengths, lengths)
            assert found.windowed == windowed
            if pads is None:
                assert found.key_padding_mask is None
            else:
                assert torch.equal(found.key_padding_mask, pads)
        with pytest.raises(ValueError, match="columns for a layer of"):
            unpack(pack(lengths, padding, windowed), Lk + 8)

    def test_what_is_no_packed_mask(self):
        assert not any(
            is_packed(x)
            for x in (None, torch.ones(2, 3), torch.ones(1, 1, 1, 4), torch.ones(1, 1, 2, 2) > 0)
        )


def test_the_probe_sees_that_a_model_uses_its_masks(calls, monkeypatch):
    from transformers.models.llama import modeling_llama

    real = modeling_llama.create_causal_mask
    monkeypatch.setattr(
        modeling_llama,
        "create_causal_mask",
        lambda *a, **k: real(*a, **k, allow_is_causal_skip=False),
    )
    model = patch_model(tiny.build(), check=False)
    calls.clear()
    tiny.generate(model, tiny.prompt(), cache_implementation="static", max_new_tokens=3)
    decoding = [options for queries, _, options in calls if queries == 1]
    assert decoding
    assert all(options.key_lengths is None for options in decoding)
