"""Threads: what one opens, disables, patches or restores is no other thread's affair."""

from __future__ import annotations

import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from transformers import TextStreamer

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    patch_model,
    unpatch_model,
    use_prefix,
)
from fastprefix.hf.patch.patch import is_patched
from fastprefix.hf.patch.threads import ACTIVE

EXACT = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def elsewhere():
    """Runs a function in another thread; its result, or its exception, is handed back."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(120)


@contextlib.contextmanager
def meanwhile(function):
    """A function's context is open in another thread while the block runs."""
    opened, done = threading.Event(), threading.Event()

    def hold():
        with function():
            opened.set()
            assert done.wait(120)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        try:
            assert opened.wait(120), held.result(1)
            yield
        finally:
            done.set()
            held.result(120)


def logits(model, **options):
    ids, mask = tiny.batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits


def prefix_tuned(*more):
    config = PrefixConfig(num_virtual_tokens=4, init_std=1.0, task_type="CAUSAL_LM")
    tuned = PrefixTuningModel(tiny.build(), config)
    for name in more:
        tuned.add_adapter(name, config)
    return tuned.eval()


# What is a thread's own.


def test_disable_adapter_disables_in_its_thread_alone(elsewhere):
    """It took the prefix from most forwards of another thread."""
    tuned = prefix_tuned()
    behind, plain = logits(tuned), logits(tuned.base_model)
    with tuned.disable_adapter():
        assert torch.equal(elsewhere(logits, tuned), behind)
        assert torch.equal(logits(tuned), plain)
        with tuned.disable_adapter():
            pass
        assert torch.equal(logits(tuned), plain)
    with meanwhile(tuned.disable_adapter):
        assert torch.equal(logits(tuned), behind)
        mixed = logits(tuned, prefix_names=["default", None, "default"])
        torch.testing.assert_close(mixed[::2], behind[::2], **EXACT)
    assert torch.equal(logits(tuned), behind)


def test_a_disabled_adapter_beside_a_thread_that_generates():
    """It was refused: "a use_prefix block is open in another thread"."""
    tuned = prefix_tuned()
    ids, mask = tiny.batch()
    plain, behind = logits(tuned.base_model), logits(tuned)
    base = tiny.generate(tuned.base_model, ids, mask)
    nobody = [None] * len(ids)
    with meanwhile(lambda: use_prefix(tuned.base_model, tuned.export())):
        with tuned.disable_adapter():
            assert torch.equal(logits(tuned), plain)
            assert torch.equal(tiny.generate(tuned, ids, mask), base)
        assert torch.equal(logits(tuned, prefix_names=nobody), plain)
        assert torch.equal(tiny.generate(tuned, ids, mask, prefix_names=nobody), base)
        assert torch.equal(logits(tuned), behind)


def test_a_prompt_beside_a_thread_that_generates(architecture):
    """Its forward feeds embeddings, and wants no prefix of anybody's."""
    config = PromptConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    tuned = PromptTuningModel(tiny.build(architecture), config).eval()
    ids, mask = tiny.batch()
    expected, text = logits(tuned), tiny.generate(tuned, ids, mask)
    with meanwhile(lambda: use_prefix(tuned.base_model, tuned.export())):
        torch.testing.assert_close(logits(tuned), expected, **EXACT)
        assert torch.equal(tiny.generate(tuned, ids, mask), text)
    assert not is_patched(tuned.base_model)


def test_set_adapter_leaves_a_generation_that_has_begun(elsewhere):
    tuned = prefix_tuned("other")
    ids = tiny.prompt(4)
    first = tiny.generate(tuned, ids)
    tuned.set_adapter("other")
    second = tiny.generate(tuned, ids)
    assert not torch.equal(first, second)

    class Streamer(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            elsewhere(tuned.set_adapter, "default")

        def end(self):
            pass

    assert torch.equal(tiny.generate(tuned, ids, streamer=Streamer()), second)
    assert torch.equal(tiny.generate(tuned, ids), first)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_exporting_does_not_end_the_training_of_another_thread(kind):
    """Evaluation mode was set on the encoder itself, and two threads could leave it there."""
    config = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    if kind == "prefix":
        tuned = PrefixTuningModel(
            tiny.build(), PrefixConfig(**config, prefix_projection=True, dropout=0.9)
        )
    else:
        config["encoder_reparameterization_type"] = "LSTM"
        tuned = PromptTuningModel(
            tiny.build(), PromptConfig(**config, encoder_dropout=0.5, encoder_num_layers=2)
        )
    tuned.train()
    modes = []
    tuned.encoder.register_forward_hook(
        lambda module, args, output: modes.append((module.training, tuned.encoder.training))
    )
    one, other = tuned.export(), tuned.export()
    assert modes == [(False, True)] * 2
    assert all(torch.equal(*pair) for pair in zip(one.keys, other.keys, strict=True))
    assert all(module.training for module in tuned.encoder.modules())


# Patching and restoring while other threads are in the middle of a call.


class Pause:
    """Stops a thread's forward behind the first layer, until it is told to go on."""

    def __init__(self, model):
        self.reached, self.go_on = threading.Event(), threading.Event()
        layers = model.model.layers if hasattr(model, "model") else model.transformer.h
        self.handle = layers[0].register_forward_hook(self)

    def __call__(self, *_):
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.go_on.wait(120)


def chunks(model):
    """Two calls over one cache, the second of several tokens, with padding: masks of all kinds."""
    ids, mask = tiny.batch()
    with torch.no_grad():
        begun = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
        rest = model(ids[:, 3:], attention_mask=mask, past_key_values=begun.past_key_values)
    return rest.logits


@pytest.mark.parametrize("forward", [logits, chunks])
def test_a_forward_that_began_in_a_block_ends_behind_it(model, forward):
    """Its masks were ours and the attention that read them no longer."""
    expected = forward(model)
    pause = Pause(model)
    with ThreadPoolExecutor(1) as pool:
        with use_prefix(model, None):
            running = pool.submit(forward, model)
            assert pause.reached.wait(120)
        assert is_patched(model)
        pause.go_on.set()
        torch.testing.assert_close(running.result(120), expected, **EXACT)
    pause.handle.remove()
    assert not is_patched(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("how", ["use_prefix", "patch_model"])
def test_a_forward_that_began_before_ends_in_a_patched_model(model, how):
    """The probe took its layers for some that get no prefix, and refused the model."""
    expected = chunks(model)
    pause, ended = Pause(model), threading.Event()

    def let_it_end(*_):
        if threading.current_thread() is threading.main_thread():
            pause.go_on.set()
            assert ended.wait(120)

    last = (model.model.layers if hasattr(model, "model") else model.transformer.h)[-1]
    handle = last.register_forward_hook(let_it_end)  # in the middle of the probe
    ids, mask = tiny.batch()

    def work():
        try:
            with torch.no_grad():
                return model(ids, attention_mask=mask).logits
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        assert pause.reached.wait(120)
        if how == "patch_model":
            patch_model(model)
        else:
            PrefixKV.prefill(model, tiny.prompt())
        got = running.result(120)
    handle.remove()
    pause.handle.remove()
    if how == "patch_model":
        unpatch_model(model)
    torch.testing.assert_close(got, logits(model), **EXACT)
    assert torch.equal(chunks(model), expected)


def test_a_forward_does_not_begin_in_the_middle_of_a_probe(model):
    """It would get masks of one attention and layers of the other."""
    expected = logits(model)
    started, found = threading.Event(), []

    def run():
        started.set()
        found.append(logits(model))

    thread = threading.Thread(target=run)

    def start(*_):
        if not started.is_set() and threading.current_thread() is not thread:
            thread.start()
            assert started.wait(120)
            thread.join(0.3)
            assert not found

    handle = model.get_input_embeddings().register_forward_hook(start)
    patch_model(model)
    thread.join(120)
    handle.remove()
    torch.testing.assert_close(found[0], expected, **EXACT)


def test_a_block_keeps_its_prefix_when_another_thread_unpatches_the_model(model, elsewhere):
    kv = tiny.random_kv(model)
    plain = logits(model)
    patch_model(model)
    with use_prefix(model, kv):
        behind = logits(model)
        elsewhere(unpatch_model, model)
        assert torch.equal(logits(model), behind)
    assert not is_patched(model)
    assert torch.equal(logits(model), plain)
    with meanwhile(lambda: use_prefix(model, kv)):
        unpatch_model(model)
        patch_model(model)  # for good, whoever ends first
    assert is_patched(model)
    with use_prefix(model, kv):
        assert torch.equal(logits(model), behind)


@pytest.mark.parametrize("lasting", [False, True])
def test_threads_start_and_end_blocks_as_they_like(lasting):
    model = tiny.build()
    if lasting:
        patch_model(model)
    prefixes = [tiny.random_kv(model, 2 + n, seed=n) for n in range(3)]
    ids = tiny.prompt(5)
    before = set(vars(ACTIVE))
    expected = []
    for kv in prefixes:
        with use_prefix(model, kv), torch.no_grad():
            expected.append(model(ids).logits)

    def work(number):
        for _ in range(20):
            with use_prefix(model, prefixes[number]), torch.no_grad():
                if not torch.equal(model(ids).logits, expected[number]):
                    return False
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert is_patched(model) is lasting
    assert vars(ACTIVE).keys() == before, "nothing is left of the blocks"


def test_eight_threads_a_thousand_generations():
    """Four with blocks of their own, four with adapters of one tuned model, all on one base."""
    base = tiny.build(num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    config = PrefixConfig(num_virtual_tokens=3, init_std=1.0, task_type="CAUSAL_LM")
    tuned = PrefixTuningModel(base, config, adapter_name="4").eval()
    for name in "567":
        tuned.add_adapter(name, config)
    prefixes = [tiny.random_kv(base, 2 + number, seed=number) for number in range(4)]
    ids = tiny.prompt(3)
    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}

    def once(number):
        mask = torch.ones_like(ids)
        if number >= 4:
            names = [str(number)]
            return tuned.generate(ids, attention_mask=mask, prefix_names=names, **settings)
        with use_prefix(base, prefixes[number]):
            return base.generate(ids, attention_mask=mask, **settings)

    def scores(number):
        """Tokens of two prefixes may be the same; what they are drawn from is not."""
        with torch.no_grad():
            if number >= 4:
                return tuned(ids, prefix_names=[str(number)]).logits
            with use_prefix(base, prefixes[number]):
                return base(ids).logits

    texts = [once(number) for number in range(8)]
    expected = [scores(number) for number in range(8)]
    assert all(not torch.equal(expected[i], expected[j]) for i in range(8) for j in range(i))

    def work(number, count):
        wrong = 0
        for _ in range(count):
            wrong += not torch.equal(once(number), texts[number])
            wrong += not torch.equal(scores(number), expected[number])
        return wrong

    def all_of_them(count):
        with ThreadPoolExecutor(8) as pool:
            wrong = sum(pool.map(work, range(8), [count] * 8))
        gc.collect()
        tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        return wrong, tensors, psutil.Process().memory_info().rss

    first = all_of_them(25)
    second = all_of_them(100)
    assert (first[0], second[0]) == (0, 0)
    assert second[1] <= first[1] + 8
    assert second[2] - first[2] < 48 * 2**20
