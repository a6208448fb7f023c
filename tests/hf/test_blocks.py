"""use_prefix blocks: nested, left by an exception, in threads, and on models that share things."""

import contextlib
import copy
import threading

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import patch_model, unpatch_model, use_prefix
from fastprefix.hf import is_patched


@pytest.fixture
def text():
    return tiny.batch()


@pytest.fixture
def logits(text):
    """Logits of the text's real tokens, under whatever is active."""
    ids, mask = text

    def run(model):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]

    return torch.no_grad()(run)


@pytest.fixture
def alone(logits):
    """Logits with one prefix, in a block of its own."""

    def run(model, kv):
        with use_prefix(model, kv):
            return logits(model)

    return run


@pytest.fixture(params=[True, False], ids=["patched before", "patched by the block"])
def maybe_patched(request, model):
    return patch_model(model) if request.param else model


def test_a_block_within_a_block_replaces_the_prefix(maybe_patched, alone, logits):
    model = maybe_patched
    one, other = tiny.random_kv(model, 3, seed=1), tiny.random_kv(model, 5, seed=2)
    first, second = alone(model, one), alone(model, other)
    assert not torch.allclose(first, second)
    with use_prefix(model, one):
        assert torch.equal(logits(model), first)
        with use_prefix(model, other):
            assert torch.equal(logits(model), second)
        assert torch.equal(logits(model), first)


def test_an_exception_ends_the_block_and_goes_on(maybe_patched, bare, alone, logits):
    model, was = maybe_patched, is_patched(maybe_patched)
    outer, inner = tiny.random_kv(model, 3, seed=1), tiny.random_kv(model, 5, seed=2)
    expected = alone(model, outer)
    with use_prefix(model, outer):
        with pytest.raises(KeyError, match="mine"), use_prefix(model, inner):
            raise KeyError("mine")
        assert torch.equal(logits(model), expected)
    with pytest.raises(KeyError, match="mine"), use_prefix(model, inner):
        raise KeyError("mine")
    assert is_patched(model) == was
    torch.testing.assert_close(logits(model), logits(bare), rtol=1e-4, atol=1e-4)


def test_a_refused_prefix_changes_nothing(maybe_patched, alone, logits):
    model, was = maybe_patched, is_patched(maybe_patched)
    kv = tiny.random_kv(model)
    expected = alone(model, kv)
    with pytest.raises(TypeError), use_prefix(model, "a prefix"):
        pass
    assert is_patched(model) == was
    with use_prefix(model, kv):
        with pytest.raises(TypeError), use_prefix(model, "a prefix"):
            pass
        assert torch.equal(logits(model), expected)


def test_the_prefix_ends_with_the_block(model, alone, logits):
    patch_model(model)
    before = logits(model)
    alone(model, tiny.random_kv(model))
    assert torch.equal(logits(model), before)


def test_two_threads_run_two_prefixes_on_one_model(model, alone, logits):
    patch_model(model)
    prefixes = [tiny.random_kv(model, 3 + seed, seed=seed) for seed in range(2)]
    expected = [alone(model, kv) for kv in prefixes]
    turn = threading.Barrier(3, timeout=60)
    wrong = []

    def work(kv, want):
        for _ in range(5):
            with use_prefix(model, kv):
                turn.wait()  # both blocks are open now
                if not torch.equal(logits(model), want):
                    wrong.append(kv)
                turn.wait()

    threads = [
        threading.Thread(target=work, args=pair, daemon=True)
        for pair in zip(prefixes, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    plain = []
    for _ in range(5):
        turn.wait()
        with use_prefix(model, None):  # this thread wants none
            plain.append(logits(model))
        turn.wait()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert all(torch.equal(one, plain[0]) for one in plain)
    assert torch.equal(plain[0], logits(model))


def test_a_thread_in_no_block_is_refused_while_another_has_a_prefix(model, alone, logits):
    """It may have been started for that block, as streamers have it: it would lose the prefix."""
    patch_model(model)
    kv = tiny.random_kv(model)
    expected, plain, found = alone(model, kv), logits(model), {}

    def work(name, *block):
        def run():
            try:
                with contextlib.ExitStack() as stack:
                    for prefix in block:
                        stack.enter_context(use_prefix(model, prefix))
                    found[name] = logits(model)
            except RuntimeError as error:
                found[name] = str(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(60)

    with use_prefix(model, kv):
        work("no block")
        work("the decoder's own thread", kv)
        work("none wanted", None)
        with use_prefix(model, None):
            work("behind a block of none")
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), expected)
    work("after the block")
    with use_prefix(model, None):
        work("beside a block of none")
    assert "use_prefix(model, kv)" in found.pop("no block")
    assert "use_prefix(model, kv)" in found.pop("behind a block of none")
    assert torch.equal(found.pop("the decoder's own thread"), expected)
    assert len(found) == 3
    assert all(torch.equal(one, plain) for one in found.values())


def test_a_thread_keeps_its_prefix_when_another_ends_the_block_that_patched(model, alone, logits):
    """The block that patches an unpatched model must not restore it under another's feet."""
    kv = tiny.random_kv(model)
    expected = alone(model, kv)
    opened, joined, closed = (threading.Event() for _ in range(3))

    def first():
        with use_prefix(model, kv):
            opened.set()
            joined.wait(60)
        closed.set()

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    opened.wait(60)
    with use_prefix(model, kv):
        joined.set()
        closed.wait(60)
        got = logits(model)
    thread.join(60)
    torch.testing.assert_close(got, expected)


def test_two_models_in_nested_blocks(architecture, alone, logits):
    one, other = tiny.build(architecture, seed=1), tiny.build(architecture, seed=2)
    kv_one, kv_other = tiny.random_kv(one, 3, seed=1), tiny.random_kv(other, 5, seed=2)
    expected = alone(one, kv_one), alone(other, kv_other)
    with use_prefix(one, kv_one), use_prefix(other, kv_other):
        assert torch.equal(logits(one), expected[0])
        assert torch.equal(logits(other), expected[1])


def test_two_models_that_share_a_configuration(architecture, alone, logits):
    """A teacher and a student made from one config object: unpatching one leaves the other."""
    one = tiny.build(architecture)
    other = type(one)(one.config).eval()
    other.load_state_dict(one.state_dict())
    kv = tiny.random_kv(one)
    expected = alone(one, kv)
    patch_model(one)
    patch_model(other)
    unpatch_model(one)
    torch.testing.assert_close(alone(other, kv), expected)
    unpatch_model(other)
    assert other.config._attn_implementation == "sdpa"


def test_another_attention_set_on_a_patched_model_is_not_silent(model, alone):
    """Else the text would move behind a prefix that nobody attends to."""
    patch_model(model)
    kv = tiny.random_kv(model)
    expected = alone(model, kv)
    model.set_attn_implementation("sdpa")
    try:
        got = alone(model, kv)
    except (ValueError, RuntimeError):
        return
    torch.testing.assert_close(got, expected)


def test_a_copy_of_a_patched_model_works_by_itself(model, bare, alone, logits):
    kv = tiny.random_kv(model)
    plain = logits(bare)
    patch_model(model)
    expected = alone(model, kv)
    twin = copy.deepcopy(model)
    assert torch.equal(alone(twin, kv), expected)
    unpatch_model(model)
    assert torch.equal(alone(twin, kv), expected), "the original's end is not the copy's"
    unpatch_model(twin)
    assert torch.equal(logits(twin), plain)
    assert not any(module._forward_pre_hooks for module in twin.modules())


def test_a_prefix_for_the_original_is_none_for_its_copy(model, logits):
    patch_model(model)
    twin = copy.deepcopy(model)
    plain = logits(twin)
    with use_prefix(model, tiny.random_kv(model)):
        assert torch.equal(logits(twin), plain)
