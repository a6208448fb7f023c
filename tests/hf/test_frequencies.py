"""Rotary frequencies that depend on a text's length: prompts are right there, or refused."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf.patch.frequencies import frequency_thresholds
from fastprefix.hf.patch.patch import patch_of

EXACT = {"rtol": 0, "atol": 1e-9}
LIMIT = 16
SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8, "original_max_position_embeddings": LIMIT,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def build(kind):
    torch.manual_seed(0)
    if kind == "longrope":
        config = Phi3Config(
            **SMALL, max_position_embeddings=64, rope_parameters=dict(LONG),
            original_max_position_embeddings=LIMIT,
        )  # fmt: skip
        model = Phi3ForCausalLM(config)
    else:
        config = LlamaConfig(**SMALL, max_position_embeddings=LIMIT, rope_parameters=DYNAMIC)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.mean().item() if parameter.dim() == 1 else 0.0, 0.2)
    model.generation_config.eos_token_id = None
    return model.double().eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize(("front", "length"), [(8, 6), (10, 6), (10, 7), (20, 6)])
@torch.no_grad()
def test_prompts_are_right_or_refused(kind, front, length):
    """Prompt and text are on one side of the threshold, or the call is refused."""
    model, bare = patch_model(build(kind)), build(kind)
    prompt, (ids, mask) = tiny.prompt(front), tiny.batch((length, 3))
    kv = PrefixKV.prefill(model, prompt)
    right = front + length <= LIMIT or (kind == "longrope" and front > LIMIT)
    with use_prefix(model, kv):
        if not right:
            with pytest.raises(NotImplementedError, match=f"{kind}: a prompt of {front}"):
                model(ids, attention_mask=mask)
            return
        got = model(ids, attention_mask=mask).logits
    expected = tiny.concatenated_logits(bare, prompt, ids, mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **EXACT)


@torch.no_grad()
def test_generating_beyond_the_threshold():
    model, bare = patch_model(build("longrope")), build("longrope")
    ids = tiny.prompt(5)
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt(20))):
        try:
            got = tiny.generate(model, ids, max_new_tokens=16)
        except NotImplementedError:  # older releases drop the text's cache
            got = tiny.generate(model, ids, max_new_tokens=16, use_cache=False)
    expected = tiny.generate(bare, torch.cat([tiny.prompt(20), ids], 1), max_new_tokens=16)
    assert torch.equal(got, expected)
    with use_prefix(model, PrefixKV.prefill(model, tiny.prompt(9))):
        assert tiny.generate(model, ids, max_new_tokens=3).shape[1] == 3
        with pytest.raises(NotImplementedError, match="beyond 16 positions"):
            tiny.generate(model, ids, max_new_tokens=4)


@torch.no_grad()
def test_only_prompts_that_a_row_has_count():
    model = patch_model(build("longrope"))
    kv = {
        "short": PrefixKV.prefill(model, tiny.prompt(9)),
        "long": PrefixKV.prefill(model, tiny.prompt(20)),
    }
    ids = tiny.prompt(4).repeat(2, 1)
    with use_prefix(model, kv, ["long", None]):
        model(ids)
    with use_prefix(model, kv, ["long", "short"]), pytest.raises(NotImplementedError, match="of 9"):
        model(ids)
    with use_prefix(model, tiny.kv_of_shapes(patch_of(model).shapes, 5, position_offset=5)):
        model(tiny.prompt(30))  # a learned prefix is no text


def test_thresholds_of_nested_parameters():
    config = LlamaConfig(**SMALL, max_position_embeddings=LIMIT)
    assert frequency_thresholds(config) == ()
    config.rope_parameters = {"full_attention": LONG, "sliding_attention": DYNAMIC}
    assert frequency_thresholds(config) == (("longrope", LIMIT), ("dynamic", LIMIT))
