"""How kernels are launched: the device's target, strides as arguments, the launch itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan_cache import PLANS
from .target import Splitting, Target, Tile, family_of_amd, target_of_capability
from .tuning.store import load


def target_of(device: torch.device) -> Target:
    """The target of a tensor's device, or inside :func:`collected` the one it names."""
    collecting = _COLLECTING.get()
    return _device_target(device) if collecting is None else collecting[0]


@functools.lru_cache
def _device_target(device: torch.device) -> Target:
    """The target of a device, with what was tuned on it."""
    name, target = device_name(device), _untuned_target(device)
    return dataclasses.replace(target, tuned=load(name, Tile), splittings=load(name, Splitting))


def _untuned_target(device: torch.device) -> Target:
    """The target of a device; anything that is no GPU is Triton's interpreter."""
    if device.type != "cuda":
        # Few, so that small test shapes still split their reductions.
        return Target("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip:
        return Target(family_of_amd(properties.gcnArchName), count)
    return target_of_capability(properties.major, properties.minor, count)


def device_name(device: torch.device) -> str:
    """As its driver says it."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).name if on_gpu else "interpreter"


def forget_devices() -> None:
    """Makes the next launch look at the device, and for what was tuned on it, again."""
    _device_target.cache_clear()
    PLANS.clear()


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied only where the last dimension is strided.

    Or where one position is so far from the next (8 million elements) that offsets inside a tile,
    which are 32 bits wide to save registers, could overflow.
    """
    return tuple(
        t if (t.stride(-1) == 1 or t.shape[-1] == 1) and t.stride(-2) < 1 << 23 else t.contiguous()
        for t in tensors
    )


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its run-time and its compile-time arguments: all that a launch is.

    Arguments are values, or groups of them (see :mod:`~fastprefix.kernels.arguments`). One that
    `overlaps` may begin before the launch in front of it has ended. Its kernel waits for that one
    before it reads what that one wrote. Only for targets that overlap launches.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile
    overlaps: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler and its launcher are told, besides the arguments."""
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        return options | {"launch_pdl": True} if self.overlaps else options

    @property
    def values(self) -> dict[str, Any]:
        """The run-time arguments by name, the fields of groups instead of groups."""
        found: dict[str, Any] = {}
        for name, value in self.arguments.items():
            fields = getattr(value, "_asdict", None)
            found |= {name: value} if fields is None else fields()
        return found

    def run(self) -> None:
        """Enqueue the kernel; inside :func:`collected` list it instead."""
        collecting = _COLLECTING.get()
        if collecting is not None:
            collecting[1].append(self)
            return
        compiled = self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
        record = _RECORD.get()
        if record is not None:
            record.launches.append((self, compiled))

    def compile(self) -> None:
        """Compiles the kernel for these arguments and loads it, so that a later launch need not."""
        compiled = self.kernel.warmup(
            grid=self.grid, **self.arguments, **self.constants, **self.options
        )
        _ = compiled.run  # loads it


class Record(NamedTuple):
    """What happened inside :func:`recorded`.

    Attributes:
        launches: each with the compiled kernel, None in the interpreter.
        scratch: what :func:`scratch` handed out.
    """

    launches: list[tuple[Launch, Any]]
    scratch: list[Tensor]


# Of the thread or task that is inside of `recorded`.
_RECORD: ContextVar[Record | None] = ContextVar("record", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Lists what is launched inside, and the scratch memory it gets."""
    record = Record([], [])
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def result(
    shape: tuple[int, ...] | torch.Size, like: Tensor, allocate: Callable[..., Tensor] | None = None
) -> Tensor:
    """A result [B, H, L, D], in memory [B, L, H, D] whatever the operands' layout is.

    This is the order in which a model's projections read and write. `allocate` takes the place of
    :func:`torch.empty`.
    """
    B, H, L, D = shape
    allocate = allocate or torch.empty
    return allocate((B, L, H, D), dtype=like.dtype, device=like.device).transpose(1, 2)


def scratch(
    shape: tuple[int, ...] | torch.Size, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Memory that no value outlives the call in."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    record = _RECORD.get()
    if record is not None:
        record.scratch.append(memory)
    return memory


# The target and the list of `collected`, in the thread or task that is inside.
_COLLECTING: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("collecting", default=None)


def collecting() -> bool:
    """Whether launches are listed instead of enqueued."""
    return _COLLECTING.get() is not None


@contextlib.contextmanager
def collected(target: Target) -> Iterator[list[Launch]]:
    """Inside, every device is `target`, and launches are listed instead of enqueued."""
    steps: list[Launch] = []
    token = _COLLECTING.set((target, steps))
    try:
        yield steps
    finally:
        _COLLECTING.reset(token)
