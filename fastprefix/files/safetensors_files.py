"""Safetensors files: written whole with a sha256, and checked when they are read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastprefix.files.digests import DAMAGED, digest
from fastprefix.files.json_files import MAX_TEXT_BYTES
from fastprefix.files.whole import written_whole

_DIGEST = "fastprefix-sha256"


def write_safetensors(
    file: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    durable: bool = True,
) -> None:
    """Writes a safetensors file, whole, with a sha256 of its content.

    Args:
        file: replaced if it exists.
        tensors: the tensors by name, with any device and strides. Those that share memory are
            written one by one.
        metadata: the file's metadata.
        durable: see :func:`written_whole`.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:  # the format has no shared memory
            tensors[name] = tensor.clone()
        seen.add(storage)
    sealed = {"format": "pt", **metadata}
    sealed[_DIGEST] = digest(tensors, sealed)
    with written_whole(file, durable=durable) as partial:
        save_file(tensors, partial, metadata=sealed)


def read_safetensors(
    file: str | Path, check: Callable[[Sequence[str], Mapping[str, str]], object] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file of any writer.

    Args:
        file: the file.
        check: called with the tensors' names and the metadata before any tensor is read. It raises
            an error if the caller cannot use the file.

    Returns:
        The tensors, on the CPU and in memory of their own; and the metadata.

    Raises:
        SafetensorError: the file is not a whole safetensors file.
        ValueError: the content has another sha256 than the file says; or what `check` raised.
        OSError: the file cannot be read.
    """
    with opened(file) as content:
        metadata = dict(content.metadata() or {})
        names = list(content.keys())
        if check is not None:
            check(names, metadata)
        # get_tensor gives the mapped file itself, which would change with the file
        tensors = {name: content.get_tensor(name).clone() for name in names}
    saved = metadata.pop(_DIGEST, None)
    if saved is not None and saved != digest(tensors, metadata):
        raise ValueError(DAMAGED)
    return tensors, metadata


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[Any]:
    """Opens a safetensors file as ``safetensors.safe_open`` does, unless its header is too long.

    Raises:
        SafetensorError: the file is not a whole safetensors file.
        ValueError: the header is too long.
        OSError: the file cannot be read.
    """
    header_bytes(file)
    with safe_open(file, framework="pt") as content:
        yield content


def header_bytes(file: str | Path) -> int:
    """The number of bytes in front of the tensors of a safetensors file.

    Raises:
        ValueError: the file is shorter than that, or no file of ours needs so many.
        OSError: the file cannot be read.
    """
    with open(file, "rb") as raw:
        first = raw.read(8)
        size = os.fstat(raw.fileno()).st_size
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(size - 8, MAX_TEXT_BYTES):
        found = f"a header of {length:,} bytes" if len(first) == 8 else "no header"
        raise ValueError(f"not a whole safetensors file: {found} in {size:,} bytes")
    return 8 + length
