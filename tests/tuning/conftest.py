"""The behaviours of PEFT, each run on both libraries; see ``fastprefix_testing.libraries``."""

import itertools
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version

import fastprefix_testing.models as tiny
from fastprefix_testing.libraries import LIBRARIES, METHODS, MODELS


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "cells(models=, methods=): of which a test's `cell` is made; of all, unless named; each "
        "model has two of the methods in turn, the other cells are slow",
        "only(library): one of the libraries alone",
        "peft_fails(error, reason=, models=, methods=, before=, transformers=): PEFT does not do "
        "this, and is held to that; before= names the first version that does, transformers= the "
        "first with which it does not",
    ):
        config.addinivalue_line("markers", line)


def _concerns(mark: pytest.Mark, model: str, method: str) -> bool:
    models, methods = mark.kwargs.get("models"), mark.kwargs.get("methods")
    return (models is None or model in models) and (methods is None or method in methods)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``cell``: each library with each model and each method that the test is about."""
    if "cell" not in metafunc.fixturenames:
        return
    cells = list(metafunc.definition.iter_markers("cells"))
    only = metafunc.definition.get_closest_marker("only")
    models, methods = (
        [name for name in names if all(name in mark.kwargs.get(key, names) for mark in cells)]
        for key, names in (("models", MODELS), ("methods", METHODS))
    )
    made = []
    for library in (only.args[0],) if only else LIBRARIES:
        for (row, model), (column, method) in itertools.product(
            enumerate(models), enumerate(methods)
        ):
            marks = [pytest.mark.peft] if library == "peft" else []
            if (column - 2 * row) % len(methods) > 1:
                marks.append(pytest.mark.slow)
            name = f"{library}-{model}-{method}"
            made.append(pytest.param((library, model, method), id=name, marks=marks))
    metafunc.parametrize("cell", made, indirect=True)


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Any:
    """A library, a model and a method."""
    library, model, method = request.param
    return LIBRARIES[library](model, method)


@pytest.fixture
def other(cell: Any) -> Any:
    """The other library, with the same model and method."""
    library = next(one for name, one in LIBRARIES.items() if name != cell.library)
    return library(cell.model, cell.method)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test marked `peft_fails` must fail with PEFT, so that the mark stays true."""
    spec = getattr(pyfuncitem, "callspec", None)
    library, *cell = spec.params.get("cell", ("",)) if spec else ("",)
    known = [
        mark
        for mark in pyfuncitem.iter_markers("peft_fails")
        if library == "peft" and _concerns(mark, *cell) and not _is_mended(mark)
    ]
    if not known:
        return (yield)
    try:
        yield
    except tuple(mark.args[0] for mark in known):
        return True
    pytest.fail(f"PEFT does this now, of which is said: {known[0].kwargs['reason']}")


def _is_mended(mark: pytest.Mark) -> bool:
    before, broken_by = mark.kwargs.get("before"), mark.kwargs.get("transformers")
    if before is not None and Version(version("peft")) >= Version(before):
        return True
    return broken_by is not None and Version(version("transformers")) < Version(broken_by)


@pytest.fixture
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four texts of one length: PEFT's causal classifiers read padding."""
    return tiny.batch((5, 5, 5, 5), "right")
