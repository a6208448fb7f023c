"""Suite ``generate``: greedy generation behind one prefix that all rows share.

Two figures of every run: a step, which makes one token for every row, and all of generate(), the
forward of the text and a cache's copies for each row included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprefix.bench import language_model as lm
from fastprefix.bench.case import OURS, Case, Figures, Work, synchronize
from fastprefix.bench.model_sides import (
    NO_PREFIX,
    PEFT,
    REPEATED,
    Inputs,
    held_bytes,
    inputs,
    last_logits,
    peft_model,
)
from fastprefix.hf import use_prefix

CHECKED = 2  # rows of the batch that are compared


@dataclass(frozen=True)
class GenerateCase(Case):
    """SmolLM2-135M in bfloat16, or a tiny model.

    Attributes:
        B: rows.
        P: tokens of the prefix; with 0 only what the patch costs is measured.
        L: tokens of each row's text.
        new: tokens made for each row.
        tiny: whether the model is.
    """

    suite: ClassVar[str] = "generate"
    figures: ClassVar[dict[str, str]] = {
        "step_ms": "ms a decoding step", "generate_ms": "ms of generate(), the text's forward too",
    }  # fmt: skip
    bound: ClassVar[str | None] = NO_PREFIX
    rounds: ClassVar[int] = 3
    budget_s: ClassVar[float] = 6.0

    B: int
    P: int
    L: int = 16
    new: int = 8
    tiny: bool = False

    @property
    def label(self) -> str:
        """As tables write it."""
        return f"{'tiny' if self.tiny else 'SmolLM2'} B{self.B} P{self.P} text {self.L}"

    @property
    def tolerance(self) -> float:
        """Of logits: in bfloat16 two orders of rounding through all layers."""
        return 1e-3 if self.tiny else 5e-2

    def providers(self) -> tuple[str, ...]:
        """fastprefix, PEFT, a cache with a copy for each row, and the model without a prefix."""
        return (OURS, PEFT, REPEATED, NO_PREFIX) if self.P else (OURS, NO_PREFIX)

    def tokens(self) -> dict[str, int]:
        """A step makes one for every row."""
        return {"step_ms": self.B, "generate_ms": self.B * self.new}

    def inputs(self, device: torch.device) -> Inputs:
        """Texts and a prefix."""
        return inputs(self.tiny, device, self.B, self.L, self.P)

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
            return self._work(plain, lambda: (inputs.ids, mask, {}), lambda: last_logits(plain, few))
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

        def run() -> Figures:
            times = [_now(device)]
            with context():
                ids, mask, more = arguments()
                clock = lm.Clock(lambda: times.append(_now(device)))
                lm.generate(model, ids, mask, self.new, stopping_criteria=[clock], **more)
            steps = [1e3 * (b - a) for a, b in zip(times[1:-1], times[2:], strict=True)]
            return {"step_ms": steps, "generate_ms": [1e3 * (times[-1] - times[0])]}

        def result() -> list[Tensor]:
            with context():
                return [logits()]

        return Work(result, run)

    def held_bytes(self, provider: str) -> int:
        """The copies of the prefix."""
        return 0 if self.tiny else held_bytes(provider, self.B, self.P)

    def expected_s(self) -> float:
        """By the bytes of all copies that all steps read, and the model's own products."""
        if self.tiny:
            return 2.0
        step = 0.035 + 0.0016 * self.B
        ours = step + 2.5e-7 * self.B * self.P
        copied = step + 3.2e-6 * self.B * self.P * (held_bytes(REPEATED, self.B, self.P) < 8e9)
        one = (step + ours + 2 * copied) * (self.new + self.B * self.L / 100)
        return max(self.budget_s, (self.rounds + 1) * one) + 2 * one


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


PUBLISHED = tuple(
    GenerateCase(B, P)
    for B, P in (
        (1, 0), (16, 0), (1, 20), (16, 20), (16, 128), (1, 512), (16, 512), (64, 512),
        (1, 2048), (16, 2048), (1, 8192), (4, 8192), (64, 8192),
    )
)  # fmt: skip
TINY = tuple(GenerateCase(2, P, L=4, new=3, tiny=True) for P in (0, 6))
