"""What a comparison runs: methods, a grid of settings, learning rates to try, seeds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator

from fastprefix.arguments import nearest
from fastprefix.tasks.registry import get_task
from fastprefix.training.config import RunConfig
from fastprefix.training.settings import Settings

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One place of the grid: a method with its settings, before learning rate and seed.

    Attributes:
        method: the method's title.
        point: the value on each axis of the grid; empty for a method that is not varied.
        values: fields of :class:`RunConfig`, all but ``learning_rate`` and ``seed``.
        rates: the learning rates to try; None stands for the method's default.
    """

    method: str
    point: Values = field(hash=False)
    values: Values = field(hash=False)
    rates: tuple[float | None, ...]

    @property
    def label(self) -> str:
        """The title with the point, unique within a comparison."""
        told = [f"{field_title(axis)} {shown_value(value)}" for axis, value in self.point.items()]
        return ", ".join([self.method, *told])


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    cell: Cell
    learning_rate: float | None
    seed: int

    @property
    def config(self) -> RunConfig:
        """Its configuration."""
        own = {"learning_rate": self.learning_rate, "seed": self.seed}
        return RunConfig.of({**self.cell.values, **own}, self.cell.label)

    @property
    def label(self) -> str:
        """What it is, in words."""
        rate = "" if self.learning_rate is None else f", learning rate {self.learning_rate:g}"
        return f"{self.cell.label}{rate}, seed {self.seed}"


class CompareConfig(Settings):
    """A comparison, from one YAML file.

    A method's ``learning_rate`` may be a list. Then each rate is tried with the first seed, the one
    with the lowest validation loss is chosen, and all seeds run with it. The test set plays no part
    in the choice.

    Attributes:
        title: of the report.
        notes: text for the report; an empty line begins a new paragraph.
        base: fields of :class:`RunConfig` that all methods share.
        methods: the fields of each method, by its title. They replace those of ``base``, mappings
            such as ``options`` as a whole.
        grid: values to try, by field. A dot reaches into a mapping:
            ``options.num_virtual_tokens: [10, 20]``. Several fields make a product.
        vary: titles of the methods that the grid applies to; None for all.
        seeds: each method that trains runs with each of them.
        metric: decides which method is best: one of the task's metrics, or "loss". None for the
            task's first.
    """

    title: str = "Ways to train, compared"
    notes: str = ""
    base: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    vary: list[str] | None = None
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    metric: str | None = None

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        for name in self.vary or ():
            if name not in self.methods:
                raise ValueError(f"vary: got {name!r}, {_one_of(name, self.methods)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}, takes each once")
        for axis, values in self.grid.items():
            _check_axis(axis, values)
        for title, fields in self.methods.items():
            _check_fields(f"methods.{title}", fields)
            if isinstance(fields.get("learning_rate"), list) and "learning_rate" in self.grid:
                raise ValueError(
                    f"methods.{title}: learning_rate: got a list, but it is in the grid as well"
                )
        _check_fields("base", self.base)
        self._check_cells()
        return self

    def _check_cells(self) -> None:
        cells = self.cells()
        labels = [cell.label for cell in cells]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"methods: two are named {label!r}, takes different names")
        tasks = {run.config.task for cell in cells for run in self.first_runs(cell)}
        if len(tasks) > 1:
            raise ValueError(f"task: got {sorted(tasks)}, takes one for all methods")
        metrics = (*get_task(tasks.pop()).metrics, "loss")
        if self.metric is not None and self.metric not in metrics:
            raise ValueError(f"metric: got {self.metric!r}, {_one_of(self.metric, metrics)}")

    @property
    def task(self) -> str:
        """The name of the task, which all methods share."""
        return Run(self.cells()[0], None, self.seeds[0]).config.task

    @property
    def deciding_metric(self) -> str:
        """The metric that decides."""
        return self.metric or get_task(self.task).metrics[0]

    def cells(self) -> list[Cell]:
        """The places of the grid, method by method."""
        return list(self._cells())

    def _cells(self) -> Iterator[Cell]:
        for title, fields in self.methods.items():
            varied = self.vary is None or title in self.vary
            axes = self.grid if varied else {}
            for combination in itertools.product(*axes.values()):
                point = dict(zip(axes, combination, strict=True))
                values: dict[str, Any] = {**self.base, **fields}
                for axis, value in point.items():
                    values = _with(values, axis, value)
                rates = values.pop("learning_rate", None)
                rates = rates if isinstance(rates, list) else [rates]
                yield Cell(title, point, values, tuple(map(_rate, rates)))

    def first_runs(self, cell: Cell) -> list[Run]:
        """Those that come first: at each learning rate to try, or all seeds if it is only one."""
        if len(cell.rates) == 1:
            return self.runs_at(cell, cell.rates[0])
        return [Run(cell, rate, self.seeds[0]) for rate in cell.rates]

    def runs_at(self, cell: Cell, rate: float | None) -> list[Run]:
        """All seeds at a learning rate; only the first if nothing is trained."""
        return [Run(cell, rate, seed) for seed in self._seeds(cell)]

    def number_of_runs(self) -> int:
        """How many there are, whatever rates will be chosen."""
        return sum(len(cell.rates) - 1 + len(self._seeds(cell)) for cell in self.cells())

    def _seeds(self, cell: Cell) -> tuple[int, ...]:
        return self.seeds[:1] if cell.values.get("method") == "none" else self.seeds


def field_title(axis: str) -> str:
    """The last part of a dotted field, in words."""
    return axis.rpartition(".")[2].replace("_", " ")


def shown_value(value: Any) -> str:
    """A value of an axis, for people."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _with(values: Values, axis: str, value: Any) -> dict[str, Any]:
    """The values with one more, at a dotted place."""
    name, _, rest = axis.partition(".")
    return {**values, name: _with(values.get(name) or {}, rest, value) if rest else value}


def _check_fields(where: str, values: Values) -> None:
    if "seed" in values:
        raise ValueError(f"{where}: seed: got {values['seed']!r}, takes none; seeds is for that")
    for name in values:
        if name not in RunConfig.model_fields:
            raise ValueError(f"{where}: {name}: unknown; {_one_of(name, RunConfig.model_fields)}")
    rates = values.get("learning_rate")
    if isinstance(rates, list):
        rates = [_rate(rate) for rate in rates]
        if not rates or None in rates or len(set(rates)) < len(rates):
            raise ValueError(
                f"{where}: learning_rate: got {rates}, takes one or several different ones"
            )


def _rate(value: Any) -> float | None:
    """A learning rate; YAML reads 1e-3 as text."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"learning_rate: got {value!r}, takes a number") from None


def _check_axis(axis: str, values: Sequence[Any]) -> None:
    name, _, rest = axis.partition(".")
    if name == "seed":
        raise ValueError("grid: got seed, takes other fields; seeds is for that")
    if name not in RunConfig.model_fields:
        raise ValueError(f"grid: {axis}: unknown; {_one_of(name, RunConfig.model_fields)}")
    if rest and "dict" not in str(RunConfig.model_fields[name].annotation):
        raise ValueError(f"grid: {axis}: {name} is no mapping, takes {name}")
    if not values or len({*map(repr, values)}) < len(values):
        raise ValueError(f"grid: {axis}: got {values}, takes one or several different values")


def _one_of(name: str, known: Any) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"takes {', '.join(known)}"
