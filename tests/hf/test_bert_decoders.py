"""BERT and its kin as causal models."""

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf import patch_of

EXACT = {"rtol": 0, "atol": 1e-9}
P = 5
SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "is_decoder": True,
}  # fmt: skip
FROM_ZERO = ["BertLMHeadModel", "ElectraForCausalLM", "BertGenerationDecoder", "ErnieForCausalLM"]
# These count from the padding's number on in a forward, and from 0 in generate().
OTHERS = [
    "RobertaForCausalLM", "CamembertForCausalLM", "XLMRobertaForCausalLM",
    "XLMRobertaXLForCausalLM", "RobertaPreLayerNormForCausalLM", "Data2VecTextForCausalLM",
]  # fmt: skip


def build(name):
    make = getattr(transformers, name)
    torch.manual_seed(0)
    model = make(make.config_class(**SMALL))
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.mean().item() if parameter.dim() == 1 else 0.0, 0.2)
    model.generation_config.eos_token_id = None
    return model.double().eval()


@pytest.mark.parametrize("name", [*FROM_ZERO, *OTHERS])
@torch.no_grad()
def test_prompts_and_learned_prefixes_in_forwards(name):
    model, bare = patch_model(build(name)), build(name)
    assert patch_of(model).groups == ("decoder", "decoder")
    front, (ids, mask) = tiny.prompt(7), tiny.batch((6, 3), "right")
    whole, whole_mask = tiny.concatenate(front, ids, mask, "right")
    expected = bare(whole, attention_mask=whole_mask).logits[:, 7:]
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **EXACT)
    kv = tiny.kv_of_shapes(patch_of(model).shapes, P, position_offset=P)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*(x.expand(2, -1, -1, -1) for x in kv.layer(layer)), layer)
    wide = torch.cat([mask.new_ones(2, P), mask], 1)
    expected = bare(ids, attention_mask=wide, past_key_values=cache).logits
    with use_prefix(model, kv):
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **EXACT)


@pytest.mark.parametrize("name", FROM_ZERO)
def test_prompts_in_generate(name):
    model, bare = patch_model(build(name)), build(name)
    front, (ids, mask) = tiny.prompt(7), tiny.batch((6, 3))
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = tiny.generate(model, ids, mask)
    assert torch.equal(got, tiny.generate(bare, *tiny.concatenate(front, ids, mask)))


@pytest.mark.parametrize("name", OTHERS)
def test_prompts_are_refused_where_generate_counts_otherwise(name):
    model = patch_model(build(name))
    with (
        use_prefix(model, PrefixKV.prefill(model, tiny.prompt(7))),
        pytest.raises(NotImplementedError, match="counts from another number than 0"),
    ):
        tiny.generate(model, tiny.prompt(4))
