"""fallback="expand": when it is chosen, and which models it refuses."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
)

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    UnsupportedModelError,
    patch_model,
    unpatch_model,
    use_prefix,
)
from fastprefix.hf import patch_of
from fastprefix_testing.fallback import (
    MODELS,
    STACK,
    fill,
    learned,
    make,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fallback='expand' the prefix is copied")


def test_never_chosen_silently():
    for name in ("falcon new", "stablelm"):
        with pytest.raises(UnsupportedModelError, match=r"fallback='expand' gives it"):
            patch_model(make(name))
    with pytest.raises(UnsupportedModelError) as refused:
        patch_model(fill(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(
            n_embd=32, n_layer=1, n_head=2, vocab_size=50))))  # fmt: skip
    assert "fallback" not in str(refused.value)  # which would not help


def test_models_that_can_be_patched_are():
    model = tiny.build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, fallback="expand")
        with use_prefix(model, tiny.random_kv(model), fallback="expand"):
            model(tiny.prompt(4))
    assert patch_of(model).expanded is None


@pytest.mark.parametrize("thing", ["copy", True, 1])
def test_what_is_no_fallback(thing):
    message = f"fallback: got {thing!r}, takes None or 'expand'"
    model = tiny.build("llama")
    for call in (
        lambda: patch_model(model, fallback=thing),
        lambda: use_prefix(model, None, fallback=thing).__enter__(),
        lambda: PrefixKV.prefill(model, [1], fallback=thing),
        lambda: PrefixConfig(fallback=thing),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.filterwarnings("default:.*fallback='expand' the prefix is copied")
def test_one_warning_says_what_it_costs():
    model, ids = make("falcon new"), tiny.prompt(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kv = PrefixKV.prefill(model, tiny.prompt(9), fallback="expand")
        for _ in range(2):
            with use_prefix(model, kv, fallback="expand"):
                model(ids)
                model(ids)
    told = [str(x.message) for x in caught if "fallback" in str(x.message)]
    assert len(told) == 1
    assert f"9 tokens, {kv.nbytes:,} bytes a row" in told[0]
    assert "FalconForCausalLM does not route its attention" in told[0]


def test_unpatching_leaves_the_model_as_it_was():
    model, ids = make("bloom"), tiny.prompt(4)
    before = model(ids).logits
    patch_model(model, fallback="expand")
    assert torch.equal(model(ids).logits, before)
    twin = copy.deepcopy(model)
    kv = learned(model)
    with use_prefix(model, kv):
        assert not torch.equal(model(ids).logits, before)
        assert torch.equal(twin(ids).logits, before)
        with use_prefix(model, None):
            assert torch.equal(model(ids).logits, before)
    with use_prefix(twin, kv), use_prefix(model, kv):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    unpatch_model(model)
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        assert not any(key.startswith("_fastprefix") for key in vars(module))
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_a_call_that_fails_leaves_nothing_behind():
    model, ids = patch_model(make("falcon new"), fallback="expand"), tiny.prompt(4)
    before, kv = model(ids).logits, learned(model)
    with use_prefix(model, kv):
        wanted = model(ids).logits
        with pytest.raises(IndexError):
            model(ids + 1000)
        assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids).logits, before)


class Forgetful(BloomForCausalLM):
    """Computes something else as soon as there is anything in the cache."""

    def __init__(self, config):
        super().__init__(config)
        inner = self.transformer.h[0]
        inner.register_forward_hook(self.louder, with_kwargs=True)

    @staticmethod
    def louder(module, args, kwargs, output):
        cache = kwargs["layer_past"]
        past = cache.layers[0].keys.shape[2] - args[0].shape[1] if cache is not None else 0
        return (output[0] * (1 + past), *output[1:])


def test_a_model_that_is_wrong_behind_its_cache_is_refused():
    """The check when a model is patched can fail."""
    model = fill(Forgetful(BloomConfig(**MODELS["bloom"][1])))
    with pytest.raises(UnsupportedModelError, match="is not what it computes behind the text"):
        patch_model(model, fallback="expand")
    assert not any(k.startswith("_fastprefix") for m in model.modules() for k in vars(m))
    assert not model.transformer._forward_pre_hooks


REFUSED = {
    "openai": ("OpenAIGPTLMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "no KV cache"),
    "deberta_v2": ("DebertaV2ForMaskedLM", {**STACK, "intermediate_size": 32}, "no KV cache"),
    "prophetnet": (
        "ProphetNetForConditionalGeneration", {"hidden_size": 32, "num_encoder_layers": 1,
        "num_decoder_layers": 1, "decoder_start_token_id": 0}, "for decoder-only models",
    ),
    "prophetnet decoder": (
        "ProphetNetForCausalLM", {"hidden_size": 32, "num_decoder_layers": 1, "is_decoder": True,
        "num_encoder_layers": 1}, "`decoder_input_ids` of length 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_it_does_not_help(name):
    model_class, fields, message = REFUSED[name]
    cls = getattr(transformers, model_class)
    model = cls(cls.config_class(**fields)).eval()
    with pytest.raises(
        UnsupportedModelError, match=f"fallback='expand' does not help: .*{message}"
    ):
        patch_model(model, fallback="expand")
    assert not any(isinstance(x, nn.Module) and x._forward_pre_hooks for x in model.modules())
