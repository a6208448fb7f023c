"""Training that goes wrong, and what is left of it."""

import pytest
import torch
from transformers import TrainerCallback

from fastprefix.tuning.callbacks import ProgressiveLength, StopOnCollapse


class Break(TrainerCallback):
    """Spoils a step, and keeps the prefix after every step before."""

    def __init__(self, step, spoil):
        self.step, self.spoil, self.states = step, spoil, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states[0] = model.export()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step and self.spoil in ("nan", "inf"):
            model.encoder.embedding.grad[1, 2] = float(self.spoil)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 >= self.step:
            with torch.no_grad():
                if self.spoil == "parameter":
                    model.encoder.embedding[0, 0] = float("nan")
                elif self.spoil == "loss":
                    model.encoder.embedding.fill_(50.0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = model.export()


def same(kv, other):
    return all(map(torch.equal, kv.keys + kv.values, other.keys + other.values))


@pytest.mark.parametrize("spoil", ["nan", "inf", "parameter"])
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_what_is_not_finite_stops_training(make_trainer, spoil, logging_steps):
    brk, guard = Break(6, spoil), StopOnCollapse()
    trainer = make_trainer({}, [brk, guard], max_steps=9, logging_steps=logging_steps)
    trainer.train()
    assert trainer.state.global_step == 6
    assert guard.reason is not None
    assert "finite" in guard.reason
    assert "embedding" in guard.reason
    # step 5 was the last good loss with logs at every step: of what step 4 left; else 4, of step 2
    assert same(trainer.model.export(), brk.states[4 if logging_steps == 1 else 2])


def test_nothing_good_yet_means_the_start(make_trainer):
    brk, guard = Break(1, "nan"), StopOnCollapse()
    trainer = make_trainer({}, [brk, guard])
    trainer.train()
    assert same(trainer.model.export(), brk.states[0])


@pytest.mark.parametrize("patience", [1, 2])
def test_collapse_of_the_loss(make_trainer, patience):
    brk, guard = Break(4, "loss"), StopOnCollapse(factor=1.2, patience=patience)
    trainer = make_trainer({}, [brk, guard], max_steps=9, batch=8)
    trainer.train()
    # the broken prefix makes its first loss in step 5; that of step 4 is of what step 3 left
    assert trainer.state.global_step == 4 + patience
    assert "loss" in guard.reason
    assert same(trainer.model.export(), brk.states[3])


@pytest.mark.parametrize(("what", "left"), [("loss", 3), ("nan", 2)])
def test_growth_leaves_alone_what_was_restored(make_trainer, what, left):
    """The loss that collapsed has stalled as well, and growth comes after the restoring."""
    brk, guard = Break(4, what), StopOnCollapse(factor=1.2, patience=1)
    growth = ProgressiveLength(step=3, maximum=12, threshold=0.0, patience=1)
    trainer = make_trainer({}, [brk, guard, growth], max_steps=9, batch=8)
    trainer.train()
    assert guard.reason is not None
    assert trainer.state.global_step < 9
    assert same(trainer.model.export(), brk.states[left])


def test_sound_training_is_left_alone(make_trainer):
    guard = StopOnCollapse(factor=1.5)
    watched, plain = make_trainer({}, [guard]), make_trainer({})
    watched.train()
    plain.train()
    assert guard.reason is None
    assert watched.state.global_step == 6
    assert same(watched.model.export(), plain.model.export())


def test_arguments():
    with pytest.raises(ValueError, match=r"factor: got 1\.0"):
        StopOnCollapse(factor=1.0)
    with pytest.raises(ValueError, match="patience: got 0"):
        StopOnCollapse(patience=0)
