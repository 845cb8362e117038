"""Time one kernel at a time over its tile sizes on an NVIDIA GPU: how the built-in sizes were chosen.

    python benchmarks/tile_sweep.py --kernels fwd dq dkv --shapes small large

Prints the fastest configurations, in microseconds (medians by events on the GPU, L2 cache flushed between
runs), and those that do not compile. The comparison with other providers is `fibattn bench attention`.
"""

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from fibattn.attention.triton import backward, forward, offset_table
from fibattn.bench.cases import SHAPES, Case
from fibattn.pattern import Pattern

FORWARD = importlib.import_module("fibattn.attention.triton.forward")
BACKWARD = importlib.import_module("fibattn.attention.triton.backward")


def microseconds(work: Callable[[], object], rep: int = 60) -> float:
    return 1000 * triton.testing.do_bench(work, warmup=10, rep=rep, return_mode="median")


def parts(inputs: list[torch.Tensor], pattern: Pattern) -> dict[str, Callable[[], object]]:
    """Each kernel by itself: the forward, and the backward's two."""
    q, k, v = inputs
    table = offset_table((pattern.offsets,), q.device)
    scale = q.shape[-1] ** -0.5
    out, lse = forward(q, k, v, None, scale, pattern.window, table)
    grad = torch.randn_like(out)
    return {
        "forward": lambda: forward(q, k, v, None, scale, pattern.window, table),
        "backward": lambda: backward(grad, None, out, lse, q, k, v, None, scale, pattern.window, table),
    }


class Only:
    """A kernel's stand-in that launches it, or not."""

    def __init__(self, kernel: object, run: bool):
        self.kernel, self.run = kernel, run

    def __getitem__(self, grid: object) -> Callable[..., object]:
        return self.kernel[grid] if self.run else lambda *args, **options: None


def kernel_times(
    inputs: list[torch.Tensor], pattern: Pattern, which: tuple[str, ...] = ("fwd", "dq", "dkv")
) -> dict[str, float]:
    works = parts(inputs, pattern)
    times = {}
    if "fwd" in which:
        times["fwd"] = microseconds(works["forward"])
    query, key = BACKWARD.query_grad_kernel, BACKWARD.key_grad_kernel
    for name, runs in (("dq", (True, False)), ("dkv", (False, True))):
        if name in which:
            BACKWARD.query_grad_kernel, BACKWARD.key_grad_kernel = Only(query, runs[0]), Only(key, runs[1])
            times[name] = microseconds(works["backward"])
    BACKWARD.query_grad_kernel, BACKWARD.key_grad_kernel = query, key
    return times


SPACE = {
    "fwd": [
        {"block": block, "near": max(2 * block, 32), "rungs": rungs, "warps": warps, "stages": stages}
        for block, warps in ((16, 4), (16, 2), (8, 2), (8, 1), (4, 1), (32, 4))
        for rungs in (4, 8)
        for stages in (1, 2)
    ],
    "dkv": [
        {"block": block, "near": near, "warps": warps}
        for block in (16, 32, 64, 128)
        for near in (32, 64)
        for warps in (2, 4, 8)
    ],
}
SPACE["dq"] = SPACE["fwd"]
HEURISTIC = {"fwd": (FORWARD, "tiles_for"), "dq": (BACKWARD, "query_tiles_for"), "dkv": (BACKWARD, "key_tiles_for")}


def sweep(arguments: argparse.Namespace) -> None:
    """Times of one kernel for every tile configuration."""
    for shape, tokens in (("small", 1024), ("large", 8192)):
        if shape not in arguments.shapes:
            continue
        total = 32768 if shape == "small" else 16384
        inputs = Case(shape, 0, tokens, total // tokens, "bfloat16", "cuda").inputs()
        for window, kernel in itertools.product(arguments.windows, arguments.kernels):
            pattern = Pattern.fibonacci(window=window)
            room, name = HEURISTIC[kernel]
            standard = getattr(room, name)
            rows = []
            for change in SPACE[kernel]:
                setattr(room, name, lambda s, change=change, standard=standard: replace(standard(s), **change))
                try:
                    rows.append((kernel_times(inputs, pattern, (kernel,))[kernel], change))
                except Exception as error:
                    rows.append((float("inf"), {**change, "error": str(error)[:60]}))
            setattr(room, name, standard)
            rows.sort(key=lambda row: row[0])
            print(f"{shape} W={window} {kernel} {tokens}")
            for time, change in [*rows[: arguments.top], *[row for row in rows if row[0] == float("inf")]]:
                print(f"   {time:8.1f}  {change}")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["fwd", "dq", "dkv"], choices=HEURISTIC)
    parser.add_argument("--windows", nargs="+", type=int, default=[12])
    parser.add_argument("--shapes", nargs="+", default=["small", "large"], choices=SHAPES)
    parser.add_argument("--top", type=int, default=6, help="how many configurations to print")
    sweep(parser.parse_args())


if __name__ == "__main__":
    main()
