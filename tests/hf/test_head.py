"""A frozen model's head is multiplied once, not copied for each row of the batch."""

import torch
from torch.profiler import profile

import fastprefix_testing.models as tiny
from fastprefix import use_prefix


def test_last_token_logits_take_no_batched_product() -> None:
    model = tiny.build("llama").requires_grad_(False)
    kv = tiny.random_kv(model)
    ids, mask = tiny.batch((7, 7, 7))
    with torch.no_grad(), use_prefix(model, kv):
        whole = model(ids, attention_mask=mask).logits[:, -1:]
        with profile(record_shapes=True) as recorded:
            last = model(ids, attention_mask=mask, logits_to_keep=1).logits
    shapes = [event.input_shapes for event in recorded.events() if event.name == "aten::bmm"]
    vocabulary = model.config.vocab_size
    assert not [shape for shape in shapes if any(vocabulary in operand for operand in shape)]
    torch.testing.assert_close(last, whole)
