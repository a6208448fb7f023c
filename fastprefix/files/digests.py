"""The sha256 that our files hold of their own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DAMAGED = "it was damaged or changed: its sha256 is not the one that it was saved with"


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The sha256 of all that a file of tensors holds.

    Args:
        tensors: the tensors by name, contiguous and on the CPU.
        metadata: the file's metadata.
    """
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        found.update(numbers)
    return found.hexdigest()


def json_digest(value: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object, the same before it is written and after it is read."""
    as_read = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
