"""How long work takes: medians on a GPU or a CPU, and the bandwidth that bounds them.

Own code, since `triton.testing.do_bench`, `do_bench_cudagraph` and PyTorch's `blocked_autorange` take as many runs as
fit into a time: one where a run is long, and more than a cache has room for where each run moves it on. And none of
them both flushes the L2 cache and leaves out the launches.
"""

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
_ENOUGH = 100_000.0
"""Microseconds of runs on a GPU, between 5 and `MOST_RUNS` of them."""
MOST_RUNS = 200


@dataclass(frozen=True)
class Times:
    """Microseconds: the median, and the shortest and longest run."""

    median: float
    least: float
    most: float
    runs: int
    how: str
    """`graph` (replays of a captured CUDA graph: kernels without launch overhead), `events` or `wall clock`."""


def measure(work: Work, device: str, *, cold: bool = True, capture: bool = True) -> Times:
    """Time `work`, once warmed up.

    On a GPU the time is taken by events; short work is captured in a CUDA graph first, unless `capture` is off. With
    `cold` 256 MB are overwritten before every run, so that the L2 cache holds nothing of it; work that follows upon
    itself in use, as decoding steps do, is timed without. On a CPU it is the wall clock, and neither matters.
    """
    work()
    if device != "cuda":
        return _wall_clock(work)
    estimate = min(_runs(work, 2, cold))
    graph = captured(work) if capture and estimate < _SHORT else None
    count = round(min(max(_ENOUGH / estimate, 5), MOST_RUNS))
    return _summary(_runs(graph or work, count, cold), "graph" if graph else "events")


def captured(work: Work) -> Work | None:
    """What replays `work` as a CUDA graph; None where it cannot be captured (it waits for the GPU, say).

    `work` is run once before, and not while it is captured.
    """
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
    return graph.replay


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a kernel that reads a large tensor and writes another.

    Not `copy_`: in a CUDA graph that is a copy by the driver, which is slower than a kernel on some GPUs.
    """
    source = torch.ones(2**30 if device == "cuda" else 2**26, device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: torch.neg(source, out=target), device).median * 1e6


def _runs(work: Work, count: int, cold: bool) -> list[float]:
    cache: Tensor | None = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda") if cold else None
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begun, ended in events:
        if cache is not None:
            cache.zero_()
        begun.record()
        work()
        ended.record()
    torch.cuda.synchronize()
    return [1000 * begun.elapsed_time(ended) for begun, ended in events]


def _wall_clock(work: Work, least_runs: int = 3, most_runs: int = 25, enough: float = 3.0) -> Times:
    runs: list[float] = []
    while len(runs) < least_runs or (len(runs) < most_runs and sum(runs) < enough * 1e6):
        begun = time.perf_counter()
        work()
        runs.append((time.perf_counter() - begun) * 1e6)
    return _summary(runs, "wall clock")


def _summary(runs: list[float], how: str) -> Times:
    return Times(statistics.median(runs), min(runs), max(runs), len(runs), how)
