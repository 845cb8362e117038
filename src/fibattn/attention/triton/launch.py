"""The host's side of a launch: tile sizes, the arguments that kernels share, what to say where one does not fit."""

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fibattn.attention.triton.columns import Columns
from fibattn.attention.triton.shape import Shape
from fibattn.errors import InputError

kernel = triton.jit(
    do_not_specialize=[
        *("tokens", "keys", "window", "reach", "max_offset", "kv_heads", "heads", "rows", "rungs", "rungs_stored"),
        *("near", "width", "sequences", "tiles", "first_tile", "blocks"),
        *("stride_set", "stride_positions", "stride_cache_positions", "stride_shift", "stride_table"),
    ]
)
"""What makes a kernel. Nothing that varies with the length or the batch may ask for another binary. Other strides do
stay specialized to being multiples of 16, or loads could not be vectorized; with the usual head sizes they always are.
"""

FUSED = {"enable_fp_fusion": True}
"""Products and sums in one instruction: Triton's habit, which its releases are about to give up."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a row kernel: batches a program, columns a tile, keys a dense tile."""

    batches: int
    columns: int
    near: int
    warps: int
    stages: int
    registers: int | None = None
    """At most so many a thread: more warps are resident then, even where a few bytes spill. What the compiler likes if
    None."""


def registers(shape: Shape, small: int, large: int | None = None) -> int | None:
    """How many suffice a thread for 16 rows and heads up to 64, or up to 128; None where there is more of either."""
    if shape.rows > 16 or shape.padded_size > 128:
        return None
    return small if shape.padded_size <= 64 else large


def column_tiles(shape: Shape, columns: Columns, *, learned_registers: int) -> Tiles:
    """Tiles of a row kernel that has columns alone; `learned_registers` suffice where rungs are interpolated.

    Programs of one warp: nothing waits for a barrier, and the next columns are copied while these are multiplied.
    """
    if columns.learned:
        return Tiles(1, 16, near=32, warps=1, stages=2, registers=registers(shape, learned_registers))
    width = 32 if shape.padded_size <= 64 and shape.rows == 16 else 16
    return Tiles(1, width, near=32, warps=1, stages=2, registers=registers(shape, 128, 168))


def of_shape(shape: Shape) -> dict[str, Any]:
    """What every kernel that attends is compiled for."""
    return {"GROUP": shape.group, "SIZE": shape.size, "BD": shape.padded_size, **FUSED}


def sizes(shape: Shape, wide: bool) -> dict[str, Any]:
    """What every kernel of the forward and the backward is compiled for."""
    return {**of_shape(shape), "EXACT": shape.exact, "WIDE": wide}


def row_options(shape: Shape, tiles: Tiles, columns: Columns, wide: bool) -> dict[str, Any]:
    """What the row kernels, those of the forward and of the gradient of q, are compiled for."""
    return {
        **sizes(shape, wide),
        "GP": shape.padded_group,
        "BQ": shape.batch_queries,
        "ROWS": shape.rows,
        "NB": tiles.batches,
        "BN": max(tiles.near, tiles.batches * shape.batch_queries),
        "C": tiles.columns,
        "DENSE": columns.dense,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": tiles.registers,
    }


def fitting_batches(wanted: int, shape: Shape, columns: Columns, limit: int) -> int:
    """Batches a program, halved until the rows, columns or keys of all of them take at most `limit` bytes."""
    # A tile of columns has 16 keys, or near and far ones; a dense one all the queries' own, for k and for v.
    keys = max(32 if columns.learned else 16, 2 * shape.batch_queries if columns.dense else 0)
    while wanted > 1 and wanted * max(shape.rows, keys) * shape.padded_size * shape.dtype.itemsize > limit:
        wanted //= 2
    return wanted


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`. Triton's own function for this takes 15 microseconds on the host."""
    return -(-count // size)


def wide(*tensors: Tensor) -> bool:
    """Whether a batch entry of (B, T, H, D) tensors has elements that 32-bit offsets do not reach."""
    most = 0
    for x in tensors:
        _, tokens, heads, size = x.shape
        _, stride_t, stride_h, _ = x.stride()
        most = max(most, tokens * stride_t + heads * stride_h + size, tokens * heads * size)
    return most >= 2**31


def strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Batch, token and head strides of each (B, T, H, D) tensor."""
    return [x.stride()[:3] for x in tensors]


def inner_contiguous(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous: autograd may hand over an expanded gradient."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Explained:
    """Around launches: where the GPU has too little shared memory, an `InputError` says what to do.

    `contextlib.contextmanager` would cost the host four times as much.
    """

    def __init__(self, shape: Shape):
        self.shape = shape

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OutOfResources):
            shape = self.shape
            raise InputError(
                f"this GPU has too little shared memory for head size {shape.size} and {shape.group} query heads a KV "
                f"head in {shape.dtype} ({error}); use 16-bit tensors, a smaller head or a newer GPU"
            ) from error
