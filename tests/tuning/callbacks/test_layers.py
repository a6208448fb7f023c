"""Layers that are let in one after the other."""

from itertools import pairwise

import pytest
import torch
from transformers import TrainerCallback

from fastprefix.tuning.callbacks import PrefixMonitor, ProgressiveLayers


class Watch(TrainerCallback):
    """The prefix after every step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.prefixes = [model.export()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.prefixes.append(model.export())


def changed(prefixes):
    """Which layers each step changed."""
    return [
        [
            slot
            for slot in range(one.num_layers)
            if not (
                torch.equal(one.keys[slot], two.keys[slot])
                and torch.equal(one.values[slot], two.values[slot])
            )
        ]
        for one, two in pairwise(prefixes)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 2}, [[2], [2], [1, 2], [1, 2], [0, 1, 2], [0, 1, 2]]),
        ({"steps": 1, "first": "first"}, [[0], [0, 1]] + [[0, 1, 2]] * 4),
        ({"steps": 3, "layers": 2}, [[1, 2]] * 3 + [[0, 1, 2]] * 3),
    ],
)
def test_trains_the_layers_it_says_and_no_other(make_trainer, options, expected):
    watch = Watch()
    trainer = make_trainer({}, [ProgressiveLayers(**options), watch])
    trainer.train()
    assert changed(watch.prefixes) == expected
    assert trainer.model.encoder.trained_slots is None


def test_layers_without_a_prefix_do_not_count(make_trainer):
    watch = Watch()
    make_trainer({"layers": [0, 2]}, [ProgressiveLayers(3), watch]).train()
    assert changed(watch.prefixes) == [[2]] * 3 + [[0, 2]] * 3


def test_resumes_where_it_was(make_trainer):
    saved = {"save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer({}, [ProgressiveLayers(2)], **saved)
    trainer.train()
    watch = Watch()
    resumed = make_trainer({}, [ProgressiveLayers(2), watch], **saved)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert changed(watch.prefixes) == [[1, 2], [0, 1, 2], [0, 1, 2]]


def test_refusals(make_trainer):
    for name, value in (("steps", 0), ("layers", 0), ("first", "middle")):
        with pytest.raises(ValueError, match=f"{name}: got {value!r}"):
            ProgressiveLayers(**{"steps": 1, name: value})
    with pytest.raises(ValueError, match=r"weight_decay: got 0\.1"):
        make_trainer({}, [ProgressiveLayers(1)], weight_decay=0.1).train()


class Interrupt(TrainerCallback):
    """The user's Ctrl+C."""

    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_layer_frozen(make_trainer):
    trainer = make_trainer({}, [ProgressiveLayers(steps=4), PrefixMonitor(), Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.model.encoder.trained_slots is None
    assert not trainer.model.encoder._forward_hooks
