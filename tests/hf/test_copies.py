"""Copies of patched models and tuned models: independent of the original, wherever they are."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from transformers import BloomConfig

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    patch_model,
    unpatch_model,
    use_prefix,
)
from fastprefix.hf.patch.patch import patch_of


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


@pytest.fixture(params=WAYS)
def copied(request):
    """A way to copy a model."""
    if request.param != "deepcopy":
        request.getfixturevalue("picklable")
    return WAYS[request.param]


def logits(model):
    ids, mask = tiny.batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("when", ["before the block", "in the block", "patched for the block"])
def test_a_copy_sees_no_block_of_the_original(model, copied, when):
    """A pickled one did: it kept the original's key, and was 3.8 off."""
    kv = tiny.random_kv(model)
    plain = logits(model if when == "patched for the block" else patch_model(model))
    twin = copied(model) if when == "before the block" else None
    with use_prefix(model, kv):
        twin = copied(model) if twin is None else twin
        torch.testing.assert_close(logits(twin), plain, rtol=1e-4, atol=1e-4)
        with_prefix = logits(model)
    torch.testing.assert_close(logits(twin), plain, rtol=1e-4, atol=1e-4)
    with use_prefix(twin, kv):
        torch.testing.assert_close(logits(twin), with_prefix)
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    unpatch_model(twin)
    assert not any(k.startswith("_fastprefix") for m in twin.modules() for k in vars(m))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())
    with use_prefix(model, kv):  # which unpatching the copy left alone
        torch.testing.assert_close(logits(model), with_prefix)


@pytest.mark.usefixtures("picklable")
def test_two_copies_of_one_pickle_are_two():
    model = patch_model(tiny.build())
    kv, written = tiny.random_kv(model), pickle.dumps(model)
    one, other = pickle.loads(written), pickle.loads(written)
    plain = logits(model)
    with use_prefix(one, kv):
        assert torch.equal(logits(other), plain)
        assert not torch.equal(logits(one), plain)


@pytest.mark.filterwarnings("ignore:.*fallback='expand'")
def test_a_copy_of_a_model_that_expands_its_prefix(copied):
    """The copy had lost how it does that, and failed."""
    config = BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4)
    model = patch_model(tiny.from_config(config), fallback="expand")
    assert patch_of(model).expanded is not None
    kv = tiny.kv_of_shapes(patch_of(model).shapes, position_offset=5, dtype=torch.float32)
    plain, twin = logits(model), copied(model)
    with use_prefix(model, kv):
        expected = logits(model)
        assert torch.equal(logits(twin), plain)
    with use_prefix(twin, kv):
        assert torch.equal(logits(twin), expected)
        assert torch.equal(logits(model), plain)
    assert not torch.equal(expected, plain)


def tuned_models():
    config = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    yield PrefixTuningModel(tiny.build(), PrefixConfig(**config, init_std=1.0))
    yield PromptTuningModel(tiny.build(), PromptConfig(**config))


def test_a_copy_of_a_tuned_model_is_one_of_its_own(copied):
    for tuned in tuned_models():
        before = logits(tuned)
        if isinstance(tuned, PrefixTuningModel):
            with tuned.disable_adapter():
                twin = copied(tuned)
                base = logits(tuned)
                assert torch.equal(logits(twin), before)  # which nobody disabled
            assert not torch.equal(base, before)
        else:
            twin = copied(tuned)
        assert torch.equal(logits(twin), before)
        with torch.no_grad():
            twin.encoder.embedding.add_(1.0)
        assert torch.equal(logits(tuned), before)
        assert not torch.equal(logits(twin), before)


@pytest.mark.usefixtures("picklable")
def test_in_another_process_no_block_is_open(tmp_path):
    """A model that was pickled in a block was refused there: "open in another thread"."""
    model = tiny.build()
    plain = logits(model)
    with use_prefix(model, tiny.random_kv(model)):
        torch.save([model, tiny.random_kv(model), *tiny.batch()], tmp_path / "model.pt")
    code = """
import sys, torch
from fastprefix import use_prefix
model, kv, ids, mask = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
with torch.no_grad():
    plain = model(ids, attention_mask=mask).logits
    with use_prefix(model, kv):
        behind = model(ids, attention_mask=mask).logits
torch.save([plain, behind], sys.argv[1] + "/logits.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    got, behind = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
    with use_prefix(model, tiny.random_kv(model)):
        torch.testing.assert_close(behind, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("picklable")
def test_a_copy_is_made_while_another_thread_is_in_a_block():
    model = patch_model(tiny.build())
    plain, opened, done = logits(model), threading.Event(), threading.Event()

    def hold():
        with use_prefix(model, tiny.random_kv(model)):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert opened.wait(60)
        for copied in WAYS.values():
            assert torch.equal(logits(copied(model)), plain)
    finally:
        done.set()
        thread.join(60)
