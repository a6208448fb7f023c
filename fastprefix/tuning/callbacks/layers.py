"""Training the prefixes of some layers first."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastprefix.arguments import check_whole, methods_refuse_unknown_arguments
from fastprefix.encoders import Encoder
from fastprefix.tuning.callbacks.trained_encoders import trained_encoders

First = Literal["last", "first"]


@methods_refuse_unknown_arguments
class ProgressiveLayers(TrainerCallback):
    """Trains the prefixes of a few layers first, then those of more and more layers, then all.

    All layers have their prefix from the start. Those that are not trained yet keep theirs, so the
    moment at which a layer joins changes no output. If a network computes the prefixes, those of
    layers that have not joined get no gradient, but change with the weights that all layers share.

    Args:
        steps: the number of optimizer steps after which more layers join.
        layers: the number of layers that join at a time.
        first: the layers that are trained first: the model's "last" (nearest to its output) or its
            "first".

    Raises:
        TypeError: steps or layers is no whole number.
        ValueError: steps or layers is not positive, or first is unknown. When training begins:
            weight_decay is set, which would shrink prefixes that are not trained yet.
    """

    def __init__(self, steps: int, layers: int = 1, first: First = "last") -> None:
        for name, value in (("steps", steps), ("layers", layers)):
            check_whole(name, value, 1)
        if first not in get_args(First):
            raise ValueError(f"first: got {first!r}, takes one of {get_args(First)}")
        self.steps, self.layers, self.first = steps, layers, first

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the run's arguments, which are not known before."""
        if args.weight_decay:
            raise ValueError(
                f"weight_decay: got {args.weight_decay} with ProgressiveLayers, takes 0; it would "
                "shrink the prefixes of layers that are not trained yet"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the layers that this step trains, from its number only: training can resume."""
        count = self.layers * (1 + state.global_step // self.steps)
        for encoder in trained_encoders(kwargs["model"]):
            encoder.trained_slots = self._trained(encoder, count)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets all layers be trained again."""
        for encoder in trained_encoders(kwargs["model"]):
            encoder.trained_slots = None

    def _trained(self, encoder: Encoder, count: int) -> frozenset[int] | None:
        slots = encoder.layout.slots
        if count >= len(slots):
            return None
        return frozenset(slots[-count:] if self.first == "last" else slots[:count])
