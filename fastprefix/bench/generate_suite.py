"""Suite ``generate``: greedy generation behind one prefix that all rows share.

Two figures of every run: a step, which makes one token for every row, and all of generate(), the
forward of the text and a cache's copies for each row included.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprefix.bench import language_model as lm
from fastprefix.bench.case import OURS, Figures, Work, synchronize
from fastprefix.bench.model_sides import (
    NO_PREFIX,
    PEFT,
    Inputs,
    ModelCase,
    last_logits,
    peft_model,
)
from fastprefix.hf import use_prefix

PEAK_STEPS = 2  # with them memory has been at its peak: the text's forward, and a step
CHECKED = 2  # rows of the batch that are compared


@dataclass(frozen=True)
class GenerateCase(ModelCase):
    """See :class:`ModelCase`. With P 0 only what the patch costs is measured.

    Attributes:
        new: tokens made for each row.
    """

    suite: ClassVar[str] = "generate"
    figures: ClassVar[dict[str, str]] = {
        "step_ms": "ms a decoding step", "generate_ms": "ms of generate(), the text's forward too",
    }  # fmt: skip

    new: int = 8

    def tokens(self) -> dict[str, int]:
        """A step makes one for every row."""
        return {"step_ms": self.B, "generate_ms": self.B * self.new}

    def exact(self, inputs: Inputs) -> list[Tensor]:
        """Logits of the first rows by the untouched model, the prefix repeated in its cache."""
        ids = inputs.ids[:CHECKED]
        return [last_logits(inputs.plain, ids, inputs.kvs * len(ids)).double()]

    def make(self, provider: str, inputs: Inputs) -> Work:
        """Compares logits, and times generate()."""
        few = inputs.ids[:CHECKED]
        mask = torch.ones_like(inputs.ids)
        if provider == OURS:
            return self._work(
                inputs.ours, lambda: (inputs.ids, mask, {}), lambda: last_logits(inputs.ours, few),
                lambda: use_prefix(inputs.ours, inputs.kv, check=False),
            )  # fmt: skip
        if provider == PEFT:
            tuned = peft_model(inputs.plain, inputs.kvs)
            return self._work(
                tuned, lambda: (inputs.ids, mask, {}), lambda: last_logits(tuned, few)
            )
        if provider == NO_PREFIX:
            plain = inputs.plain
            return self._work(
                plain, lambda: (inputs.ids, mask, {}), lambda: last_logits(plain, few)
            )
        # which tokens stand for the cached keys makes no difference: nothing reads them
        ids = torch.cat([inputs.ids.new_ones(self.B, self.P), inputs.ids], dim=1)
        whole, rows = torch.ones_like(ids), inputs.kvs * self.B
        return self._work(
            inputs.plain,
            lambda: (ids, whole, {"past_key_values": lm.repeated_cache(inputs.plain, rows)}),
            lambda: last_logits(inputs.plain, few, inputs.kvs * len(few)),
        )

    def _work(
        self,
        model: Any,
        arguments: Callable[[], tuple[Tensor, Tensor, dict[str, Any]]],
        logits: Callable[[], Tensor],
        context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Work:
        device = model.device

        def run(new: int = self.new) -> Figures:
            times = [_now(device)]
            with context():
                ids, mask, more = arguments()
                clock = lm.Clock(lambda: times.append(_now(device)))
                lm.generate(model, ids, mask, new, stopping_criteria=[clock], **more)
            steps = [1e3 * (b - a) for a, b in itertools.pairwise(times[1:])]
            return {"step_ms": steps, "generate_ms": [1e3 * (times[-1] - times[0])]}

        def result() -> list[Tensor]:
            with context():
                return [logits()]

        return Work(result, run, lambda: run(PEAK_STEPS))

    def expected_s(self, pace: float = 1.0) -> float:
        """By what steps take; memory is measured in a slower process."""
        if self.tiny:
            return 2.0
        ours, copied = self.step_s(pace)
        one = 2 * (ours + copied) * (self.new + self.B * self.L / 100)
        return max(self.budget_s, (self.rounds + 1) * one) + one + 2


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


PUBLISHED = tuple(
    GenerateCase(B, P)
    for B, P in (
        (1, 0), (16, 0), (1, 20), (16, 20), (1, 512), (16, 512), (64, 128), (16, 2048),
        (1, 8192), (4, 8192), (64, 8192),
    )
)  # fmt: skip
TINY = tuple(GenerateCase(2, P, L=4, dtype="float32", tiny=True, new=3) for P in (0, 6))
