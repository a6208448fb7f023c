"""Heads: modules of the base that an adapter trains beside its prefix, as copies of its own.

PEFT's modules_to_save. The base keeps its modules, in their places and under their names; while a
tuned model runs, each hands its calls to the copy of the adapter that the call is for. Which copies
those are is known to the running thread alone.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastprefix.hf.peft_base import has_base_adapters, is_adapted

# PEFT's choice of what is trained beside a prompt: the layer on top, which is new with every task
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# A module of the base, and the copy to use in its place (None for none): one for all rows of a
# batch, or one for each.
_Chosen = tuple[nn.Module, tuple[nn.Module | None, ...]]


class _Call(threading.local):
    """What the tuned model that runs in this thread has chosen."""

    chosen: tuple[_Chosen, ...] = ()


_CALL = _Call()
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}  # of modules that hand over their calls


class Heads(nn.Module):
    """An adapter's copies of modules of the base, by the names of the originals.

    Args:
        model: the base.
        names: of its modules, none inside another.
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
        """Of the originals in the base."""
        return self._names

    def attach(self, model: PreTrainedModel) -> None:
        """Lets the originals in the base hand over their calls, which a copied base's do not."""
        for name in self._names:
            _switch(model.get_submodule(name))

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the base's ``state_dict``; whole where FSDP has shares of them."""
        return {
            name: x.full_tensor() if isinstance(x, DTensor) else x
            for name, x in self.state_dict().items()
        }


class HeadsInUse(contextlib.AbstractContextManager[None]):
    """In this block, and in this thread, the base runs with the heads of adapters.

    Args:
        model: the base.
        rows: the heads of one adapter, or of each row's; None for the base's own.
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
            _switch(original)  # of a base that was given another module since
            chosen.append((original, tuple(copies)))
        self.chosen = tuple(chosen)

    def __enter__(self) -> None:
        self.before = _CALL.chosen
        _CALL.chosen = self.chosen

    def __exit__(self, *_: object) -> None:
        _CALL.chosen = self.before


def keep_heads() -> tuple[Any, Any]:
    """As context_fn of ``torch.utils.checkpoint``: layers are run again with the heads they had."""
    return contextlib.nullcontext(), _Again(_CALL.chosen)


class _Again(HeadsInUse):
    def __init__(self, chosen: tuple[_Chosen, ...]) -> None:
        self.chosen = chosen


def find_heads(
    model: PreTrainedModel, names: Iterable[str] | None, task_type: str | None = None
) -> list[str]:
    """Modules of the base that an adapter trains copies of, by their whole names.

    Those that an adapter of PEFT's inside the base trains are left to it.

    Args:
        model: the base.
        names: how the modules' names end; if None, those that PEFT trains for the task:
            "classifier" and "score", or "qa_outputs".
        task_type: of the task, where names is None.

    Raises:
        ValueError: the base has no module of a given name, or one that cannot be copied.
    """
    wanted = _HEADS.get(task_type or "", ()) if names is None else _checked(names)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") for outer in found)
        known = any(module is other for other in found.values())
        if name and name.endswith(wanted) and not inside and not known:
            found[name] = module
    for want in wanted if names is not None else ():
        if not any(name.endswith(want) for name in found):
            raise ValueError(f"modules_to_save: got {want!r}, which {type(model).__name__} lacks")
    adapters = has_base_adapters(model)
    adapted = [name for name, module in found.items() if adapters and is_adapted(module)]
    if adapted and names is not None:
        raise ValueError(
            f"modules_to_save: got {adapted[0]!r}, which an adapter inside the base trains; takes "
            "modules without"
        )
    for name, module in found.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"modules_to_save: got {name!r}, a {type(module).__name__}, takes modules that "
                "compute something"
            )
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"modules_to_save: got {name!r}, whose weights are offloaded or on the meta "
                "device, takes modules whose weights are in memory"
            )
    return [name for name in found if name not in adapted]


def check_saved(
    model: PreTrainedModel,
    saved: Mapping[str, Tensor],
    names: Iterable[str] | None,
    task_type: str | None,
) -> None:
    """Refuses an adapter's heads that do not fit the base.

    Args:
        model: the base.
        saved: tensors by the names of the base's ``state_dict``.
        names: see :func:`find_heads`.
        task_type: see :func:`find_heads`.

    Raises:
        ValueError: the base has no such parameters, or of another shape, or more of them.
    """
    state = model.state_dict()
    heads = [f"{name}." for name in find_heads(model, names, task_type)] if saved else []
    for name, tensor in saved.items():
        known = name in state and name.startswith(tuple(heads))
        if not known or state[name].shape != tensor.shape:
            has = list(state[name].shape) if known else "no such parameter to train"
            raise ValueError(
                f"adapter: holds {name} {list(tensor.shape)}, which was trained beside it; this "
                f"{type(model).__name__} has {has}"
            )
    for head in heads:
        own = [name for name in state if name.startswith(head)]
        missing = [name for name in own if name not in saved]
        if missing and len(missing) < len(own):
            raise ValueError(f"adapter: holds a part of {head[:-1]} alone, without {missing}")


def saved_heads(config: Mapping[str, Any], heads: Mapping[str, Tensor]) -> list[str] | None:
    """An adapter's modules_to_save; of PEFT's, which names what may be missing, those there are."""
    named = config.get("modules_to_save")
    if named is None:
        return None
    parts = [name.split(".") for name in heads]
    modules = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    return [
        name
        for name in dict.fromkeys(_checked(named))
        if any(module.endswith(name) for module in modules)
    ]


def in_layers(names: Iterable[str]) -> bool:
    """Whether any of these modules is inside a stack's numbered layers, which may be run again."""
    return any(part.isdecimal() for name in names for part in name.split("."))


def check_checkpointing(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuses gradient checkpointing that would run these modules again without their copies.

    Raises:
        ValueError: see :func:`keep_heads`.
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


def _checked(names: Iterable[str]) -> tuple[str, ...]:
    """Names of modules, as a tuple."""
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"modules_to_save: got {names!r}, takes a list of modules' names")
    return tuple(names)


class _Switched(nn.Module):
    """Mixed into a module's class: its calls go to the copy that is chosen for it, if one is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        copies = _copies(self)
        if len(copies) > 1:
            return self._by_row(copies, args, kwargs)
        if copies[0] is None:
            return super().__call__(*args, **kwargs)
        return copies[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # of a model that takes a head's weights rather than call it
        copies = _copies(self)
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
        """Each row, or each of as many groups of rows, by its own copy."""
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
                with _Again(()):  # its own weights are meant
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
        # a copy, and what is pickled, is a module of the original class
        reduced: Any = super().__reduce_ex__(protocol)
        classes = type(self).__mro__
        return _new, (classes[classes.index(_Switched) + 1],), *reduced[2:]


def _new(of: type[nn.Module]) -> nn.Module:
    return of.__new__(of)


def _copies(module: nn.Module) -> tuple[nn.Module | None, ...]:
    """What is chosen for a module; (None,) for itself."""
    for original, copies in _CALL.chosen:
        if original is module:
            return copies
    return (None,)


def _switch(module: nn.Module) -> None:
    """Lets a module hand over its calls. Its class is then a subclass of what it was."""
    of = type(module)
    if issubclass(of, _Switched):
        return
    if of not in _CLASSES:
        about = {
            "__module__": of.__module__,
            "__qualname__": of.__qualname__,
            "__doc__": of.__doc__,
        }
        _CLASSES[of] = type(of.__name__, (_Switched, of), about)
    module.__class__ = _CLASSES[of]
