"""torch.compile of tuned models: one graph, and what it computes is what eager mode computes.

``hf/test_precision.py`` has the plain decoders; here are windows, caps and an encoder-decoder.
"""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    T5Config,
    T5ForConditionalGeneration,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel

P = 4


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def gemma2():
    """A window in the first layer, caps in both."""
    fields = {"num_hidden_layers": 2, "sliding_window": 4, "attn_logit_softcapping": 2.0}
    config = Gemma2Config(**{**tiny.GROUPED, **fields})
    config._attn_implementation = "eager"  # sdpa leaves caps out in older releases
    return tiny.from_config(config), "CAUSAL_LM"


def bert():
    config = BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.15, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config), "FEATURE_EXTRACTION"


def t5():
    config = T5Config(
        vocab_size=tiny.VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0, initializer_factor=0.3,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM"


def solve(run, tuned, side):
    """Loss, and the gradient of each parameter of the encoder."""
    ids, mask = tiny.batch((7, 4, 2), side)
    labels = ids.masked_fill(mask == 0, -100)
    loss = run(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    gradients = [parameter.grad for parameter in tuned.encoder.parameters()]
    assert all(gradient.abs().max() > 1e-5 for gradient in gradients)
    tuned.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("build", [gemma2, bert, t5])
def test_a_training_step_is_one_graph(build):
    torch.manual_seed(0)
    model, task = build()
    ids = tiny.batch((4,))[0]
    tiny.skip_unless_one_graph(model, input_ids=ids, labels=ids)
    config = PrefixConfig(num_virtual_tokens=P, task_type=task, init_std=1.0)
    tuned = PrefixTuningModel(model, config).train()
    side = "right" if task == "CAUSAL_LM" else "left"
    expected = solve(tuned, tuned, side)
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(solve(compiled, tuned, side), expected, rtol=1e-4, atol=1e-6)
