"""What tests of decode share: a plan's shape and target, and a record of the operators that run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix.kernels import decode_grid, tilings


def hopper() -> tilings.Target:
    """A GPU with 132 multiprocessors."""
    return tilings.Target("hopper", 132)


def plan_shape(**changes: Any) -> decode_grid.DecodeShape:
    """The shape of a large decoding step, which two phases pay for."""
    base = decode_grid.DecodeShape(
        B=32, Hq=32, Hkv=8, Lq=1, Lk=512, P=2048, N=None, D=128, Dv=128,
        dtype=torch.bfloat16, sliding_window=None, batch_invariant=False,
    )  # fmt: skip
    return base._replace(**changes)


class Operators(TorchDispatchMode):
    """The operators that run, and the shapes of the buffers that they create."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if "empty" in str(function):
            self.shapes.append(tuple(result.shape))
        return result
