"""Peak memory: of PyTorch's allocator on a GPU, of a child process's resident memory on a CPU.

The child returns freed blocks to the system at once, which would be too slow to be timed; and what
earlier cases left in this process cannot hide what a case takes. Set-up and work are those that are
timed: keys that a provider keeps expanded count, the inputs that all share do not.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

import torch

from fastprefix.bench.case import Case, synchronize
from fastprefix.training.memory import ALLOCATOR_ENVIRONMENT, PeakCudaMemory, PeakMemory

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
QUICK_S = 1.0  # shorter work is measured twice: the first time libraries start, too


class MemoryMeter:
    """Measures one case after the other. It is a context manager, which ends its child.

    Args:
        device: where the cases run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._child: ProcessPoolExecutor | None = None

    def peaks(self, case: Case, providers: Iterable[str]) -> dict[str, int | None]:
        """Bytes by provider; None where the process died, as it does without memory."""
        found: dict[str, int | None] = {}
        for name in providers:
            if self._device.type == "cuda":
                found[name] = peak_bytes(case, name, self._device)
                continue
            try:
                found[name] = self._started().submit(peak_bytes, case, name, self._device).result()
            except BrokenProcessPool:
                found[name], self._child = None, None
        return found

    def _started(self) -> ProcessPoolExecutor:
        if self._child is None:
            context = multiprocessing.get_context("spawn")
            self._child = ProcessPoolExecutor(1, context)
            before = dict(os.environ)
            os.environ.update(ALLOCATOR_ENVIRONMENT)  # read by the C library when a process starts
            os.environ.update(QUIET)
            try:
                self._child.submit(int).result()
            finally:
                os.environ.clear()
                os.environ.update(before)
        return self._child

    def __enter__(self) -> MemoryMeter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._child is not None:
            self._child.shutdown()


def peak_bytes(case: Case, provider: str, device: torch.device) -> int:
    """How far memory rises above the inputs while a provider is set up and works once."""
    begin = time.perf_counter()
    peak = _measured(case, provider, device)
    if time.perf_counter() - begin < QUICK_S:
        return _measured(case, provider, device)
    return peak


def _measured(case: Case, provider: str, device: torch.device) -> int:
    inputs = case.inputs(device)
    gc.collect()
    synchronize(device)
    memory = PeakCudaMemory() if device.type == "cuda" else PeakMemory()
    with memory:
        work = case.make(provider, inputs)
        (work.peak or work.run)()
        synchronize(device)
    return round(memory.megabytes * 1e6)
