"""An adapter's folder: adapter_config.json and adapter_model.safetensors, read and written whole.

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

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
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
) -> None:
    """Writes both files; see :class:`AdapterFiles`. Neither is ever half there.

    Args:
        folder: made if need be; files of these names in it are replaced.
        config: of adapter_config.json.
        embeddings: [num_virtual_tokens, width]; None where they lie in a file of their own.
        heads: by the names of the base's ``state_dict``.
        about: JSON values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_HEAD + name: head for name, head in (heads or {}).items()}
    if embeddings is not None:
        tensors[TENSOR] = embeddings
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _METADATA: json.dumps(about or {})}
    # both files whole before either takes its name
    partial_weights, partial_config = (
        folder / f"{name}.{os.getpid()}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE)
    )
    try:
        save_file(tensors, partial_weights, metadata=metadata)
        partial_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        partial_weights.replace(folder / WEIGHTS_FILE)
        partial_config.replace(folder / CONFIG_FILE)
    finally:
        partial_weights.unlink(missing_ok=True)
        partial_config.unlink(missing_ok=True)


def read_config(name_or_folder: str | Path, kinds: Collection[str]) -> tuple[dict[str, Any], Path]:
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


def read_adapter(name_or_folder: str | Path, kinds: Collection[str]) -> AdapterFiles:
    """Both files, checked as far as they can be without a model.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        kinds: the peft_types that the caller takes.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: of another peft_type, cut short, of unknown tensors, or not all finite.
    """
    config, config_file = read_config(name_or_folder, kinds)
    weights_file = find(name_or_folder, WEIGHTS_FILE)
    tensors, about = _tensors(weights_file, with_embeddings=True)
    embeddings = tensors.pop(TENSOR)
    heads = {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}
    return AdapterFiles(config, embeddings, heads, about, config_file, weights_file)


def read_heads(name_or_folder: str | Path) -> dict[str, Tensor]:
    """The heads of a folder whose prefix lies in a file of its own.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: cut short, of unknown tensors, or not all finite.
    """
    tensors, _ = _tensors(find(name_or_folder, WEIGHTS_FILE), with_embeddings=False)
    return {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}


def _tensors(file: Path, with_embeddings: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a weights file, and our metadata."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            strange = [name for name in names if name != TENSOR and not name.startswith(_HEAD)]
            if strange or (TENSOR in names) != with_embeddings:
                wanted = [repr(TENSOR)] * with_embeddings + [repr(f"{_HEAD}*")]
                raise ValueError(f"got tensors {names}, takes {' and '.join(wanted)}")
            tensors = {name: opened.get_tensor(name) for name in names}
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
        return tensors, json.loads(metadata.get(_METADATA, "{}"))
    except Exception as error:
        raise ValueError(f"{file}: {error}") from error


def find(name_or_folder: str | Path, file: str) -> Path:
    """A file of a folder or of a hub repository.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {file} in this folder")
        return path
    if folder.is_absolute() or str(name_or_folder).count("/") > 1:
        raise FileNotFoundError(f"{name_or_folder}: no such folder")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(name_or_folder), file))
