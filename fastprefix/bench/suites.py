"""All suites by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fastprefix.bench import generate_suite, operator_suite, serve_suite, train_suite
from fastprefix.bench.case import Case
from fastprefix.bench.model_sides import ModelCase

SUITES: dict[str, tuple[tuple[Case, ...], tuple[Case, ...]]] = {
    "operator": (operator_suite.PUBLISHED, operator_suite.TINY),
    "generate": (generate_suite.PUBLISHED, generate_suite.TINY),
    "train": (train_suite.PUBLISHED, train_suite.TINY),
    "serve": (serve_suite.PUBLISHED, serve_suite.TINY),
}


def cases(
    suites: Iterable[str] = (), *, tiny: bool = False, only: str = "", dtype: str = "bfloat16"
) -> list[Case]:
    """The cases of suites, in their order.

    Args:
        suites: names; all if there are none.
        tiny: a few cases that show that everything works; their figures say nothing.
        only: a text that must be in the label of a case.
        dtype: of SmolLM2's weights.

    Raises:
        ValueError: there is no such suite, or no such case.
    """
    chosen = list(suites) or list(SUITES)
    for name in chosen:
        if name not in SUITES:
            raise ValueError(f"suites: got {name!r}, takes {', '.join(SUITES)}")
    listed = [case for name in chosen for case in SUITES[name][tiny]]
    if not tiny:
        listed = [replace(c, dtype=dtype) if isinstance(c, ModelCase) else c for c in listed]
    found = [case for case in listed if only in case.label]
    if not found:
        raise ValueError(f"case: got {only!r}, which is in no label of {', '.join(chosen)}")
    return found
