"""`python -m benchmarks tile-sweep`: one kernel at a time over its tile sizes; how the built-in sizes were chosen."""

from dataclasses import dataclass
from typing import Literal

from fibattn.cli.flags import parse

Kernel = Literal[
    "forward", "query", "rungs", "window", "chosen-choice", "chosen-forward", "chosen-query", "chosen-keys"
]


@dataclass(frozen=True)
class Arguments:
    """Time kernels over their tile sizes on an NVIDIA GPU; prints the fastest and the built-in ones."""

    kernels: tuple[Kernel, ...] = ("forward", "query", "rungs", "window")
    """The forward pass, and the gradients of queries, of keys at rungs and of keys in the window; with chosen blocks
    the choice, the forward pass, and the gradients of queries and of keys."""
    shapes: tuple[Literal["small", "large"], ...] = ("small", "large")
    """8/2 heads of 64, and 32/8 heads of 128."""
    windows: tuple[int, ...] = (12, 128)
    learned: bool = False
    """With a learned scale."""
    top: int = 6
    """How many of the fastest to print."""


def run(arguments: list[str]) -> None:
    """Time, and print the fastest tiles of each kernel and the built-in ones, in microseconds."""
    chosen = parse(Arguments, arguments, "python -m benchmarks tile-sweep")

    from benchmarks.environment import heading, need_gpu
    from benchmarks.operator.cases import Case

    need_gpu()
    from benchmarks.tiles import time_kernel
    from fibattn.attention.triton.shape import shape_of

    print(heading())
    for shape in chosen.shapes:
        length, batch = (1024, 32) if shape == "small" else (8192, 2)
        for window in chosen.windows:
            case = Case(shape, window, length, batch, "bfloat16", "cuda")
            standard = shape_of(*case.inputs()[:2])
            for kernel in chosen.kernels:
                print(f"{case.label} {kernel} (head size {standard.size})")
                for place, (time, tiles) in enumerate(time_kernel(case, kernel, chosen.learned)):
                    if place < chosen.top or tiles is None:
                        print(f"   {time:8.1f}  {tiles or 'built in'}", flush=True)
