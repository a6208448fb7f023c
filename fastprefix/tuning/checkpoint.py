"""Checkpoints that transformers' Trainer writes of a tuned model: its parameters, in one file.

The Trainer knows no class but transformers' and PEFT's by ``save_pretrained``, and writes the
``state_dict()`` of others. Ours tells its configurations too, so that a checkpoint is enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastprefix.files import opened, read_safetensors, reason
from fastprefix.hf.hub import Source
from fastprefix.hf.peft_files import CONFIG_FILE, decoded, encoded

_Config = TypeVar("_Config")

EXTRA = "_extra_state"  # torch's name for what get_extra_state gives
_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """What such a file holds.

    Attributes:
        file: where it was read.
        model_class: "PrefixTuningModel" or "PromptTuningModel".
        adapters: each adapter's configuration, as its fields.
        active: the name of the active adapter; None for none.
        state: for the ``load_state_dict`` of a model with these adapters.
    """

    file: Path
    model_class: str
    adapters: dict[str, dict[str, Any]]
    active: str | None
    state: dict[str, Tensor]

    def config(self, kind: type[_Config], settings: Mapping[str, Any]) -> _Config:
        """A configuration of the fields that the file tells.

        Raises:
            ValueError: fields or values that it does not take.
        """
        try:
            return kind(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.file}: {error}") from error

    def called(self, adapter_name: str) -> Checkpoint:
        """With a name for its adapter, if it is the only one; several keep their own."""
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
    """What a ``state_dict()`` tells beside its parameters, as a tensor: files hold nothing else.

    Args:
        model_class: name of the class.
        adapters: configurations by name.
        active: name of the active adapter; None for none.
    """
    told = {name: asdict(config) for name, config in adapters.items()}
    return encoded({"model_class": model_class, "adapters": told, "active": active})


def read_checkpoint(place: Source, model_class: str) -> Checkpoint | None:
    """The checkpoint in a folder of this machine; None where there is none, or an adapter.

    Args:
        place: the folder.
        model_class: the class that is to be loaded.

    Raises:
        FileNotFoundError: the folder holds checkpoints, and is none.
        ValueError: cut short, of another model, or without a configuration.
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
        told = None if state is None else decoded(state[EXTRA])
        if told is not None:
            kind, adapters, active = told["model_class"], dict(told["adapters"]), told["active"]
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
    """Refuses a checkpoint where one adapter is to be added.

    Raises:
        ValueError: it is one; see also :func:`read_checkpoint`.
    """
    saved = read_checkpoint(place, model_class)
    if saved is not None:
        raise ValueError(
            f"{saved.file}: got a Trainer's checkpoint, takes an adapter's folder; "
            "from_pretrained loads it, and save_pretrained then writes one"
        )


def _state(file: Path) -> dict[str, Tensor] | None:
    """All tensors of a file; None if it does not tell a configuration, and may be large."""
    if file.suffix == ".safetensors":
        with opened(file) as content:
            if EXTRA not in content.keys():  # noqa: SIM118
                return None
        return read_safetensors(file)[0]
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state if EXTRA in state else None


def fresh(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's fields without what it started from, which a checkpoint replaces."""
    start: dict[str, Any] = {"init": "random", "init_text": None, "init_std": 0.02}
    if "init_prefix" in settings:
        start["init_prefix"] = None
    return {**settings, **start}


def load_state(tuned: nn.Module, saved: Checkpoint) -> None:
    """Puts a checkpoint's parameters into a model that was built for it.

    Raises:
        ValueError: they do not fit it.
    """
    try:
        tuned.load_state_dict(saved.state)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"{saved.file}: does not fit this model ({told}). A LoRA that was trained inside the "
            "base must be in the model, too"
        ) from error


@contextlib.contextmanager
def as_it_was(model: nn.Module, undo: Any) -> Iterator[None]:
    """Undoes what was done to a base, if what was to be loaded is refused.

    Args:
        model: the base.
        undo: called with it.
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
