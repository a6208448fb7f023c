"""Heads: trained copies of modules of the base, which belong to an adapter (modules_to_save).

The base keeps its modules, in their places and under their names. While a tuned model runs, such a
module passes its calls on to the copy that belongs to the adapter of the call. The choice of copies
is thread-local, so that threads can use different adapters at the same time.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# A module of the base, and the copies to use in its place: one for all rows of a batch, or one for
# each row. None stands for the module itself.
_Chosen = tuple[nn.Module, tuple[nn.Module | None, ...]]


class _Call(threading.local):
    """The copies to use in this thread, chosen by the tuned model that runs here."""

    chosen: tuple[_Chosen, ...] = ()


_CALL = _Call()
# By a module's class, the subclass whose instances pass their calls on.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Heads(nn.Module):
    """An adapter's copies of modules of the base, by the names of the originals.

    Args:
        model: the base.
        names: full names of its modules, of which none is inside another.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        self.attach(model)
        for name in self._names:
            original = model.get_submodule(name)
            place: nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, copy.deepcopy(original))

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of the originals in the base."""
        return self._names

    def attach(self, model: PreTrainedModel) -> None:
        """Makes the originals in a base pass their calls on; a copied base's do not do so yet."""
        for name in self._names:
            _pass_calls_on(model.get_submodule(name))

    def tensors(self) -> dict[str, Tensor]:
        """The copies' tensors by the names of the base's ``state_dict``; gathered under FSDP."""
        return {
            name: x.full_tensor() if isinstance(x, DTensor) else x
            for name, x in self.state_dict().items()
        }


class HeadsInUse(contextlib.AbstractContextManager[None]):
    """In this block, and in this thread, the base runs with the heads of adapters.

    Args:
        model: the base.
        rows: the heads of one adapter for all rows, or one entry for each row; None stands for the
            base's own modules.

    Raises:
        NotImplementedError: an adapter's head is a part of another adapter's head.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Heads | None]) -> None:
        chosen: list[_Chosen] = []
        names = list(dict.fromkeys(name for heads in rows if heads for name in heads.names))
        for outer in names:
            if any(name.startswith(f"{outer}.") for name in names):
                raise NotImplementedError(
                    f"prefix_names: got rows whose adapters train {outer} and a part of it, takes "
                    "rows of one of the two"
                )
        for name in names:
            copies = [
                heads.get_submodule(name) if heads and name in heads.names else None
                for heads in rows
            ]
            if all(other is copies[0] for other in copies):
                copies = copies[:1]
            original = model.get_submodule(name)
            _pass_calls_on(original)  # the base may have been given another module since
            chosen.append((original, tuple(copies)))
        self.chosen = tuple(chosen)

    def __enter__(self) -> None:
        self.before = _CALL.chosen
        _CALL.chosen = self.chosen

    def __exit__(self, *_: object) -> None:
        _CALL.chosen = self.before


def keep_heads() -> tuple[Any, Any]:
    """A context_fn for ``torch.utils.checkpoint``: the recomputation uses the forward's heads."""
    return contextlib.nullcontext(), _TheseHeads(_CALL.chosen)


class _TheseHeads(HeadsInUse):
    """A block with copies that were chosen before."""

    def __init__(self, chosen: tuple[_Chosen, ...]) -> None:
        self.chosen = chosen


def in_layers(names: Iterable[str]) -> bool:
    """Whether any of these modules is in a numbered layer, which checkpointing may run again."""
    return any(part.isdecimal() for name in names for part in name.split("."))


def check_checkpointing(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuses gradient checkpointing that would rerun these modules without their copies.

    Raises:
        ValueError: it is enabled for a layer that holds one, without :func:`keep_heads`.
    """
    for name in names:
        places = name.split(".")
        for end in range(len(places)):
            stack = model.get_submodule(".".join(places[:end]))
            if not getattr(stack, "gradient_checkpointing", False) or not in_layers(places[end:]):
                continue
            function = getattr(stack, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("context_fn") is not keep_heads:
                raise ValueError(
                    f"gradient checkpointing: would run {name} again without what the adapter "
                    "trains of it; enable it by the tuned model's gradient_checkpointing_enable, "
                    "with use_reentrant=False, once all adapters are there"
                )


class _PassesCallsOn(nn.Module):
    """Mixed into a module's class: its calls go to the copy that is chosen for it, if any."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        copies = _chosen_copies(self)
        if len(copies) > 1:
            return self._by_row(copies, args, kwargs)
        if copies[0] is None:
            return super().__call__(*args, **kwargs)
        return copies[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # some models use a head's weights instead of calling it
        copies = _chosen_copies(self)
        if len(copies) > 1 and name in self._parameters:
            raise NotImplementedError(
                f"prefix_names: got rows with different heads, takes rows with one: {name!r} of "
                f"one of them ({type(self).__name__}) is used for all rows at once"
            )
        if len(copies) > 1 or copies[0] is None:
            return super().__getattr__(name)
        return getattr(copies[0], name)

    def _by_row(
        self, copies: tuple[nn.Module | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Runs each row by its own copy; generate() may give several rows for each chosen copy."""
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        R, B = len(copies), len(inputs[0]) if inputs else 0
        if len(inputs) != 1 or not args or args[0] is not inputs[0] or B % R:
            raise NotImplementedError(
                f"prefix_names: got {R} rows with different heads, takes rows with one: "
                f"{type(self).__name__} is not given as many rows, or more than that"
            )
        owners = [copies[row * R // B] for row in range(B)]
        order: list[int] = []
        parts: list[Tensor] = []
        for owner in dict.fromkeys(owners):
            rows = [row for row, other in enumerate(owners) if other is owner]
            mine = args[0][rows]
            if owner is None:
                with _TheseHeads(()):  # else its weights would be those of a copy
                    part = super().__call__(mine, *args[1:], **kwargs)
            else:
                part = owner(mine, *args[1:], **kwargs)
            if not isinstance(part, Tensor) or len(part) != len(rows):
                raise NotImplementedError(
                    f"prefix_names: got rows with different heads, takes rows with one: "
                    f"{type(self).__name__} returns no tensor of these rows"
                )
            order += rows
            parts.append(part)
        places = sorted(range(B), key=order.__getitem__)
        return torch.cat(parts)[places]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies and pickles get the original class
        reduced: Any = super().__reduce_ex__(protocol)
        classes = type(self).__mro__
        return _without_init, (classes[classes.index(_PassesCallsOn) + 1],), *reduced[2:]


def _without_init(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _chosen_copies(module: nn.Module) -> tuple[nn.Module | None, ...]:
    """The copies that are chosen for a module; (None,) stands for the module itself."""
    for original, copies in _CALL.chosen:
        if original is module:
            return copies
    return (None,)


def _pass_calls_on(module: nn.Module) -> None:
    """Makes a module pass its calls on, by giving it a subclass of its class."""
    cls = type(module)
    if issubclass(cls, _PassesCallsOn):
        return
    if cls not in _CLASSES:
        attributes = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        _CLASSES[cls] = type(cls.__name__, (_PassesCallsOn, cls), attributes)
    module.__class__ = _CLASSES[cls]
