"""A GPU that launches nothing: the whole host path of a CUDA call, on a machine without one.

:func:`install` gives Triton a driver that loads and launches nothing. Everything before the driver
is real: the operator's checks, the choice of a backend, the launchers, ``JITFunction.run``, and, if
``compiled``, the compilation to a cubin. The tensors stay on the CPU, and the operator is told that
Triton runs there, as it does in the interpreter. Results have the right shapes and no meaning.

Install it in a process of its own, started with ``TRITON_INTERPRET=0``. It stays for good.

What is missing from a real call: Triton's C launcher (it reads the arguments and calls
``cuLaunchKernel``), CUDA's allocator, and the change of the current device.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel

from fastprefix.attention import run, selection
from fastprefix.attention.backends import triton as triton_backend
from fastprefix.kernels import launch
from fastprefix.kernels.target import target_of_capability

# Operators of PyTorch that run no kernel: they allocate, or look at memory in another way.
NO_KERNEL = frozenset({
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
})  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """One launch that a real driver would have handed to the device.

    Attributes:
        name: of the kernel.
        grid: programs along each axis.
        stream: number of the stream.
        overlaps: whether it may begin before the launch in front of it has ended.
        arguments: of the kernel, compile-time ones included, in order. Tensors are addresses.
    """

    name: str
    grid: tuple[int, int, int]
    stream: int
    overlaps: bool
    arguments: tuple[Any, ...]


@dataclass
class Counts:
    """What happened inside :func:`counting`.

    Attributes:
        launches: of Triton kernels, in order.
        kernels: calls of PyTorch's operators that run a kernel, by name.
        loaded: names of Triton kernels that were compiled (or stood in Triton's cache on disk) and
            loaded, because no loaded one was specialised for the arguments.
        outliving: tensors made inside that are still alive at the end.
    """

    launches: list[Launched] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    loaded: list[str] = field(default_factory=list)
    outliving: list[Tensor] = field(default_factory=list)


def _addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with the address of each tensor in its place; tuples keep their structure."""
    return tuple(
        each.data_ptr() if isinstance(each, Tensor)
        else _addresses(each) if isinstance(each, tuple)
        else each
        for each in arguments
    )  # fmt: skip


class Driver(DriverBase):
    """Stands in for Triton's CUDA driver. It loads and launches nothing, and lists both."""

    def __init__(self, capability: tuple[int, int]) -> None:
        """A driver without a device of this compute capability."""
        self.capability = capability
        self.counts: Counts | None = None
        self.stream = 0
        self.device = 0
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda device: {
                "max_shared_mem": 232_448,
                "max_num_regs": 65_536,
                "multiprocessor_count": 132,
                "warpSize": 32,
            },
        )

    def load_binary(self, name: str, kernel: Any, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills and the largest number of threads."""
        if self.counts is not None:
            self.counts.loaded.append(name)
        return (1, 2, 32, 0, 1024)

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What the launches of a compiled kernel call, with what JITFunction.run passes."""
        name, overlaps = metadata.name, metadata.launch_pdl

        def launch(*arguments: Any) -> None:
            if self.counts is not None:
                addresses = _addresses(arguments[9:])
                launched = Launched(name, arguments[:3], arguments[3], overlaps, addresses)
                self.counts.launches.append(launched)

        return launch

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_device_capability(self, device: int) -> tuple[int, int]:
        """The same for every device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Set :attr:`stream` to be on another."""
        return self.stream

    def get_current_device(self) -> int:
        """Set :attr:`device` to be on another."""
        return self.device

    @staticmethod
    def is_active() -> bool:
        """Always."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Only a real launcher needs it."""
        return ty

    def get_benchmarker(self) -> None:  # type: ignore[override]
        """There is nothing to time."""

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


class Uncompiled(CompiledKernel):
    """A kernel that was specialised but not compiled: for tests of many specialisations."""

    def __init__(self, src: Any, options: dict[str, Any]) -> None:
        """No code; `src` and `options` as Triton's compile takes them."""
        self.src = src
        self.name = src.fn.__name__
        self.metadata = SimpleNamespace(
            name=self.name, shared=0, num_warps=options["num_warps"], tmem_size=None,
            launch_pdl=options.get("launch_pdl", False),
        )  # fmt: skip
        self.packed_metadata = ()
        self.hash, self.kernel, self.metadata_group, self.asm = "", b"", {}, {}
        self.module = self.function = self._run = None


def install(*, compiled: bool = True, capability: tuple[int, int] = (9, 0)) -> Driver:
    """Makes Triton and the operator take the CPU for a GPU, for the rest of the process.

    Args:
        compiled: compile the kernels for real (seconds each; Triton keeps them on disk). Otherwise
            a stand-in without code takes their place.
        capability: compute capability of the simulated device, which has 132 multiprocessors.

    Raises:
        RuntimeError: the kernels were imported for Triton's interpreter.
    """
    if triton.knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("simulated_gpu: start Python with TRITON_INTERPRET=0")
    driver = Driver(capability)
    triton.runtime.driver.set_active(driver)
    if not compiled:
        triton.compiler.compile = lambda src, target=None, options=None, **_: Uncompiled(
            src, options
        )
    target = target_of_capability(*capability, 132)
    launch._device_target = functools.lru_cache(lambda device: target)
    selection.interpreting = lambda: True
    triton_backend.PLANNED_ON.add("cpu")
    return driver


class _Operators(TorchDispatchMode):
    """Counts PyTorch's kernels and remembers the tensors they return."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        results = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if space != "fastprefix" and name not in NO_KERNEL:
            # PyTorch's `contiguous` comes here only where it copies.
            self.counts.kernels["clone" if name == "contiguous" else name] += 1
        for each in results if isinstance(results, tuple | list) else (results,):
            if isinstance(each, Tensor):
                self.made.append(weakref.ref(each))
        return results


@contextlib.contextmanager
def counting(driver: Driver) -> Iterator[Counts]:
    """Counts what runs inside; complete at the end of the block.

    The operator does not see that it is watched: it would otherwise run as one registered op, whose
    inside nobody sees.
    """
    counts = Counts()
    is_watched = run.is_watched

    def ignoring_modes(tensor: Tensor) -> bool:
        with _disable_current_modes():
            return is_watched(tensor)

    run.is_watched, driver.counts = ignoring_modes, counts
    try:
        with _Operators(counts) as operators:
            yield counts
    finally:
        run.is_watched, driver.counts = is_watched, None
    gc.collect()
    counts.outliving = [x for made in operators.made if (x := made()) is not None]
