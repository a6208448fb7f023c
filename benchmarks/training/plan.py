"""What is compared: methods, tasks, runs, and the budget that all of them have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

Kind = Literal["prefix", "prompt", "lora", "bottleneck", "bitfit", "full", "head", "none"]
TaskName = Literal["e2e", "news"]

# The text that prefixes start from where they start from a text.
START = {
    "e2e": "Describe the restaurant in one sentence that mentions every attribute.\n",
    "news": "News about business, entertainment, politics, sport or technology.",
}
SEEDS = (0, 1, 2)
SMALL = 16  # training records where there is little data


@dataclass(frozen=True)
class Method:
    """A way to tune.

    Attributes:
        name: unique within its task, fit for a file's name.
        title: for tables.
        kind: what builds it; "none" trains nothing.
        options: of PrefixConfig, PromptConfig, peft's LoraConfig or the bottleneck's size.
        rates: learning rates tried first; the best of them is used from then on.
        like: the method whose learning rate it takes, in place of rates of its own.
        seeds: with which it runs; where `every_rate` is set all of them at every rate, otherwise
            the first.
        every_rate: see seeds.
        train_size: training examples it may see; None for the budget's.
    """

    name: str
    title: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rates: tuple[float, ...] = ()
    like: str | None = None
    seeds: tuple[int, ...] = (0,)
    every_rate: bool = False
    train_size: int | None = None

    def __post_init__(self) -> None:
        if bool(self.rates) == (self.like is not None):
            raise ValueError(f"{self.name}: takes rates or like, one of them")

    @property
    def built_from(self) -> tuple[str, Mapping[str, Any]]:
        """All that its model depends on; what it is called and what is tried with it are not."""
        return self.kind, dict(self.options)


@dataclass(frozen=True)
class Budget:
    """What every run of a task may use.

    Attributes:
        steps: optimizer steps, the first tenth of which warm up; the rate then falls linearly.
        batch_size: examples a step.
        train_size: examples to train with.
        dev_size: held-out examples by which learning rates are chosen.
        test_size: held-out examples that are reported; of E2E meaning representations.
        max_length: tokens of an example; longer news are cut, longer records left out.
        max_new_tokens: of a generated description.
        bf16: compute in bfloat16 by autocast; what is trained is float32 all the same.
    """

    steps: int
    batch_size: int
    train_size: int
    dev_size: int
    test_size: int
    max_length: int
    max_new_tokens: int = 0
    bf16: bool = False


BUDGETS: dict[TaskName, Budget] = {
    "e2e": Budget(24, 4, 640, 24, 40, 160, max_new_tokens=48, bf16=True),
    "news": Budget(40, 16, 640, 200, 200, 48),
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: TaskName
    method: Method
    learning_rate: float
    seed: int
    budget: Budget

    @property
    def key(self) -> str:
        """The name of its file of results."""
        return f"{self.task}-{self.method.name}-lr{self.learning_rate:g}-seed{self.seed}"

    def fingerprint(self, material: str) -> str:
        """Changes whenever a result of the run would no longer be one.

        Args:
            material: what identifies the model and the data.
        """
        what = [self.task, self.method.built_from, self.method.train_size, self.learning_rate]
        return fingerprint(*what, self.seed, asdict(self.budget), material)


def fingerprint(*what: Any) -> str:
    """Of anything that JSON can hold: equal for equal things, here and in other processes."""
    text = json.dumps(what, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def _prefix(name: str, title: str, like: str | None = "prefix", **options: Any) -> Method:
    return Method(name, title, "prefix", {"num_virtual_tokens": 20} | options, like=like)


_MLP: dict[str, Any] = {
    "num_virtual_tokens": 20,
    "prefix_projection": True,
    "encoder_hidden_size": 512,
}
_TEXT: dict[str, Any] = {"num_virtual_tokens": 20, "init": "text", "init_text": START["e2e"]}

E2E: tuple[Method, ...] = (
    Method("none", "no tuning", "none", rates=(0.0,)),
    Method(
        "prefix", "prefix, direct", "prefix", {"num_virtual_tokens": 20},
        rates=(3e-2, 1e-1, 3e-1), seeds=SEEDS, every_rate=True,
    ),
    Method(
        "prefix-mlp2", "prefix, MLP of 2 layers", "prefix", _MLP | {"encoder_num_layers": 2},
        rates=(3e-4, 1e-3, 3e-3), seeds=SEEDS, every_rate=True,
    ),
    Method(
        "prompt", "prompt tuning", "prompt", {"num_virtual_tokens": 20, "init": "vocab"},
        rates=(5e-2, 2e-1, 5e-1), seeds=SEEDS,
    ),
    Method("lora", "LoRA, rank 8", "lora", {"r": 8}, rates=(3e-3, 1e-2, 3e-2), seeds=SEEDS),
    _prefix("prefix-mlp1", "prefix, MLP of 1 layer", "prefix-mlp2", **_MLP, encoder_num_layers=1),
    _prefix("prefix-mlp3", "prefix, MLP of 3 layers", "prefix-mlp2", **_MLP, encoder_num_layers=3),
    _prefix(
        "prefix-lstm", "prefix, LSTM", "prefix-mlp2", **_MLP,
        encoder_reparameterization_type="LSTM", encoder_num_layers=1,
    ),
    _prefix("prefix-shared", "prefix, one block for all layers", share_layers=True),
    _prefix("prefix-text", "prefix, started from a text", **_TEXT),
    _prefix("prefix-bias", "prefix, learned bias", prefix_bias="learned"),
    _prefix("prefix-gated", "prefix, gated", gated=True),
    _prefix("prefix-5", "prefix, 5 tokens", num_virtual_tokens=5),
    _prefix("prefix-10", "prefix, 10 tokens", num_virtual_tokens=10),
    _prefix("prefix-50", "prefix, 50 tokens", num_virtual_tokens=50),
    _prefix("prefix-100", "prefix, 100 tokens", num_virtual_tokens=100),
    Method(
        "embedding", "embeddings alone, random start", "prompt", {"num_virtual_tokens": 20},
        like="prompt", seeds=(0, 1),
    ),
    Method(
        "p-tuning", "P-tuning v1, LSTM", "prompt",
        {"num_virtual_tokens": 20, "encoder_reparameterization_type": "LSTM"},
        rates=(3e-3, 1e-2),
    ),
    Method(
        "infix", "infix, embeddings", "prompt",
        {"num_virtual_tokens": 20, "init": "vocab", "placement": "infix"},
        like="prompt", seeds=(0, 1),
    ),
    Method("bottleneck", "bottleneck adapters, width 16", "bottleneck", {"width": 16}, like="lora"),
    Method("full", "full fine-tuning", "full", rates=(1e-4, 3e-4)),
    Method(
        "small-random", f"prefix, random start, {SMALL} records", "prefix",
        {"num_virtual_tokens": 20}, like="prefix", seeds=(0, 1), train_size=SMALL,
    ),
    Method(
        "small-text", f"prefix, started from a text, {SMALL} records", "prefix", _TEXT,
        like="prefix", seeds=(0, 1), train_size=SMALL,
    ),
)  # fmt: skip

_HIGH = (1e-1, 3e-1)
NEWS: tuple[Method, ...] = (
    Method("head", "the head alone", "head", rates=_HIGH),
    Method(
        "p-tuning-v2", "P-tuning v2 (deep prefix)", "prefix", {"num_virtual_tokens": 20},
        rates=_HIGH, seeds=SEEDS,
    ),
    Method(
        "prefix-mlp2", "prefix, MLP of 2 layers", "prefix", _MLP | {"encoder_num_layers": 2},
        rates=(1e-3, 3e-3),
    ),
    Method(
        "prompt", "prompt tuning", "prompt", {"num_virtual_tokens": 20, "init": "vocab"},
        rates=_HIGH, seeds=SEEDS,
    ),
    Method("lora", "LoRA, rank 8", "lora", {"r": 8}, rates=(3e-3, 1e-2), seeds=SEEDS),
    Method("bitfit", "BitFit", "bitfit", rates=(1e-2, 3e-2)),
    Method(
        "bottleneck", "bottleneck adapters, width 16", "bottleneck", {"width": 16},
        rates=(1e-2, 3e-2),
    ),
    Method("full", "full fine-tuning", "full", rates=(3e-4, 1e-3), seeds=SEEDS),
)  # fmt: skip

METHODS: dict[TaskName, tuple[Method, ...]] = {"e2e": E2E, "news": NEWS}


def first_runs(
    task: TaskName, methods: Sequence[Method] | None = None, budget: Budget | None = None
) -> list[Run]:
    """Those that choose the learning rates: every method that has some of its own."""
    budget = budget or BUDGETS[task]
    return [
        Run(task, method, rate, seed, budget)
        for method in methods or METHODS[task]
        for rate in method.rates
        for seed in (method.seeds if method.every_rate else method.seeds[:1])
    ]


def best_rates(dev_losses: Mapping[Run, float], methods: Sequence[Method]) -> dict[str, float]:
    """The learning rate of each method, chosen by held-out loss, the mean over seeds.

    Args:
        dev_losses: of the first runs; not a number counts as infinite.
        methods: of one task.

    Raises:
        ValueError: a method takes the rate of one that has none of its own, or never ran.
    """
    chosen: dict[str, float] = {}
    for method in methods:
        tried: dict[float, list[float]] = {}
        for run, loss in dev_losses.items():
            if run.method.name == method.name:
                tried.setdefault(run.learning_rate, []).append(
                    loss if loss == loss else float("inf")
                )
        if method.rates:
            if set(tried) != set(method.rates):
                raise ValueError(f"{method.name}: ran at {sorted(tried)}, not at {method.rates}")
            chosen[method.name] = min(tried, key=lambda rate: fmean(tried[rate]))
    for method in methods:
        if method.like is not None:
            if method.like not in chosen:
                raise ValueError(f"{method.name}: {method.like} has no learning rate of its own")
            chosen[method.name] = chosen[method.like]
    return chosen


def further_runs(
    task: TaskName,
    rates: Mapping[str, float],
    methods: Sequence[Method] | None = None,
    budget: Budget | None = None,
) -> list[Run]:
    """All others: every method at its learning rate, with all its seeds."""
    methods, budget = methods or METHODS[task], budget or BUDGETS[task]
    known = {run.key for run in first_runs(task, methods, budget)}
    runs = [
        Run(task, method, rates[method.name], seed, budget)
        for method in methods
        for seed in method.seeds
    ]
    return [run for run in runs if run.key not in known]
