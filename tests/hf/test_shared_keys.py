"""Gemma3n and Gemma4: the last layers take the keys and values of earlier ones."""

import pytest
import torch
import transformers
from torch import nn

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf import patch_of

EXACT = {"rtol": 0, "atol": 1e-9}
SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4, "num_hidden_layers": 4,
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 101,
}  # fmt: skip
MODELS = {
    "Gemma3nForCausalLM": {
        "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None,
    },
    "Gemma4ForCausalLM": {"global_head_dim": 16},
}  # fmt: skip


def build(name):
    make = getattr(transformers, name)
    torch.manual_seed(0)
    model = make(make.config_class(**SMALL, **MODELS[name]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.mean().item() if parameter.dim() == 1 else 0.0, 0.2)
    model.generation_config.eos_token_id = None
    return model.double().eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_batches(name, side):
    """Only patched, with a learned prefix, with a prompt; the whole text and its last tokens."""
    model, bare = patch_model(build(name)), build(name)
    ids, mask = tiny.batch((9, 6, 1), side)
    real, front = mask.bool(), tiny.prompt(7)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits[real],
            bare(ids, attention_mask=mask).logits[real],
            **EXACT,
        )
        expected = tiny.concatenated_logits(bare, front, ids, mask, side)
        with use_prefix(model, PrefixKV.prefill(model, front)):
            got = model(ids, attention_mask=mask).logits
            last = model(ids, attention_mask=mask, logits_to_keep=2).logits
            if side == "left":
                greedy = tiny.generate(model, ids, mask)
        if side == "left":
            whole = tiny.concatenate(front, ids, mask)
            assert torch.equal(greedy, tiny.generate(bare, *whole))
            assert torch.equal(tiny.generate(model, ids, mask), tiny.generate(bare, ids, mask))
    torch.testing.assert_close(got[real], expected[real], **EXACT)
    torch.testing.assert_close(last[real[:, -2:]], got[:, -2:][real[:, -2:]], **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_training_a_learned_prefix_on_padded_batches(name, side):
    """Rows of a batch are what they are alone, gradients too."""
    model = patch_model(build(name).requires_grad_(False).train())
    ids, mask = tiny.batch((9, 6, 1), side)
    kv = tiny.kv_of_shapes(patch_of(model).shapes, 5, position_offset=5)
    with use_prefix(model, kv):
        together = model(ids, attention_mask=mask).logits
        alone = [
            model(row[real.bool()][None]).logits[0] for row, real in zip(ids, mask, strict=True)
        ]
    torch.testing.assert_close(together[mask.bool()], torch.cat(alone), **EXACT)
    together[mask.bool()].square().sum().backward()
    expected = tiny.gradients(kv)
    torch.cat(alone).square().sum().backward()
    torch.testing.assert_close(tiny.gradients(kv), expected, rtol=1e-4, atol=1e-5)
