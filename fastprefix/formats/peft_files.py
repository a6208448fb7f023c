"""An adapter's folder: adapter_config.json and the weights, written and read together.

The weights are in adapter_model.safetensors. With ``safe_serialization=False``, PEFT and we write
adapter_model.bin instead, a file of ``torch.save``. From it only tensors are unpickled.

For this module, weights are named tensors. :mod:`fastprefix.formats.peft_prefixes` and
:mod:`fastprefix.formats.peft_prompts` know what they mean.

The weights that we write hold a sha256 of themselves (:mod:`fastprefix.files`), and the
configuration that they were saved with. A damaged file, or the configuration of another saving, is
therefore refused. PEFT's weights hold neither. In those a damaged number is only noticed if it is a
NaN or an infinity.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.files import (
    DAMAGED,
    GONE,
    digest,
    json_object,
    json_text,
    read_json,
    read_safetensors,
    reason,
    write_safetensors,
    written_together,
    written_whole,
)
from fastprefix.formats.source import Source, as_source

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"
TENSOR = "prompt_embeddings"
_HEAD = "base_model."
_METADATA = "fastprefix"
_SHA256 = "sha256"
_SAVED_WITH = "config"  # the entry of our metadata for the configuration
# Fields that may be changed after the saving: nothing that we load depends on them.
_MAY_CHANGE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
}
_TYPES: dict[str, tuple[type, str]] = {
    "modules_to_save": (list, "a list of names"),
    "num_attention_heads": (int, "a whole number"),
    "num_frozen_tokens": (int, "a whole number"),
    "num_layers": (int, "a whole number"),
    "num_transformer_submodules": (int, "a whole number"),
    "num_virtual_tokens": (int, "a whole number"),
    "task_type": (str, "text"),
    "token_dim": (int, "a whole number"),
}


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder holds.

    Attributes:
        config: the fields of adapter_config.json.
        embeddings: PEFT's ``prompt_embeddings`` [num_virtual_tokens, width]: a flat prefix, or
            input embeddings.
        heads: tensors of modules that were trained with them, by the names of the base's
            ``state_dict``. PEFT calls these modules modules_to_save; a classifier is one example.
        about: values for which PEFT has no field. They are in the weights' metadata, which PEFT
            ignores.
        config_file: the file of `config`, for messages.
        weights_file: the file of the tensors, for messages.
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
    """Writes both files of an adapter, so that they take their places together.

    Args:
        folder: created if it does not exist; files of these names in it are replaced.
        config: the fields of adapter_config.json.
        embeddings: [num_virtual_tokens, width]; None if they are in another file.
        heads: see :class:`AdapterFiles`.
        about: see :class:`AdapterFiles`; JSON values.
        safe_serialization: whether to write the weights as safetensors. If False, ``torch.save``
            writes them. Weights of the other kind, which PEFT might read instead, are removed.

    Raises:
        OSError: the files cannot be written.
    """
    tensors = {_HEAD + name: head for name, head in (heads or {}).items()}
    if embeddings is not None:
        tensors[TENSOR] = embeddings
    metadata = config_metadata(config, about)
    with written_together(folder) as partial:
        if safe_serialization:
            write_safetensors(partial / WEIGHTS_FILE, tensors, metadata)
            (partial / f"{BIN_FILE}{GONE}").touch()
        else:
            _write_bin(partial / BIN_FILE, tensors, metadata)
            (partial / f"{WEIGHTS_FILE}{GONE}").touch()
        (partial / CONFIG_FILE).write_text(json_text(config), encoding="utf-8")


def config_metadata(
    config: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The metadata of weights, with the configuration that :func:`checked_config` compares later.

    Args:
        config: the configuration that is saved with the weights.
        about: further JSON values.
    """
    fixed = {name: value for name, value in config.items() if name not in _MAY_CHANGE}
    return {_METADATA: json.dumps({**(about or {}), _SAVED_WITH: fixed})}


def checked_config(
    config: dict[str, Any], about: dict[str, Any], config_file: Path, weights_file: Path
) -> dict[str, Any]:
    """Compares a configuration with the one that the weights were saved with.

    Args:
        config: the configuration, as its file has it.
        about: our metadata of the weights. The saved configuration is removed from it.
        config_file: the configuration's file, for messages.
        weights_file: the weights' file, for messages.

    Returns:
        The configuration, with missing fields from the saved one.

    Raises:
        ValueError: a field differs.
    """
    saved = about.pop(_SAVED_WITH, {})
    for name, want in saved.items():
        got = config.get(name, want)
        if got != want and got is not None:
            raise ValueError(
                f"{config_file}: got {name} {got!r}, takes {want!r}, with which "
                f"{weights_file.name} was saved; the two files are not of one saving"
            )
    return {**saved, **config}


def read_config(
    name_or_folder: str | Path | Source, kinds: Collection[str]
) -> tuple[dict[str, Any], Path]:
    """Reads adapter_config.json.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        kinds: the peft_types that the caller accepts.

    Returns:
        The fields, and the file.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
        ValueError: the file is not JSON, has a field of a wrong type, or another peft_type.
    """
    file = find(name_or_folder, CONFIG_FILE)
    config = read_json(file)
    for name, (kind, expected) in _TYPES.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{file}: got {name} {_short(value)}, takes {expected}, or null")
    if not all(isinstance(name, str) for name in config.get("modules_to_save") or []):
        raise ValueError(f"{file}: got modules_to_save that are no names, takes a list of names")
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in kinds:
        raise ValueError(
            f"{file}: got peft_type {_short(peft_type)}, takes "
            f"{' or '.join(map(repr, sorted(kinds)))}"
        )
    return config, file


def read_adapter(name_or_folder: str | Path | Source, kinds: Collection[str]) -> AdapterFiles:
    """Reads both files, and checks what can be checked without a model.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        kinds: the peft_types that the caller accepts.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: the adapter has another peft_type; or a file is damaged, has unknown tensors, or
            has a number that is not finite.
    """
    config, config_file = read_config(name_or_folder, kinds)
    weights_file = find_weights(name_or_folder)
    tensors, about = _tensors(weights_file, with_embeddings=True)
    config = checked_config(config, about, config_file, weights_file)
    embeddings = tensors.pop(TENSOR)
    heads = {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}
    return AdapterFiles(config, embeddings, heads, about, config_file, weights_file)


def read_heads(
    name_or_folder: str | Path | Source, kinds: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the configuration and the heads of a folder that has its prefix in another file.

    Raises:
        FileNotFoundError: there is no such folder, or no weights in it.
        ValueError: a file is damaged, has unknown tensors, or has a number that is not finite.
    """
    config, config_file = read_config(name_or_folder, kinds)
    weights_file = find_weights(name_or_folder)
    tensors, about = _tensors(weights_file, with_embeddings=False)
    config = checked_config(config, about, config_file, weights_file)
    return config, {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}


def own_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our part of a weights file's metadata; empty if PEFT wrote the file."""
    return json_object(metadata.get(_METADATA, "{}"))


def read_about(name_or_folder: str | Path | Source) -> dict[str, Any]:
    """Reads ``about`` of :class:`AdapterFiles`; empty if the folder has no weights.

    Raises:
        ValueError: the weights are damaged.
    """
    place = as_source(name_or_folder)
    file = place.look_for(WEIGHTS_FILE) or place.look_for(BIN_FILE)
    if file is None:
        return {}
    try:
        about = own_metadata(_read(file)[1])
    except Exception as error:
        raise ValueError(f"{file}: {reason(error)}") from error
    about.pop(_SAVED_WITH, None)
    return about


def _tensors(file: Path, with_embeddings: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads all tensors of a weights file, and our part of its metadata."""

    def check(names: Sequence[str], metadata: Mapping[str, str]) -> None:
        strange = [name for name in names if name != TENSOR and not name.startswith(_HEAD)]
        if strange or (TENSOR in names) != with_embeddings:
            wanted = [repr(TENSOR)] * with_embeddings + [repr(f"{_HEAD}*")]
            raise ValueError(f"got tensors {_short(names)}, takes {' and '.join(wanted)}")

    try:
        tensors, metadata = _read(file, check)
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
        return tensors, own_metadata(metadata)
    except Exception as error:
        raise ValueError(f"{file}: {reason(error)}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _read(
    file: Path, check: Callable[[Sequence[str], Mapping[str, str]], object] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a weights file of either kind; see :func:`fastprefix.files.read_safetensors`."""
    if file.name == WEIGHTS_FILE:
        return read_safetensors(file, check)
    tensors, metadata = _read_bin(file)
    if check is not None:
        check(list(tensors), metadata)
    return tensors, metadata


def _write_bin(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file of ``torch.save`` that holds only tensors: the metadata is one of them."""
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    sealed = {**metadata, _SHA256: digest(tensors, metadata)}
    content = io.BytesIO()  # if torch wrote the file, its errors would not give the reason
    torch.save({**tensors, _METADATA: json_as_tensor(sealed)}, content)
    with written_whole(file) as partial:
        partial.write_bytes(content.getbuffer())


def _read_bin(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a file of ``torch.save`` with torch's own unpickler, which runs no code from it."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            "got a file from which torch.load(weights_only=True) cannot read tensors alone "
            f"({type(error).__name__}); it may be cut short, or hold more than tensors"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in loaded.items()
    ):
        raise ValueError("got something else than tensors by name")
    tensors = {name: tensor.detach() for name, tensor in loaded.items()}
    coded = tensors.pop(_METADATA, None)
    if coded is None:
        return tensors, {}
    metadata = json_of_tensor(coded)
    saved = metadata.pop(_SHA256, None)
    are_texts = all(isinstance(value, str) for value in metadata.values())
    if not are_texts or saved != digest(tensors, metadata):
        raise ValueError(DAMAGED)
    return tensors, metadata


def json_as_tensor(about: Mapping[str, Any]) -> Tensor:
    """JSON values as a uint8 tensor [bytes], for files that can only hold tensors."""
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def json_of_tensor(tensor: Tensor) -> dict[str, Any]:
    """The inverse of :func:`json_as_tensor`.

    Raises:
        ValueError: the tensor does not hold a JSON object.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"got {tensor.dtype} of shape {list(tensor.shape)}, takes bytes of JSON")
    return json_object(bytes(tensor.tolist()).decode("utf-8"))


def find(name_or_folder: str | Path | Source, file: str) -> Path:
    """Finds a file of a folder or of a repository on the hub.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
    """
    return as_source(name_or_folder).find(file)


def find_weights(name_or_folder: str | Path | Source) -> Path:
    """Finds an adapter's weights of either kind. If there are both, safetensors, as in PEFT.

    Raises:
        FileNotFoundError: there is no such folder, or no weights in it.
    """
    place = as_source(name_or_folder)
    if (found := place.look_for(WEIGHTS_FILE) or place.look_for(BIN_FILE)) is not None:
        return found
    return place.find(WEIGHTS_FILE)  # raises: it is missing
