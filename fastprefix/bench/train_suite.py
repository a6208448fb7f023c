"""Suite ``train``: forward and backward of a frozen model with a prefix that is learned.

The optimizer's step is left out: it is the same for everybody. Loss and gradient of the prefix are
compared. The bound is the backward of the same model to its embeddings, without any prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprefix.bench import language_model as lm
from fastprefix.bench.case import OURS, Work, timed
from fastprefix.bench.model_sides import (
    NO_PREFIX,
    PEFT,
    REPEATED,
    Inputs,
    ModelCase,
    peft_model,
)
from fastprefix.hf.versions import disable_checkpointing, enable_checkpointing
from fastprefix.kv import to_flat, to_prefix_kv
from fastprefix.tuning import PrefixConfig, PrefixTuningModel

CHECKPOINTED = ", checkpointed"


@dataclass(frozen=True)
class TrainCase(ModelCase):
    """See :class:`ModelCase`. The prefix that is learned is in float32."""

    suite: ClassVar[str] = "train"
    figures: ClassVar[dict[str, str]] = {"ms": "ms a training step"}
    rounds: ClassVar[int] = 2
    warm_up: ClassVar[bool] = False  # the check does the same step

    L: int = 128

    @property
    def tolerance(self) -> float:
        """In bfloat16 that of a gradient that went through all layers."""
        return 1e-3 if self.dtype == "float32" else 1e-1

    def providers(self) -> tuple[str, ...]:
        """With and without gradient checkpointing."""
        return (
            OURS, OURS + CHECKPOINTED, PEFT, PEFT + CHECKPOINTED, REPEATED, NO_PREFIX,
        )  # fmt: skip

    def exact(self, inputs: Inputs) -> list[Tensor]:
        """Loss and gradient by the untouched model, the prefix repeated in its cache."""
        return [x.double() for x in self.make(REPEATED, inputs).result()]

    def make(self, provider: str, inputs: Inputs) -> Work:
        """A step, which is also what is compared: the loss, and the gradient [P, width]."""
        name = provider.removesuffix(CHECKPOINTED)
        model: Any = inputs.ours if name == OURS else inputs.plain
        context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        if provider != name:
            context = lambda: _checkpointed(model)  # noqa: E731
        with context():  # PEFT refuses it here
            leaf, loss = _side(name, inputs)

        def step() -> list[Tensor]:
            with context():
                found = loss()
                return [found.detach(), *torch.autograd.grad(found, [leaf])]

        return Work(step, timed(step, model.device))

    def held_bytes(self, provider: str) -> int:
        """The copies of the prefix, and their gradients."""
        return 2 * super().held_bytes(provider.removesuffix(CHECKPOINTED))

    def expected_s(self, pace: float = 1.0) -> float:
        """Seconds of the model's own products, and of the copies' keys."""
        if self.tiny:
            return 2.0
        rows = self.B * self.L / 512
        ours, copied = ((0.9 + each * self.P) * rows * pace for each in (1.5e-4, 1.8e-3))
        one = 2.3 * ours + 2 * copied + 0.8 * rows * pace
        return max(self.budget_s, self.rounds * one) + 2.5 * one + 2


def _side(name: str, inputs: Inputs) -> tuple[Tensor, Callable[[], Tensor]]:
    """The tensor to learn, and the loss."""
    ids, kv = inputs.ids, inputs.kvs[0]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if name == OURS:
        tuned = PrefixTuningModel(inputs.ours, PrefixConfig(kv.num_virtual_tokens), check=False)
        tuned.encoder.start_from(to_flat(kv))
        tuned.train()
        return tuned.encoder.embedding, lambda: tuned(**whole, use_cache=False).loss
    if name == PEFT:
        peft = peft_model(inputs.plain, inputs.kvs).train()
        return peft.prompt_encoder["0"].embedding.weight, lambda: peft(**whole).loss
    plain = inputs.plain
    if name == NO_PREFIX:
        embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
        bare = {"inputs_embeds": embedded, "attention_mask": whole["attention_mask"]}
        return embedded, lambda: plain(**bare, labels=ids, use_cache=False).loss
    leaf = to_flat(kv).float().requires_grad_()

    def repeated() -> Tensor:
        learned = to_prefix_kv(leaf.to(kv.dtype), kv.shapes)
        return lm.expanded_loss(plain, [learned] * len(ids), ids)

    return leaf, repeated


@contextlib.contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    enable_checkpointing(model)
    model.train()
    try:
        yield
    finally:
        disable_checkpointing(model)
        model.eval()


def largest_batch(peaks: Mapping[int, int], budget: int) -> int | None:
    """The largest batch whose step fits, by a line through two measured peaks.

    Args:
        peaks: bytes by batch, of one provider at one P and L.
        budget: bytes beyond the model's weights.

    Returns:
        The batch, or None unless two batches were measured and the larger one took more.
    """
    low, high = min(peaks, default=0), max(peaks, default=0)
    if low == high or peaks[high] <= peaks[low]:
        return None
    by_row = (peaks[high] - peaks[low]) / (high - low)
    return max(0, int((budget - peaks[low]) / by_row + low))


PUBLISHED = tuple(
    TrainCase(B, P)
    for B, P in ((4, 20), (1, 512), (4, 512), (1, 2048), (1, 8192))
)  # fmt: skip
TINY = (TrainCase(2, 6, 8, "float32", tiny=True),)
