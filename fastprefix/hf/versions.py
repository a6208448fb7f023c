"""What transformers renamed between the releases that fastprefix runs with, in one place.

The floor is transformers 5.17. Release 5.24 renamed the models' ``past_key_values`` to ``cache``
and the position embeddings' ``past_key_values_length`` to ``cache_length``; callers may still use
the old name of the first, and adapters saved under one release load under another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

# The forwards' argument that holds earlier keys and values, newest name first.
CACHE_NAMES = ("cache", "past_key_values")
# What a position embedding's forward calls the number of keys that are in the cache.
_CACHED_NAMES = ("cache_length", "past_key_values_length")


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of a forward's parameters, in their order."""
    return tuple(inspect.signature(module.forward).parameters)


def cache_name(names: tuple[str, ...] | list[str]) -> str | None:
    """What a forward with parameters of these names calls its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a call's keyword arguments, under any of its names; None for no cache."""
    found = (kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None)
    return next(found, None)


def length_of(cache: Any) -> Any:
    """How many tokens a cache holds: a number, or a tensor (a static cache); 0 for None."""
    return 0 if cache is None else cache.get_seq_length()


def cached_name(module: nn.Module) -> str | None:
    """The parameter by which a position embedding is told of the keys in the cache, or None."""
    names = parameters(module)
    return next((name for name in _CACHED_NAMES if name in names), None)
