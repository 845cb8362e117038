"""How long work takes: medians on a GPU or a CPU, and the bandwidth that bounds them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[], object]

_SHORT = 20_000.0
"""Microseconds below which launches, slow on a busy host, could be measured rather than the work."""
_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Times:
    """Microseconds: the median, and the shortest and longest run."""

    median: float
    least: float
    most: float
    runs: int
    how: str
    """`graph` (replays of a captured CUDA graph: kernels without launch overhead), `events` or `wall clock`."""


def measure(work: Work, device: str) -> Times:
    """Time `work`, once warmed up.

    On a GPU the time is taken by events, with 256 MB overwritten before every run so that the L2 cache holds
    nothing of it; short work is captured in a CUDA graph first. On a CPU it is the wall clock.
    """
    return _measure_gpu(work) if device == "cuda" else _measure_cpu(work)


def _measure_cpu(work: Work, least_runs: int = 3, most_runs: int = 25, enough: float = 3.0) -> Times:
    work()
    runs: list[float] = []
    while len(runs) < least_runs or (len(runs) < most_runs and sum(runs) < enough * 1e6):
        begun = time.perf_counter()
        work()
        runs.append((time.perf_counter() - begun) * 1e6)
    return _summary(runs, "wall clock")


def _measure_gpu(work: Work, enough: float = 100_000.0) -> Times:
    work()
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    estimate = min(_runs(work, cache, 2))
    how = "events"
    if estimate < _SHORT:
        graph = _captured(work)
        if graph is not None:
            work, how = graph.replay, "graph"
    count = round(min(max(enough / estimate, 5), 200))
    return _summary(_runs(work, cache, count), how)


def _runs(work: Work, cache: Tensor, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begun, ended in events:
        cache.zero_()
        begun.record()
        work()
        ended.record()
    torch.cuda.synchronize()
    return [1000 * begun.elapsed_time(ended) for begun, ended in events]


def _captured(work: Work) -> "torch.cuda.CUDAGraph | None":
    """`work` as a CUDA graph; None where it cannot be captured (it waits for the GPU, say)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _summary(runs: list[float], how: str) -> Times:
    return Times(statistics.median(runs), min(runs), max(runs), len(runs), how)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a kernel that reads a large tensor and writes another.

    Not `copy_`: in a CUDA graph that is a copy by the driver, which is slower than a kernel on some GPUs.
    """
    source = torch.ones(2**30 if device == "cuda" else 2**26, device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: torch.neg(source, out=target), device).median * 1e6
