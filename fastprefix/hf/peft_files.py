"""An adapter's folder: adapter_config.json and the weights, read and written whole.

The weights are adapter_model.safetensors or, as PEFT writes with ``safe_serialization=False``,
adapter_model.bin, of which nothing but tensors is ever unpickled.

What the tensors mean is told by :mod:`fastprefix.hf.peft_format` and
:mod:`fastprefix.hf.peft_prompts`; here they are named tensors beside a configuration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastprefix.hf.hub import Source, source

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"
TENSOR = "prompt_embeddings"
_HEAD = "base_model."
_METADATA = "fastprefix"


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder holds.

    Attributes:
        config: adapter_config.json.
        embeddings: PEFT's ``prompt_embeddings`` [num_virtual_tokens, width]: a flat prefix, or
            input embeddings.
        heads: what was trained of the base beside them (PEFT's modules_to_save, a classifier
            say), by the names of the base's ``state_dict``.
        about: what PEFT has no field for; in the weights' metadata, which PEFT ignores.
        config_file: where `config` was read, for messages.
        weights_file: where the tensors were read.
    """

    config: dict[str, Any]
    embeddings: Tensor
    heads: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    config_file: Path = Path(CONFIG_FILE)
    weights_file: Path = Path(WEIGHTS_FILE)


def write_adapter(
    folder: str | Path,
    config: dict[str, Any],
    embeddings: Tensor | None,
    heads: dict[str, Tensor] | None = None,
    about: dict[str, Any] | None = None,
    *,
    safe_serialization: bool = True,
) -> None:
    """Writes both files; see :class:`AdapterFiles`. Neither is ever half there.

    Args:
        folder: made if need be; files of these names in it are replaced.
        config: of adapter_config.json.
        embeddings: [num_virtual_tokens, width]; None where they lie in a file of their own.
        heads: by the names of the base's ``state_dict``.
        about: JSON values.
        safe_serialization: whether the weights are a safetensors file, or a pickled one as of
            ``torch.save``. A file of the other kind, which PEFT might read instead, is removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_HEAD + name: head for name, head in (heads or {}).items()}
    if embeddings is not None:
        tensors[TENSOR] = embeddings
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    weights_name, other = WEIGHTS_FILE, BIN_FILE
    if not safe_serialization:
        weights_name, other = other, weights_name
    # both files whole before either takes its name
    partial_weights, partial_config = (
        folder / f"{name}.{os.getpid()}.partial" for name in (weights_name, CONFIG_FILE)
    )
    try:
        if safe_serialization:
            metadata = {"format": "pt", _METADATA: json.dumps(about or {})}
            save_file(tensors, partial_weights, metadata=metadata)
        else:
            torch.save({**tensors, _METADATA: encoded(about or {})}, partial_weights)
        partial_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        partial_weights.replace(folder / weights_name)
        partial_config.replace(folder / CONFIG_FILE)
        (folder / other).unlink(missing_ok=True)
    finally:
        partial_weights.unlink(missing_ok=True)
        partial_config.unlink(missing_ok=True)


def read_config(
    name_or_folder: str | Path | Source, kinds: Collection[str]
) -> tuple[dict[str, Any], Path]:
    """adapter_config.json and where it lies.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        kinds: the peft_types that the caller takes.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
        ValueError: not JSON, or of another peft_type.
    """
    file = find(name_or_folder, CONFIG_FILE)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: got a JSON {type(config).__name__}, takes an object")
    kind = config.get("peft_type")
    if kind not in kinds:
        raise ValueError(
            f"{file}: got peft_type {kind!r}, takes {' or '.join(map(repr, sorted(kinds)))}"
        )
    return config, file


def read_adapter(name_or_folder: str | Path | Source, kinds: Collection[str]) -> AdapterFiles:
    """Both files, checked as far as they can be without a model.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        kinds: the peft_types that the caller takes.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: of another peft_type, cut short, of unknown tensors, or not all finite.
    """
    config, config_file = read_config(name_or_folder, kinds)
    weights_file = find_weights(name_or_folder)
    tensors, about = _tensors(weights_file, with_embeddings=True)
    embeddings = tensors.pop(TENSOR)
    heads = {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}
    return AdapterFiles(config, embeddings, heads, about, config_file, weights_file)


def read_heads(name_or_folder: str | Path | Source) -> dict[str, Tensor]:
    """The heads of a folder whose prefix lies in a file of its own.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: cut short, of unknown tensors, or not all finite.
    """
    tensors, _ = _tensors(find_weights(name_or_folder), with_embeddings=False)
    return {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}


def read_about(name_or_folder: str | Path | Source) -> dict[str, Any]:
    """What the weights of a folder tell beside its configuration; nothing if it has none.

    Raises:
        ValueError: cut short.
    """
    place = source(name_or_folder)
    file = place.look_for(WEIGHTS_FILE) or place.look_for(BIN_FILE)
    if file is None:
        return {}
    try:
        return (_of_safetensors(file) if file.name == WEIGHTS_FILE else _of_bin(file))[1]
    except Exception as error:
        raise ValueError(f"{file}: {error}") from error


def _tensors(file: Path, with_embeddings: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a weights file, and our metadata."""
    try:
        tensors, about = _of_safetensors(file) if file.name == WEIGHTS_FILE else _of_bin(file)
        names = list(tensors)
        strange = [name for name in names if name != TENSOR and not name.startswith(_HEAD)]
        if strange or (TENSOR in names) != with_embeddings:
            wanted = [repr(TENSOR)] * with_embeddings + [repr(f"{_HEAD}*")]
            raise ValueError(f"got tensors {names}, takes {' and '.join(wanted)}")
        if with_embeddings:
            flat = tensors[TENSOR]
            if flat.dim() != 2 or not flat.is_floating_point() or 0 in flat.shape:
                raise ValueError(
                    f"got {flat.dtype} {TENSOR} of shape {list(flat.shape)}, takes floating-point "
                    "[num_virtual_tokens, width]"
                )
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds a NaN or infinity")
        return tensors, about
    except Exception as error:
        raise ValueError(f"{file}: {error}") from error


def _of_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, json.loads(metadata.get(_METADATA, "{}"))


def _of_bin(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """By torch's own unpickler, which makes tensors and nothing that a file could run."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            "got a file from which torch.load(weights_only=True) cannot read tensors alone "
            f"({type(error).__name__}); it may be cut short, or hold more than tensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise ValueError("got something else than tensors by name")
    tensors = {name: tensor.detach() for name, tensor in loaded.items()}
    about = tensors.pop(_METADATA, None)
    return tensors, {} if about is None else decoded(about)


def encoded(about: dict[str, Any]) -> Tensor:
    """JSON values as a tensor [bytes] of uint8, for files that hold tensors alone."""
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def decoded(tensor: Tensor) -> dict[str, Any]:
    """The inverse of :func:`encoded`."""
    about = json.loads(bytes(tensor.tolist()))
    assert isinstance(about, dict)
    return about


def find(name_or_folder: str | Path | Source, file: str) -> Path:
    """A file of a folder or of a hub repository.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
    """
    return source(name_or_folder).find(file)


def find_weights(name_or_folder: str | Path | Source) -> Path:
    """The weights of an adapter, of either kind; safetensors where there are both, as in PEFT.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
    """
    place = source(name_or_folder)
    if (found := place.look_for(WEIGHTS_FILE) or place.look_for(BIN_FILE)) is not None:
        return found
    return place.find(WEIGHTS_FILE)  # which says that it is missing
