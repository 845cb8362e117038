"""One kernel at a time over its tile sizes.

What does not compile is left out. Most of the time goes into compiling: several runs side by side fill the cache, a
last one alone has the times that count.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.operator.cases import Case
from benchmarks.timing import measure
from fibattn.attention.blocks import block_means
from fibattn.attention.chosen import numbers_of
from fibattn.attention.ops import NO_LIMIT
from fibattn.attention.triton.chosen_forward import Tiles as ChosenTiles
from fibattn.attention.triton.key_gradients import RungTiles, WindowTiles
from fibattn.attention.triton.launch import Tiles
from fibattn.attention.triton.learned import columns_of
from fibattn.pattern import ChosenPattern, base_rungs

FORWARD, BACKWARD, KEYS = (
    importlib.import_module(f"fibattn.attention.triton.{room}") for room in ("forward", "backward", "key_gradients")
)
CHOSEN, CHOSEN_FORWARD, CHOSEN_BACKWARD = (
    importlib.import_module(f"fibattn.attention.triton.{room}")
    for room in ("chosen", "chosen_forward", "chosen_backward")
)

ROWS = [
    Tiles(batches, columns, near, warps, stages, registers)
    for batches, columns, warps in ((1, 16, 1), (2, 16, 1), (2, 16, 2), (4, 16, 4), (8, 16, 4), (1, 32, 1), (2, 32, 2))
    for near in (32, 64)
    for stages in (1, 2)
    for registers in (None, 168, 128, 96, 80)
]
QUERY_TILES = [ChosenTiles(keys, 4, stages) for keys in (32, 64, 128) for stages in (2, 3)]
SPACE: dict[str, list[Any]] = {
    "chosen-choice": [1, 2, 4],
    "chosen-forward": QUERY_TILES,
    "chosen-query": QUERY_TILES,
    "chosen-keys": [ChosenTiles(16, warps, stages) for warps in (1, 2, 4) for stages in (2, 3)],
    "forward": ROWS,
    "query": ROWS,
    "rungs": [
        RungTiles(keys, part, unroll, warps)
        for keys, warps in ((64, 4), (64, 8), (128, 8), (128, 16), (256, 16), (256, 32))
        for part in (32, 64)
        for unroll in (1, 2, 4)
    ],
    "window": [
        WindowTiles(keys, rows, warps, stages)
        for keys, rows, warps in ((16, 16, 1), (16, 32, 1), (32, 16, 1), (32, 16, 2), (64, 32, 4), (64, 64, 4))
        for stages in (1, 2, 3, 4)
    ],
}
CHOICE = {
    "forward": (FORWARD, "tiles_for"),
    "query": (BACKWARD, "query_tiles_for"),
    "rungs": (KEYS, "rung_tiles_for"),
    "window": (KEYS, "window_tiles_for"),
    "chosen-choice": (CHOSEN, "warps_for"),
    "chosen-forward": (CHOSEN_FORWARD, "tiles_for"),
    "chosen-query": (CHOSEN_BACKWARD, "tiles_for"),
    "chosen-keys": (CHOSEN_BACKWARD, "key_tiles_for"),
}
KERNELS = {
    "query": (BACKWARD, "query_grad_kernel"),
    "rungs": (KEYS, "rung_grad_kernel"),
    "window": (KEYS, "window_grad_kernel"),
    "chosen-query": (CHOSEN_BACKWARD, "chosen_query_grad_kernel"),
    "chosen-keys": (CHOSEN_BACKWARD, "chosen_key_grad_kernel"),
}


class NotLaunched:
    """Stands in for a kernel that is not the one being timed."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


def works(case: Case, kernel: str, learned: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of a case."""
    if kernel.startswith("chosen"):
        return _chosen_works(case, kernel)
    q, k, v = case.inputs()
    alpha = torch.ones(1, device="cuda") if learned else None
    rungs = base_rungs("fibonacci") if learned else case.pattern.offsets
    columns, scale = columns_of(q, k, alpha, case.pattern.window, (rungs,), NO_LIMIT), q.shape[-1] ** -0.5

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return FORWARD.forward(q, k, v, None, scale, columns)

    out, lse = forward()
    grad = torch.randn_like(out)
    return forward, lambda: BACKWARD.backward(grad, None, out, lse, q, k, v, None, scale, columns)


def _chosen_works(case: Case, kernel: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same with four blocks of 16 keys that queries choose."""
    (q, k, v), pattern = case.inputs(), ChosenPattern()
    means, numbers = block_means(k, pattern.block), CHOSEN.Numbers(*numbers_of(pattern, q.shape[-1] ** -0.5))

    def choosing() -> Any:
        return CHOSEN.choose(q, means, k.shape[1], None, None, numbers)

    given = ((q, k, v, q, k), None, None, *choosing(), numbers)
    out, lse = CHOSEN_FORWARD.forward(*given)
    grad = torch.randn_like(out)
    return (
        choosing if kernel == "chosen-choice" else lambda: CHOSEN_FORWARD.forward(*given),
        lambda: CHOSEN_BACKWARD.backward(grad, None, out, lse, *given),
    )


def time_kernel(case: Case, kernel: str, learned: bool) -> list[tuple[float, Any]]:
    """The times of one kernel for every configuration that runs, fastest first; None stands for the built-in one."""
    forward, backward = works(case, kernel, learned)
    room, name = CHOICE[kernel]
    standard = getattr(room, name)
    kept = {other: getattr(*place) for other, place in KERNELS.items()}
    rows = []
    for tiles in (None, *SPACE[kernel]):
        if tiles is not None:
            setattr(room, name, lambda *shape, tiles=tiles: tiles)
        for other, place in KERNELS.items():
            setattr(*place, kept[other] if other == kernel else NotLaunched())
        try:
            rows.append(
                (measure(forward if kernel.endswith(("forward", "choice")) else backward, "cuda").median, tiles)
            )
        except Exception:
            continue
        finally:
            setattr(room, name, standard)
            for other, place in KERNELS.items():
                setattr(*place, kept[other])
    return sorted(rows, key=lambda row: row[0])
