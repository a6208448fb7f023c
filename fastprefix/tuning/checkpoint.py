"""Checkpoints that transformers' Trainer writes of a tuned model: its parameters, in one file.

The Trainer calls ``save_pretrained`` only for transformers' and PEFT's classes. For other models it
writes the ``state_dict()``. In a tuned model this also holds the configurations, so that a model
can be built from a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastprefix.files import opened, read_safetensors, reason
from fastprefix.formats.peft_files import CONFIG_FILE, json_as_tensor, json_of_tensor
from fastprefix.formats.source import Source

_Config = TypeVar("_Config")
_Model = TypeVar("_Model", bound=nn.Module)

_EXTRA = "_extra_state"  # torch's name of the entry that get_extra_state gives
_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's file holds.

    Attributes:
        file: the file.
        model_class: "PrefixTuningModel" or "PromptTuningModel".
        adapters: the fields of each adapter's configuration, by the adapters' names.
        active: the name of the active adapter; None if none was active.
        state: the argument for ``load_state_dict`` of a model with these adapters.
    """

    file: Path
    model_class: str
    adapters: dict[str, dict[str, Any]]
    active: str | None
    state: dict[str, Tensor]

    def config(self, kind: type[_Config], settings: Mapping[str, Any]) -> _Config:
        """Makes a configuration of fields that the file holds.

        Raises:
            ValueError: the class does not accept a field or its value.
        """
        try:
            return kind(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.file}: {error}") from error

    def called(self, adapter_name: str) -> Checkpoint:
        """Gives the adapter another name. If there are several, they keep their names."""
        old, *others = self.adapters
        if others or old == adapter_name:
            return self
        state = {}
        for name, tensor in self.state.items():
            kind, *rest = name.split(".")
            if kind in ("encoders", "adapter_heads") and rest[0] == old:
                name = ".".join((kind, adapter_name, *rest[1:]))
            state[name] = tensor
        adapters = {adapter_name: self.adapters[old]}
        return replace(self, adapters=adapters, active=adapter_name, state=state)


def described(model_class: str, adapters: Mapping[str, Any], active: str | None) -> Tensor:
    """The configurations of a model as a tensor, because files can only hold tensors.

    Args:
        model_class: the name of the model's class.
        adapters: the configurations by name.
        active: the name of the active adapter; None if none is active.
    """
    fields = {name: asdict(config) for name, config in adapters.items()}
    return json_as_tensor({"model_class": model_class, "adapters": fields, "active": active})


def read_checkpoint(place: Source, model_class: str) -> Checkpoint | None:
    """Reads the checkpoint in a local folder.

    Args:
        place: the folder.
        model_class: the class that is to be loaded.

    Returns:
        None if the folder holds an adapter, or no checkpoint, or if place is no local folder.

    Raises:
        FileNotFoundError: the folder is no checkpoint but has sub-folders that are.
        ValueError: the file is damaged, belongs to another model, or has no configuration.
    """
    folder = place.folder
    if folder is None or (folder / CONFIG_FILE).is_file():
        return None
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        inside = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
        if inside:
            raise FileNotFoundError(
                f"{place}: no {CONFIG_FILE} in this folder; its {', '.join(inside)} may be what "
                "is meant"
            )
        return None
    try:
        state = _state(file)
        extra = None if state is None else json_of_tensor(state[_EXTRA])
        if extra is not None:
            kind, adapters, active = extra["model_class"], dict(extra["adapters"]), extra["active"]
    except Exception as error:
        raise ValueError(f"{file}: {' '.join(reason(error).split())}") from error
    if state is None:
        raise ValueError(
            f"{file}: got parameters without a configuration of fastprefix, takes an adapter's "
            f"folder with {CONFIG_FILE}, or a Trainer's checkpoint of a {model_class}. Another "
            "model's parameters load by its own from_pretrained or load_state_dict"
        )
    if kind != model_class:
        raise ValueError(f"{file}: got a checkpoint of a {kind}, takes one of a {model_class}")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} holds a NaN or infinity")
    if not adapters:
        raise ValueError(f"{file}: got a checkpoint without adapters, takes one with some")
    return Checkpoint(file, model_class, adapters, active, state)


def refuse_checkpoint(place: Source, model_class: str) -> None:
    """Refuses a checkpoint in a place from which one adapter is to be added.

    Raises:
        ValueError: the place holds a checkpoint; see also :func:`read_checkpoint`.
    """
    saved = read_checkpoint(place, model_class)
    if saved is not None:
        raise ValueError(
            f"{saved.file}: got a Trainer's checkpoint, takes an adapter's folder; "
            "from_pretrained loads it, and save_pretrained then writes one"
        )


def _state(file: Path) -> dict[str, Tensor] | None:
    """All tensors of a file; None if it has no configuration."""
    if file.suffix == ".safetensors":
        with opened(file) as content:
            if _EXTRA not in content.keys():  # noqa: SIM118
                return None
        return read_safetensors(file)[0]
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state if _EXTRA in state else None


def without_start(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's fields with a random start, because a checkpoint replaces the start anyway."""
    start: dict[str, Any] = {"init": "random", "init_text": None, "init_std": 0.02}
    if "init_prefix" in settings:
        start["init_prefix"] = None
    return {**settings, **start}


def load_state(tuned: nn.Module, saved: Checkpoint) -> None:
    """Loads a checkpoint's parameters into a model that was built for it.

    Raises:
        ValueError: they do not fit the model.
    """
    try:
        tuned.load_state_dict(saved.state)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{saved.file}: does not fit this model ({why}). A LoRA that was trained inside the "
            "base must be in the model, too"
        ) from error


def hold_only_what_is_trained(tuned: nn.Module) -> None:
    """Makes the ``state_dict()`` of a tuned model leave out what is frozen in its base.

    Frozen weights live in files of their own. Loading a ``state_dict()`` without them, or without
    the entry of :func:`described` (older checkpoints have none), is then no error.

    Args:
        tuned: a model whose base is its ``base_model``.
    """
    tuned.register_load_state_dict_post_hook(_allow_missing_base)
    tuned.register_state_dict_post_hook(_drop_frozen_base)


def _trained_in_base(tuned: Any) -> set[str]:
    """Names, in the base's ``state_dict``, of its parameters that are trained."""
    return {name for name, x in tuned.base_model.named_parameters() if x.requires_grad}


def _drop_frozen_base(tuned: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    start, trained = f"{prefix}base_model.", _trained_in_base(tuned)
    for name in [name for name in state if name.startswith(start)]:
        if name.removeprefix(start) not in trained:
            del state[name]


def _allow_missing_base(tuned: Any, incompatible: Any) -> None:
    in_base = tuned.base_model.state_dict().keys()
    frozen = {f"base_model.{name}" for name in in_base - _trained_in_base(tuned)}
    missing = incompatible.missing_keys
    missing[:] = [
        name
        for name in missing
        if name[name.find("base_model.") :] not in frozen and name.rpartition(".")[2] != _EXTRA
    ]


@contextlib.contextmanager
def restored_if_refused(model: _Model, undo: Callable[[_Model], object]) -> Iterator[None]:
    """A block that loads something into a base; if it raises, the base is as before.

    Args:
        model: the base.
        undo: called with the base if the block raises. Which parameters are trained is restored
            without it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    except Exception:
        undo(model)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
