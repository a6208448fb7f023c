"""nn.DataParallel, which the Trainer uses on several GPUs without a launcher.

Its own replicate() and threads run here on the CPU; what copies parameters to GPUs alone is
replaced by a copy that autograd sees, as it does that one.
"""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch.nn.parallel import replicate

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    patch_model,
    use_prefix,
)


@pytest.fixture
def parallel(monkeypatch):
    """Runs two replicas, each in a thread of its own on its half of the rows."""

    def copies(tensors, devices, detach=False):
        return [[x.detach() if detach else x * 1 for x in tensors] for _ in devices]

    # the module, which the package has a function of the same name in place of
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)

    def run(model, **batch):
        replicas = replicate(model, [0, 1], detach=not torch.is_grad_enabled())
        halves = [{name: x.chunk(2)[half] for name, x in batch.items()} for half in range(2)]
        found, grads = [None, None], torch.is_grad_enabled()

        def work(number):
            with torch.set_grad_enabled(grads):
                try:
                    found[number] = replicas[number](**halves[number])
                except Exception as error:
                    found[number] = error

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return torch.cat([one.logits for one in found])

    return run


def batch():
    ids, mask = tiny.batch((6, 4, 5, 2))
    return {"input_ids": ids, "attention_mask": mask}


KINDS = {
    "direct": {},
    "mlp": {"prefix_projection": True},
    "lstm": {"prefix_projection": True, "encoder_reparameterization_type": "LSTM"},
    "gated": {"gated": True},
    "frozen": {"num_frozen_tokens": 2},
}


def check(tuned, parallel):
    """The same outputs and gradients as of all rows at once."""
    inputs = batch()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert trained
    found = []
    for run in (lambda: tuned(**inputs).logits, lambda: parallel(tuned, **inputs)):
        logits = run()
        (logits.tanh().square().sum()).backward()
        found.append([logits.detach(), *(p.grad for p in trained)])
        for parameter in trained:
            parameter.grad = None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert all(grad.abs().max() > 0 for grad in found[0][1:])
    with torch.no_grad():
        got = parallel(tuned, **inputs)
    torch.testing.assert_close(got, found[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_prefix_tuning_trains_in_replicas(parallel, kind):
    """A bare StopIteration before: replicas have no parameters."""
    config = PrefixConfig(num_virtual_tokens=4, init_std=1.0, task_type="CAUSAL_LM", **kind)
    tuned = PrefixTuningModel(tiny.build(), config)
    if kind.get("gated"):
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "reweighting" in name:
                    parameter.add_(0.5)
    check(tuned, parallel)


@pytest.mark.parametrize(
    "kind", [{}, {"encoder_reparameterization_type": "MLP"}], ids=["prompt", "p-tuning"]
)
def test_prompt_tuning_trains_in_replicas(parallel, kind):
    config = PromptConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", **kind)
    check(PromptTuningModel(tiny.build("gpt2"), config), parallel)


def test_the_active_adapter_is_that_of_the_calling_thread(parallel):
    """Replicas run in threads of their own; disable_adapter() holds for them as well."""
    config = PrefixConfig(num_virtual_tokens=4, init_std=1.0)
    tuned = PrefixTuningModel(tiny.build(), config)
    tuned.add_adapter("other", config)
    inputs, found = batch(), []
    with torch.no_grad():
        for name in ("default", "other"):
            tuned.set_adapter(name)
            found.append(parallel(tuned, **inputs))
            torch.testing.assert_close(found[-1], tuned(**inputs).logits, rtol=1e-4, atol=1e-4)
            with tuned.disable_adapter():
                plain = parallel(tuned, **inputs)
                torch.testing.assert_close(plain, tuned(**inputs).logits, rtol=1e-4, atol=1e-4)
            assert not torch.equal(plain, found[-1])
    assert not torch.equal(*found)


def test_a_patched_model_runs_in_replicas(model, bare, parallel):
    patch_model(model)
    with torch.no_grad():
        expected = bare(**batch()).logits
        got = parallel(model, **batch())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lasting", [False, True])
def test_replicas_see_the_block_of_the_thread_that_called(model, parallel, lasting):
    if lasting:
        patch_model(model)
    kv = tiny.random_kv(model, requires_grad=True)
    found = []
    with use_prefix(model, kv):
        for run in (lambda **x: model(**x).logits, lambda **x: parallel(model, **x)):
            run(**batch()).tanh().square().sum().backward()
            found.append(tiny.gradients(kv))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        with torch.no_grad(), use_prefix(model, None):
            plain = parallel(model, **batch())
            torch.testing.assert_close(plain, model(**batch()).logits, rtol=1e-4, atol=1e-4)


def test_replicas_are_refused_where_it_is_not_clear_whose_they_are(parallel):
    model = patch_model(tiny.build())
    opened, done = threading.Event(), threading.Event()

    def hold():
        with use_prefix(model, tiny.random_kv(model, seed=1)):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert opened.wait(60)
        with (
            torch.no_grad(),
            use_prefix(model, tiny.random_kv(model)),
            pytest.raises(RuntimeError, match="open in another thread"),
        ):
            parallel(model, **batch())
    finally:
        done.set()
        thread.join(60)
