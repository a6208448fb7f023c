"""An adapter's folder: adapter_config.json and the weights, read and written whole.

The weights are adapter_model.safetensors or, as PEFT writes with ``safe_serialization=False``,
adapter_model.bin, of which nothing but tensors is ever unpickled.

What the tensors mean is told by :mod:`fastprefix.formats.peft_prefixes` and
:mod:`fastprefix.formats.peft_prompts`; here they are named tensors beside a configuration.

Our weights hold a sha256 of themselves (:mod:`fastprefix.files`) and the configuration that they
were saved with, so that a damaged file, or a configuration of another saving, is refused. PEFT's
hold neither: of those, a damaged number loads as another one unless it is none any more.
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
from fastprefix.formats.source import Source, source

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"
TENSOR = "prompt_embeddings"
_HEAD = "base_model."
_METADATA = "fastprefix"
_SHA256 = "sha256"
_SAVED_WITH = "config"  # in that metadata
# Fields that somebody may change in a configuration: nothing that we load depends on them.
_FREE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
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
    """Writes both files, together; see :class:`AdapterFiles`. Neither is ever half there.

    Args:
        folder: made if need be; files of these names in it are replaced.
        config: of adapter_config.json.
        embeddings: [num_virtual_tokens, width]; None where they lie in a file of their own.
        heads: by the names of the base's ``state_dict``.
        about: JSON values.
        safe_serialization: whether the weights are a safetensors file, or a pickled one as of
            ``torch.save``. A file of the other kind, which PEFT might read instead, is removed.

    Raises:
        OSError: they cannot be written.
    """
    tensors = {_HEAD + name: head for name, head in (heads or {}).items()}
    if embeddings is not None:
        tensors[TENSOR] = embeddings
    metadata = saved_with(config, about)
    with written_together(folder) as partial:
        if safe_serialization:
            write_safetensors(partial / WEIGHTS_FILE, tensors, metadata)
            (partial / f"{BIN_FILE}{GONE}").touch()
        else:
            _write_bin(partial / BIN_FILE, tensors, metadata)
            (partial / f"{WEIGHTS_FILE}{GONE}").touch()
        (partial / CONFIG_FILE).write_text(json_text(config), encoding="utf-8")


def saved_with(config: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Metadata for weights that tells the configuration which goes with them; see :func:`agreed`.

    Args:
        config: as it is written beside them.
        about: what else they tell, JSON values.
    """
    kept = {name: value for name, value in config.items() if name not in _FREE}
    return {_METADATA: json.dumps({**(about or {}), _SAVED_WITH: kept})}


def agreed(
    config: dict[str, Any], about: dict[str, Any], config_file: Path, weights_file: Path
) -> dict[str, Any]:
    """A configuration, with what it does not say from the weights beside it.

    Args:
        config: as read.
        about: our metadata of the weights, from which the configuration is taken out.
        config_file: for messages.
        weights_file: likewise.

    Raises:
        ValueError: a field is another than in the configuration that the weights were saved with.
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
    """adapter_config.json and where it lies.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        kinds: the peft_types that the caller takes.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
        ValueError: not JSON, or of another peft_type.
    """
    file = find(name_or_folder, CONFIG_FILE)
    config = read_json(file)
    for name, (kind, told) in _TYPES.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{file}: got {name} {_short(value)}, takes {told}, or null")
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
    config = agreed(config, about, config_file, weights_file)
    embeddings = tensors.pop(TENSOR)
    heads = {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}
    return AdapterFiles(config, embeddings, heads, about, config_file, weights_file)


def read_heads(
    name_or_folder: str | Path | Source, kinds: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the heads of a folder whose prefix lies in a file of its own.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: cut short, of unknown tensors, or not all finite.
    """
    config, config_file = read_config(name_or_folder, kinds)
    weights_file = find_weights(name_or_folder)
    tensors, about = _tensors(weights_file, with_embeddings=False)
    config = agreed(config, about, config_file, weights_file)
    return config, {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items()}


def told_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our metadata of a weights file; empty in PEFT's."""
    return json_object(metadata.get(_METADATA, "{}"))


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
        about = told_in(_read(file)[1])
    except Exception as error:
        raise ValueError(f"{file}: {reason(error)}") from error
    about.pop(_SAVED_WITH, None)
    return about


def _tensors(file: Path, with_embeddings: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a weights file, and our metadata."""

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
        return tensors, told_in(metadata)
    except Exception as error:
        raise ValueError(f"{file}: {reason(error)}") from error


def _short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 200 else f"{told[:200]}..."


def _read(
    file: Path, check: Callable[[Sequence[str], Mapping[str, str]], object] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a weights file of either kind; see `read_safetensors`."""
    if file.name == WEIGHTS_FILE:
        return read_safetensors(file, check)
    tensors, metadata = _of_bin(file)
    if check is not None:
        check(list(tensors), metadata)
    return tensors, metadata


def _write_bin(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """What `write_safetensors` does, as a file of ``torch.save``, which holds tensors alone."""
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    sealed = {**metadata, _SHA256: digest(tensors, metadata)}
    content = io.BytesIO()  # torch's own errors of writing do not say what was wrong
    torch.save({**tensors, _METADATA: encoded(sealed)}, content)
    with written_whole(file) as partial:
        partial.write_bytes(content.getbuffer())


def _of_bin(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """By torch's own unpickler, which makes tensors and nothing that a file could run."""
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
    told = tensors.pop(_METADATA, None)
    if told is None:
        return tensors, {}
    metadata = decoded(told)
    seal = metadata.pop(_SHA256, None)
    texts = all(isinstance(value, str) for value in metadata.values())
    if not texts or seal != digest(tensors, metadata):
        raise ValueError(DAMAGED)
    return tensors, metadata


def encoded(about: Mapping[str, Any]) -> Tensor:
    """JSON values as a tensor [bytes] of uint8, for files that hold tensors alone."""
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def decoded(tensor: Tensor) -> dict[str, Any]:
    """The inverse of :func:`encoded`.

    Raises:
        ValueError: it does not hold a JSON object.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"got {tensor.dtype} of shape {list(tensor.shape)}, takes bytes of JSON")
    return json_object(bytes(tensor.tolist()).decode("utf-8"))


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
