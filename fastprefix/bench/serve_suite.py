"""Suite ``serve``: one model and the prefixes of many tasks.

``mixed``: rows of all tasks in one batch; PEFT runs once for each task. ``switch``: a forward of
the next task's text in turn, so that every call switches the prefix; with a budget half of the
prefixes lie on the device, and every call loads its own from a file, which is the worst order.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
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
    last_logits,
    peft_model,
)
from fastprefix.hf import use_prefix
from fastprefix.kv import KVBudget, PackedPrefixKV, PrefixBank, PrefixKV

BUDGET = "fastprefix, half in the budget"


@dataclass(frozen=True)
class ServeCase(ModelCase):
    """See :class:`ModelCase`; the rows are those of all tasks when mixed, else of one.

    Attributes:
        work: mixed or switch.
        tasks: N, each with a prefix of its own.
        new: tokens made for each row when mixed.
    """

    suite: ClassVar[str] = "serve"
    figures: ClassVar[dict[str, str]] = {"ms": "ms for all rows"}

    work: str = "mixed"
    tasks: int = 4
    new: int = 8

    @property
    def label(self) -> str:
        """As tables write it."""
        return f"{self.work} {self.tasks} tasks {super().label}"

    def providers(self) -> tuple[str, ...]:
        """fastprefix, PEFT, a cache with a copy for each row, and the model without a prefix."""
        ours = (OURS,) if self.work == "mixed" else (OURS, BUDGET)
        return (*ours, PEFT, REPEATED, NO_PREFIX)

    def tokens(self) -> dict[str, int]:
        """All new ones."""
        return {"ms": self.B * self.new} if self.work == "mixed" else {}

    def inputs(self, device: torch.device) -> Inputs:
        """Texts, and a prefix for each task."""
        return self.inputs_of(device, self.tasks)

    def rows_of(self, task: int) -> list[int]:
        """The rows of a task: they take turns."""
        return list(range(task, self.B, self.tasks))

    def exact(self, inputs: Inputs) -> list[Tensor]:
        """Logits by the untouched model, the prefixes repeated in its cache."""
        return [x.double() for x in self.make(REPEATED, inputs).result()]

    def make(self, provider: str, inputs: Inputs) -> Work:
        """Compares the logits of every task's rows."""
        make = {"mixed": self._mixed, "switch": self._switching}[self.work]
        return make(provider, inputs)

    def _mixed(self, provider: str, inputs: Inputs) -> Work:
        ids, device = inputs.ids, inputs.ids.device
        if provider == OURS:
            packed = PackedPrefixKV.pack({str(i): kv for i, kv in enumerate(inputs.kvs)})
            rows = [str(row % self.tasks) for row in range(self.B)]

            def ours(do: Callable[[Any, Tensor], Tensor]) -> Tensor:
                with use_prefix(inputs.ours, packed, rows, check=False):
                    return do(inputs.ours, ids)

            return self._work(ours, device)
        if provider == PEFT:
            tuned = peft_model(inputs.plain, inputs.kvs)

            def one_by_one(do: Callable[[Any, Tensor], Tensor]) -> Tensor:
                found: dict[int, Tensor] = {}
                for task in range(self.tasks):
                    tuned.set_adapter(str(task))
                    mine = self.rows_of(task)
                    found.update(zip(mine, do(tuned, ids[mine]), strict=True))
                return torch.stack([found[row] for row in range(self.B)])

            return self._work(one_by_one, device)
        plain = inputs.plain
        if provider == NO_PREFIX:
            return self._work(lambda do: do(plain, ids), device)
        each = [inputs.kvs[row % self.tasks] for row in range(self.B)]
        longer = torch.cat([ids.new_ones(self.B, self.P), ids], dim=1)

        def repeated() -> Tensor:
            cache = lm.repeated_cache(plain, each)
            mask = torch.ones_like(longer)
            return lm.generate(plain, longer, mask, self.new, past_key_values=cache)

        return Work(lambda: [last_logits(plain, ids, each)], timed(repeated, device))

    def _work(
        self, rows: Callable[[Callable[[Any, Tensor], Tensor]], Tensor], device: torch.device
    ) -> Work:
        def tokens(model: Any, ids: Tensor) -> Tensor:
            return lm.generate(model, ids, torch.ones_like(ids), self.new)

        return Work(lambda: [rows(last_logits)], timed(lambda: rows(tokens), device))

    def _switching(self, provider: str, inputs: Inputs) -> Work:
        ids, plain = inputs.ids, inputs.plain
        forward: Callable[[int], Tensor]
        if provider in (OURS, BUDGET):
            # removed with the function that holds it
            home = tempfile.TemporaryDirectory() if provider == BUDGET else None
            prefixes = bank(inputs.kvs, None if home is None else home.name)

            def forward(task: int, home: Any = home) -> Tensor:
                with use_prefix(inputs.ours, prefixes[str(task)], check=False):
                    return last_logits(inputs.ours, ids)

        elif provider == PEFT:
            tuned = peft_model(plain, inputs.kvs)

            def forward(task: int) -> Tensor:
                tuned.set_adapter(str(task))
                return last_logits(tuned, ids)

        elif provider == NO_PREFIX:

            def forward(task: int) -> Tensor:
                return last_logits(plain, ids)

        else:

            def forward(task: int) -> Tensor:
                return last_logits(plain, ids, [inputs.kvs[task]] * len(ids))

        turn = itertools.cycle(range(self.tasks))
        return Work(
            lambda: [forward(task) for task in range(self.tasks)],
            timed(lambda: forward(next(turn)), ids.device),
        )

    def expected_s(self, pace: float = 1.0) -> float:
        """By what steps take; PEFT takes one for each task."""
        if self.tiny:
            return 2.0
        ours, copied = self.step_s(pace)
        one = 2 * (ours + copied) + 0.035 * pace * self.tasks * (self.work == "mixed")
        one *= self.new + self.B * self.L / 100 if self.work == "mixed" else 2
        return max(self.budget_s, (self.rounds + 1) * one) + 2 * one + 0.5 * self.tasks


def bank(kvs: tuple[PrefixKV, ...], folder: str | None) -> PrefixBank:
    """The prefixes by their numbers.

    Args:
        kvs: the prefixes.
        folder: None to hold all of them; or the home of those that a budget for half has evicted.
    """
    half = -(-sum(kv.nbytes for kv in kvs) // 2)
    found = PrefixBank(None if folder is None else KVBudget(half, folder, kvs[0].device))
    for i, kv in enumerate(kvs):
        found.add(str(i), kv)
    return found


PUBLISHED = (
    *(ServeCase(B, P, work="mixed", tasks=tasks) for tasks, B, P in ((4, 16, 128), (16, 16, 512))),
    *(ServeCase(B, P, work="switch", tasks=8) for B, P in ((4, 512), (1, 2048))),
)
TINY = tuple(
    ServeCase(3, 6, 4, "float32", tiny=True, work=work, tasks=2, new=3)
    for work in ("mixed", "switch")
)
