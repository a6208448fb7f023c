"""What a function was given: names that it does not take, and values of the wrong kind.

Errors say, in one line, the argument, what it got and what it takes.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Class = TypeVar("_Class", bound=type)
# Marks a function that refuses already.
_CHECKED = "_refuses_unknown_arguments"


def unknown_argument(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword argument that a function does not take; the caller raises it.

    Args:
        function: its name.
        name: of the argument that it got.
        known: the names that it takes.
    """
    names = list(known)
    near = nearest(name, names)
    meant = f"did you mean {near}?" if near else f"takes {', '.join(names) or 'none'}"
    return TypeError(f"{function}: got {name}, {meant}")


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that is most like a name; None where none is so much like it.

    Args:
        name: that was given.
        known: names to choose from.
        likeness: from 0 (any) to 1 (the same), as difflib's ratio measures it.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return near[0] if near else None


def refuses_unknown_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Has a function without ``**kwargs`` say which of its arguments a wrong name may have meant.

    Example:
        >>> @refuses_unknown_arguments
        ... def save(folder, selected_adapters=None): ...
        >>> save("out", selected_adapter=["a"])
        Traceback (most recent call last):
        TypeError: save: got selected_adapter, did you mean selected_adapters?
    """
    names = _named(function)
    known = frozenset(names)
    shown = [name for name in names if name not in ("self", "cls")]
    # of a class, what its users call
    told = function.__name__
    if told == "__init__":
        told = function.__qualname__.split(".")[-2]

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in known:
                raise unknown_argument(told, name, shown)
        return function(*args, **kwargs)

    vars(checked)[_CHECKED] = True
    return checked


def methods_refuse_unknown_arguments(cls: _Class) -> _Class:
    """Has ``__init__`` and the public methods of a class refuse names as a function does.

    Those that it defines itself, a dataclass's ``__init__`` among them, and that take arguments by
    name but no ``**kwargs``.
    """
    for name, found in list(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        kind = type(found) if isinstance(found, (classmethod, staticmethod)) else None
        function = found.__func__ if kind is not None else found
        if not inspect.isfunction(function) or _CHECKED in vars(function):
            continue
        if _named(function) and not _takes_any(function):
            checked = refuses_unknown_arguments(function)
            setattr(cls, name, checked if kind is None else kind(checked))
    return cls


def _named(function: Callable[..., object]) -> list[str]:
    """The names of what a function takes by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in takes if parameter.kind in named]


def _takes_any(function: Callable[..., object]) -> bool:
    takes = inspect.signature(function).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes)


def shown(value: object) -> str:
    """A value in a message: what is short as it is written, anything else by its type."""
    if isinstance(value, (torch.Tensor, os.PathLike)) or not isinstance(
        value, (str, int, float, tuple, list, type(None))
    ):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else type(value).__name__


def check_type(name: str, value: object, kind: type | tuple[type, ...], takes: str) -> None:
    """TypeError unless a value is of a type; bool is no number."""
    wrong = isinstance(value, bool) and bool not in (kind if isinstance(kind, tuple) else (kind,))
    if wrong or not isinstance(value, kind):
        raise TypeError(f"{name}: got {shown(value)}, takes {takes}")


def check_whole(name: str, value: Any, least: int, none: bool = False) -> None:
    """TypeError or ValueError unless a value is a whole number from `least` on, or may be None."""
    if value is None and none:
        return
    takes = f"{least} or more" + (", or None" if none else "")
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {shown(value)}, takes a whole number, {takes}") from None
    if number < least:
        raise ValueError(f"{name}: got {value}, takes {takes}")


def check_number(name: str, value: object) -> None:
    """TypeError unless a value is a number."""
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return  # the symbols are torch.compile's
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {shown(value)}, takes a number")


def check_flag(name: str, value: object) -> None:
    """TypeError unless a value is True or False: any text, "False" too, would count as True."""
    numpys = type(value).__name__ in ("bool_", "bool")
    if numpys or isinstance(value, (bool, torch.SymBool)):
        return
    if isinstance(value, int) and value in (0, 1):
        return
    raise TypeError(f"{name}: got {shown(value)}, takes True or False")


def check_names(name: str, value: object, what: str) -> None:
    """TypeError unless a value is a sequence of text or None: one text is one of letters."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: got {shown(value)}, takes {what}")
    for one in () if isinstance(value, Iterator) else value:  # which could be looked at but once
        if one is not None and not isinstance(one, str):
            raise TypeError(f"{name}: got {shown(one)} among them, takes {what}")


def as_path(name: str, value: Any) -> Path:
    """A path.

    Raises:
        TypeError: it is none.
    """
    check_type(name, value, (str, os.PathLike), "a path")
    return Path(value)


def as_device(name: str, value: Any) -> torch.device:
    """A device.

    Raises:
        TypeError: it is none, nor a device's name.
        ValueError: no device has such a name.
    """
    check_type(name, value, (str, int, torch.device), "a device, 'cpu' or 'cuda:0' say")
    try:
        return torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"{name}: got {shown(value)}, takes a device, 'cpu' or 'cuda:0' say"
        ) from None
