"""Peak memory during a piece of work: of the process, or of the GPU."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

# With these variables glibc returns freed blocks to the system at once. Otherwise a measurement
# could reuse what the previous one left, and show too little. Set them before the process starts.
# They slow allocation down, so memory and time are measured in different processes.
ALLOCATOR_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def peak_memory() -> PeakMemory | PeakCudaMemory:
    """Measures the memory where models run: that of the GPU if there is one."""
    return PeakCudaMemory() if torch.cuda.is_available() else PeakMemory()


class PeakCudaMemory:
    """Context manager: how far the tensors on the current GPU rose above what was there.

    PyTorch's allocator counts them.

    Attributes:
        megabytes: the rise in 10^6 bytes, known after the block.
    """

    megabytes: float

    def __enter__(self) -> PeakCudaMemory:
        torch.cuda.reset_peak_memory_stats()
        self._start = torch.cuda.memory_allocated()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.megabytes = (torch.cuda.max_memory_allocated() - self._start) / 1e6


class PeakMemory:
    """Context manager: how far the process's resident memory rose above where it stood.

    On Linux the kernel's own high-water mark is read, which misses nothing; elsewhere a thread
    samples the resident size every millisecond.

    Attributes:
        megabytes: the rise in 10^6 bytes, known after the block.
    """

    megabytes: float

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._process = psutil.Process(os.getpid())
        self._start = self._process.memory_info().rss
        self._exact = _reset_high_water_mark()
        if not self._exact:
            self._peak = self._start
            self._done = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._exact:
            peak = _high_water_mark()
        else:
            self._done.set()
            self._sampler.join()
            peak = self._peak
        self.megabytes = max(0, peak - self._start) / 1e6

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, self._process.memory_info().rss)


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS}: no VmHWM line")
