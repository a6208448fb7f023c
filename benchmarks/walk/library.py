"""fastprefix as the walk calls it: its public functions alone. A test puts a wrong one here."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.patch.patching import patched


class Library:
    """What a way may use.

    Args:
        fallback: of ``patch_model``, ``use_prefix`` and ``PrefixKV.prefill``; None leaves it out.
    """

    def __init__(self, fallback: str | None = None) -> None:
        self.options = {} if fallback is None else {"fallback": fallback}

    @staticmethod
    def has_fallback() -> bool:
        """Whether this version of fastprefix takes ``fallback`` at all."""
        return all(
            "fallback" in inspect.signature(function).parameters
            for function in (patch_model, use_prefix, PrefixKV.prefill)
        )

    def patch(self, model: Any) -> Any:
        """The model, patched for good."""
        return patch_model(model, **self.options)

    def prefill(self, model: Any, ids: Tensor, **more: Any) -> PrefixKV:
        """A prompt's keys and values."""
        return PrefixKV.prefill(model, ids, **self.options, **more)

    def use(self, model: Any, kv: PrefixKV) -> AbstractContextManager[Any]:
        """The block in which forwards see the prefix."""
        return use_prefix(model, kv, **self.options)

    def learned(self, keys: list[Tensor], values: list[Tensor], offset: int) -> PrefixKV:
        """A prefix of these numbers."""
        return PrefixKV(tuple(keys), tuple(values), position_offset=offset)

    def describe(self, model: Any, length: int) -> tuple[list[Any], list[str], int]:
        """Shapes and groups of a model's layers, and by how much a prefix moves its text."""
        if self.options:
            self.patch(model)
        with patched(model):
            return (
                list(patch_of(model).shapes),
                list(patch_of(model).groups),
                patch_of(model).default_offset(length),
            )
