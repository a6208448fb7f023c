"""A base with int8 weights: the prefix trains as in the same quantised model without fastprefix."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel

pytest.importorskip("torchao", reason="int8 weights come from torchao")


def test_a_training_step(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    tiny.build().save_pretrained(tmp_path)
    quantisation = TorchAoConfig(Int8WeightOnlyConfig())

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation)

    tuned, bare = (
        PrefixTuningModel(load(), PrefixConfig(num_virtual_tokens=5, init_std=1.0)),
        load(),
    )
    ids, mask = tiny.batch()
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for run in (
        lambda: tuned(input_ids=ids, attention_mask=mask, labels=labels),
        lambda: tiny.expanded_forward(bare, tuned.encoder(), ids, mask, labels=labels),
    ):
        loss = run().loss
        loss.backward()
        results.append((loss.detach(), tuned.encoder.embedding.grad.clone()))
        tuned.zero_grad()
    assert results[0][1].abs().max() > 1e-4
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    full = tiny.expanded_forward(tiny.build(), tuned.encoder(), ids, mask, labels=labels)
    assert full.loss != results[0][0], "quantisation changed nothing"
