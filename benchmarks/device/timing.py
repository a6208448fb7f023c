"""Timing on the device: every side is captured in a CUDA graph, and its replays are timed.

So the host's time is in no figure, for nobody. A graph holds one call for each of several problems,
like the layers of a model. Together they exceed the L2 cache, so no side finds its keys there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[], list[Tensor]]
L2_TIMES = 4  # a graph's problems hold this many times the L2 cache
MOST_CALLS = 48  # of a graph


def calls_of(one: int, expanded: int, free: int, l2: int) -> int:
    """How many problems a graph gets.

    Args:
        one: bytes of a problem with one copy of the prefix.
        expanded: bytes of its expanded keys and values.
        free: bytes of free memory on the device; a third of it is used.
        l2: bytes of the L2 cache.
    """
    wanted = max(2, -(-L2_TIMES * l2 // one))
    room = max(1, free // 3 // (one + expanded))
    return min(wanted, room, MOST_CALLS)


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph with all calls, one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, calls[0]):  # compiles, and fills what libraries keep
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(
    graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of one call of every side: median, least and most, in turn, in both orders."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(rounds + 2):
        for name in list(graphs) if i % 2 == 0 else reversed(graphs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if i >= 2:  # two rounds warm up
                times[name].append(begin.elapsed_time(end) / calls)
    return {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in times.items()
    }


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes that a call takes at its peak beyond what lay there before, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call runs on the device, in order, each once; a reason if none.

    Where the profiler cannot see the device, the list holds one line that says so.
    """
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        names = [event.name for event in seen.events() if event.device_type.name in ("CUDA", "HIP")]
    except RuntimeError as error:
        return [f"unknown: {str(error).splitlines()[0]}"]
    return list(dict.fromkeys(names)) or ["unknown: the profiler saw no kernel"]
