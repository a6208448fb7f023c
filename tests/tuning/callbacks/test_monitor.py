"""What the monitor records, against autograd and eager attention."""

import pytest
import torch
from transformers import TrainerCallback

import fastprefix_testing.models as tiny
from fastprefix import use_prefix
from fastprefix.tuning.callbacks import PrefixMonitor


class Stop(TrainerCallback):
    """Ends training after the first step, keeping the prefix that it started from."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("prefix", [{}, {"prefix_projection": True}, {"layers": [0, 2]}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_norms_of_keys_and_values(make_trainer, prefix, accumulate):
    monitor, stop = PrefixMonitor(), Stop()
    trainer = make_trainer(
        {"init_std": 1.0, **prefix},
        [monitor, stop],
        max_steps=1,
        batch=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=1e-3,
    )
    trainer.train()
    (entry,) = monitor.history
    assert entry["step"] == 1
    model = trainer.model
    model.load_state_dict(stop.start)
    kv = model.encoder()
    rows = [trainer.train_dataset[i] for i in range(8)]
    ids = torch.stack([row["input_ids"] for row in rows])
    tensors = [x for x in kv.keys + kv.values if x.shape[1]]
    with use_prefix(model.base_model, kv):
        loss = model.base_model(ids, labels=ids).loss
    grads = dict(zip(map(id, tensors), torch.autograd.grad(loss, tensors), strict=True))
    for slot, got in enumerate(entry["prefix_grad_norm"]):
        squares = [grads[id(x)].square().sum().item() for x in kv.layer(slot) if id(x) in grads]
        assert got == pytest.approx(sum(squares) ** 0.5, rel=1e-3)
        assert (got > 0) == bool(squares)


def test_attention_mass_at_every_loss(make_trainer):
    ids, mask = tiny.batch()
    monitor = PrefixMonitor({"input_ids": ids, "attention_mask": mask})
    trainer = make_trainer({"init_std": 1.0}, [monitor], max_steps=4, logging_steps=2)
    trainer.train()
    assert [entry["step"] for entry in monitor.history] == [2, 4]
    assert trainer.model.training, "measured in evaluation mode and put back"
    eager = tiny.build()
    eager.set_attn_implementation("eager")
    kv = trainer.model.export()
    out = tiny.expanded_forward(eager, kv, ids, mask, output_attentions=True)
    for got, weights in zip(monitor.history[-1]["attention_mass"], out.attentions, strict=True):
        shares = weights[..., :4].sum(-1).transpose(1, 2)[mask.bool()].mean(0)
        torch.testing.assert_close(torch.tensor(got), shares, rtol=1e-4, atol=1e-5)


def test_training_is_the_same_with_it(make_trainer):
    watched = make_trainer({"dropout": 0.2}, [PrefixMonitor({"input_ids": tiny.prompt()})])
    watched.train()
    plain = make_trainer({"dropout": 0.2})
    plain.train()
    for got, want in zip(watched.model.export().keys, plain.model.export().keys, strict=True):
        assert torch.equal(got, want)
    assert not watched.model.encoder._forward_hooks
