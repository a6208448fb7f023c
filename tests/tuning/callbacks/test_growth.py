"""Prefixes that grow in training."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix.encoders import DirectEncoder
from fastprefix.kv import LayerShape
from fastprefix.tuning.callbacks import ProgressiveLength
from fastprefix.tuning.callbacks.growth import grow

SHAPES = (LayerShape(1, 2, 2), LayerShape(2, 1, 1))


@pytest.mark.parametrize("lengths", [(3, 3), (3, 0), (2, 3)])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad", "amsgrad"])
def test_the_optimizer_goes_on_as_if_nothing_had_happened(lengths, kind):
    """Under a loss that is a sum over the numbers, each of them is trained by itself."""
    plain, grown = DirectEncoder(SHAPES, lengths), DirectEncoder(SHAPES, lengths)
    grown.load_state_dict(plain.state_dict())

    def make(encoder):
        if kind == "SGD":
            return torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
        if kind == "Adagrad":
            return torch.optim.Adagrad(encoder.parameters(), lr=0.1)
        return torch.optim.AdamW(encoder.parameters(), lr=0.1, amsgrad=kind == "amsgrad")

    optimizers = make(plain), make(grown)
    for step in range(8):
        if step == 4:
            grow(grown, 2, optimizers[1])
        for encoder, optimizer in zip((plain, grown), optimizers, strict=True):
            optimizer.zero_grad()
            kv = encoder()
            sum((x - 1).pow(4).sum() + x.sin().sum() for x in kv.keys + kv.values).backward()
            optimizer.step()
    for long, short in zip(grown().keys, plain().keys, strict=True):
        assert long.shape[1] == (short.shape[1] + 2 if short.shape[1] else 0)
        assert torch.equal(long[:, : short.shape[1]], short)
        assert not torch.equal(long[:, -2:], torch.zeros(()).expand_as(long[:, -2:])) or not len(
            short[0]
        )
    assert len(optimizers[1].state) == 1, "nothing kept for the old parameter"


def test_factored_optimizers_are_refused_before_anything_changes():
    encoder = DirectEncoder(SHAPES, 3)
    optimizer = torch.optim.Adafactor(encoder.parameters(), lr=0.1)
    encoder().keys[0].sum().backward()
    optimizer.step()
    embedding = encoder.embedding
    with pytest.raises(ValueError, match="optimizer: got a Adafactor, whose row_var"):
        grow(encoder, 2, optimizer)
    assert encoder.embedding is embedding
    other = torch.optim.SGD(DirectEncoder(SHAPES, 3).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer: got one that does not train"):
        grow(encoder, 2, other)


def lengths(trainer):
    """Length of the prefix by logged step."""
    return {
        entry["step"]: entry["num_virtual_tokens"]
        for entry in trainer.state.log_history
        if "num_virtual_tokens" in entry
    }


@pytest.mark.parametrize("projection", [False, True])
def test_grows_where_the_loss_stalls_up_to_the_maximum(make_trainer, projection):
    callback = ProgressiveLength(step=3, maximum=8, threshold=0.5, patience=1)
    trainer = make_trainer({"prefix_projection": projection}, [callback], max_steps=9)
    assert trainer.model.encoder.layout.num_virtual_tokens == 4
    trainer.train()
    assert list(lengths(trainer).values()) == [7, 8]
    first, second = lengths(trainer)
    assert first >= 2
    assert second >= first + 2, "the loss is judged anew after each growth"
    assert trainer.model.export().num_virtual_tokens == 8
    assert sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in trainer.model.encoder.parameters()
    )


def test_does_not_grow_while_the_loss_falls(make_trainer):
    callback = ProgressiveLength(step=3, maximum=8, threshold=0.0, patience=4)
    trainer = make_trainer({}, [callback], learning_rate=1e-2, max_steps=6, batch=8)
    trainer.train()
    assert lengths(trainer) == {}


@pytest.mark.parametrize("position_offset", [None, 8])
def test_function_at_the_moment_of_growing(make_trainer, position_offset):
    """It is that of the longer prefix: the present tokens and the new ones, nothing else."""
    callback = ProgressiveLength(step=4, maximum=8, threshold=0.5, patience=1)
    trainer = make_trainer({"position_offset": position_offset, "init_std": 1.0}, [callback])
    before = trainer.model.export()
    trainer.create_optimizer()
    grow(trainer.model.encoder, 4, trainer.optimizer)
    after = trainer.model.export()
    for got, want in zip(after.keys + after.values, before.keys + before.values, strict=True):
        assert torch.equal(got[:, :4], want)
    assert after.position_offset == 8
    assert before.position_offset == (8 if position_offset else 4)
    ids, mask = tiny.batch()
    plain = tiny.expanded_forward(tiny.build("llama"), after, ids, mask).logits
    with torch.no_grad():
        got = trainer.model(ids, mask).logits
    torch.testing.assert_close(got[mask.bool()], plain[mask.bool()], rtol=1e-4, atol=1e-4)


def test_resumed_training_ends_where_uninterrupted_training_does(make_trainer):
    def build():
        callback = ProgressiveLength(step=3, maximum=8, threshold=0.5, patience=1)
        return make_trainer({}, [callback], max_steps=6, save_strategy="steps", save_steps=3)

    whole = build()
    whole.train()
    assert list(lengths(whole).values()) == [7, 8]
    assert next(iter(lengths(whole))) <= 3 < list(lengths(whole))[1]
    resumed = build()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert lengths(resumed) == lengths(whole)
    got, want = resumed.model.export(), whole.model.export()
    for one, other in zip(got.keys + got.values, want.keys + want.values, strict=True):
        torch.testing.assert_close(one, other)


def test_a_callback_that_is_added_later_resumes_too(make_trainer):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer({}, [ProgressiveLength(3, 8, 0.5, 1)], **options)
    whole.train()
    resumed = make_trainer({}, **options)
    resumed.add_callback(ProgressiveLength(3, 8, 0.5, 1))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert resumed.model.export().num_virtual_tokens == whole.model.export().num_virtual_tokens == 8


def test_the_best_checkpoint_may_be_a_shorter_one(make_trainer):
    """Best by the highest loss here, which comes early."""
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    callback = ProgressiveLength(step=4, maximum=20, threshold=0.9, patience=1)
    trainer = make_trainer({}, [callback], **every, **best, max_steps=5)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    step = max(losses, key=losses.get)
    length = max([4, *(n for grown, n in lengths(trainer).items() if grown <= step)])
    assert length < max(lengths(trainer).values())
    assert trainer.model.export().num_virtual_tokens == length
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[step], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", 0), ("maximum", 0), ("patience", 0), ("threshold", -0.1), ("threshold", 1.0)],
)
def test_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        ProgressiveLength(**{"step": 1, "maximum": 5, name: value})


def test_prefix_longer_than_the_maximum(make_trainer):
    with pytest.raises(ValueError, match="maximum: got 3, takes 4 or more for a prefix of 4"):
        make_trainer({}, [ProgressiveLength(1, 3)]).train()
