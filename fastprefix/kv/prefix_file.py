"""The safetensors file of one prefix."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastprefix.files import (
    header_bytes,
    json_object,
    opened,
    read_safetensors,
    reason,
    write_safetensors,
)
from fastprefix.kv.reweighting import Reweighting, kind_of
from fastprefix.kv.shapes import LayerShape
from fastprefix.kv.states import LayerState, named, outline, restored

# The entry of the metadata that holds what the tensors do not say, as JSON.
_FORMAT = "fastprefix-kv"


class PrefixFields(TypedDict):
    """The fields of a :class:`fastprefix.PrefixKV`, which a file holds."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position_offset: int
    in_window: bool
    reweighting: Reweighting | None
    states: tuple[LayerState, ...] | None


def write_prefix(file: Path, fields: PrefixFields, *, durable: bool) -> None:
    """Writes the file of a prefix; :func:`read_prefix` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    about = {
        "num_layers": len(fields["keys"]),
        "position_offset": fields["position_offset"],
        "in_window": fields["in_window"],
        "reweighting": kind_of(fields["reweighting"]),
        "states": outline(fields["states"]),
    }
    write_safetensors(file, _by_name(fields), {_FORMAT: json.dumps(about)}, durable=durable)


def read_prefix(file: Path) -> PrefixFields:
    """Reads the file of a prefix, into memory of its own. Call it in :func:`prefix_file_errors`."""
    found, metadata = read_safetensors(file, lambda names, metadata: _about(metadata))
    about = _about(metadata)
    layers = range(about["num_layers"])

    def read(what: str) -> tuple[Tensor, ...]:
        return tuple(found[f"layers.{layer}.{what}"] for layer in layers)

    kind = about.get("reweighting")  # older files have no such entry
    return PrefixFields(
        keys=read("key"),
        values=read("value"),
        position_offset=about["position_offset"],
        in_window=bool(about["in_window"]),
        reweighting=None if kind is None else Reweighting(kind, read(kind)),
        states=restored(about.get("states"), found.__getitem__),
    )


def measure(file: Path) -> tuple[int, tuple[LayerShape, ...]]:
    """Reads the bytes and the layer shapes of a prefix from the header of its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a whole PrefixKV file.
    """
    with prefix_file_errors(file):
        with opened(file) as content:
            about = _about(content.metadata() or {})
            shapes = []
            for layer in range(about["num_layers"]):
                key, value = (
                    content.get_slice(f"layers.{layer}.{what}").get_shape()
                    for what in ("key", "value")
                )
                shapes.append(LayerShape(key[0], key[2], value[2]))
        if not shapes:
            raise ValueError("it has no layers")
        return file.stat().st_size - header_bytes(file), tuple(shapes)


@contextlib.contextmanager
def prefix_file_errors(file: Path) -> Iterator[None]:
    """A block that reads the file of a prefix. Its errors say that the file is not whole, and why.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a whole PrefixKV file.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, KeyError):
            why = f"it lacks {error}"
        raise ValueError(f"file: {file} is not a whole PrefixKV file ({why})") from error


def check_finite(what: str, fields: PrefixFields) -> None:
    """Refuses numbers that are not finite.

    Args:
        what: names the prefix in the message.
        fields: the prefix.

    Raises:
        ValueError: a tensor holds a NaN or an infinity; the message names the tensor.
    """
    for name, tensor in _by_name(fields).items():
        if not _is_finite(tensor):
            raise ValueError(f"{what} holds a NaN or infinity in {name}")


def _by_name(fields: PrefixFields) -> dict[str, Tensor]:
    """All tensors, by their names in the file."""
    parts = {"key": fields["keys"], "value": fields["values"]}
    if (reweighting := fields["reweighting"]) is not None:
        parts[reweighting.kind] = reweighting.heads
    tensors = {
        f"layers.{layer}.{part}": tensor
        for part, layers in parts.items()
        for layer, tensor in enumerate(layers)
    }
    return tensors | named(fields["states"])


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of a file says about its tensors."""
    if _FORMAT not in metadata:
        raise ValueError(f"its metadata has no {_FORMAT}")
    return json_object(metadata[_FORMAT])


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    # PyTorch lacks some operations for 8-bit types
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    # aminmax needs one pass and no mask; with a NaN in the tensor, both results are NaN
    low, high = torch.aminmax(wide)
    return bool(torch.isfinite(low) & torch.isfinite(high))
