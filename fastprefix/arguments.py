"""Keyword arguments that a function does not take: refused, with the name that was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def unknown_argument(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword argument that a function does not take; the caller raises it.

    Args:
        function: its name.
        name: of the argument that it got.
        known: the names that it takes.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {near[0]}?" if near else f"takes {', '.join(names) or 'none'}"
    return TypeError(f"{function}: got {name}, {meant}")


def refuses_unknown_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Has a function without ``**kwargs`` say which of its arguments a wrong name may have meant.

    Example:
        >>> @refuses_unknown_arguments
        ... def save(folder, selected_adapters=None): ...
        >>> save("out", selected_adapter=["a"])
        Traceback (most recent call last):
        TypeError: save: got selected_adapter, did you mean selected_adapters?
    """
    takes = inspect.signature(function).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [parameter.name for parameter in takes if parameter.kind in named]
    shown = [name for name in known if name not in ("self", "cls")]

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in known:
                raise unknown_argument(function.__name__, name, shown)
        return function(*args, **kwargs)

    return checked
