"""What the kernels share: checks of the input, tile sizes, the offsets on the device, tile arithmetic.

Rows. The query heads of a KV head read the same keys, so one program serves all of them: its rows are
(query, head of the group) pairs, query-major, the group padded to a power of two. Rows come in batches of
`ROWS` (16, the least a matrix instruction takes): `BQ` queries times the padded group.

Columns. The window is one dense tile of keys for all rows. A rung's keys are, for the queries of one batch,
`BQ` neighbouring rows of k; a chunk of `RC` rungs is a tile of `RC * BQ` columns (rung-major) for each
batch, multiplied as a batched product of which the entries where the column's query is the row's count.
With a group of 4 that is every fourth entry, and each far row is read once for the whole group.

Positions. `limit` is how far back a query may look: its own key index, or less inside a packed document.
A distance exists for it when it is at most the limit; distance 0 always does, so no row is ever empty.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.errors import InputError

UNREACHABLE = 2**30
"""An offset farther than any key: what fills up the shorter sets, and what a dropped rung becomes."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel: queries (or keys) a program, keys a window tile, rungs a chunk."""

    block: int
    near: int
    rungs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """The sizes of one call that do not depend on its length."""

    group: int
    padded_group: int
    size: int
    padded_size: int
    batch_queries: int
    rows: int
    dtype: torch.dtype


def shape_of(q: Tensor, k: Tensor) -> Shape:
    """The shape of a call, after checking that the kernels support it."""
    size, group = q.shape[3], q.shape[2] // k.shape[2]
    if q.dtype not in _SUPPORTED:
        raise InputError(
            f"q is {q.dtype}; the GPU kernels take {', '.join(map(str, _SUPPORTED))}: convert it, "
            "or use backend='reference'"
        )
    if size % 8 or not 16 <= size <= 256:
        raise InputError(
            f"head size is {size}; the GPU kernels take multiples of 8 from 16 to 256: pad it with zeros "
            "(and give `scale`), or use backend='reference'"
        )
    if k.shape[1] >= UNREACHABLE:
        raise InputError(f"{k.shape[1]} key tokens; the GPU kernels take fewer than {UNREACHABLE}")
    padded = triton.next_power_of_2(group)
    rows = max(16, padded)
    return Shape(group, padded, size, triton.next_power_of_2(size), rows // padded, rows, q.dtype)


@cache
def offset_table(sets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Offsets on the device, int32 (sets, 1 + most rungs): their number, then the offsets.

    Kept for good: a model has a handful of patterns. The first call copies, which stalls once.
    """
    width = max(map(len, sets))
    rows = [[len(one), *(min(d, UNREACHABLE) for d in one), *[UNREACHABLE] * (width - len(one))] for one in sets]
    return torch.tensor(rows, dtype=torch.int32).to(device)


def positions_stride(positions: Tensor | None) -> int:
    """The batch stride of `positions`, 0 where all rows of the batch share them."""
    return 0 if positions is None or positions.shape[0] == 1 else positions.stride(0)


def strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head strides of (B, T, H, D) tensors."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def inner_contiguous(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous: autograd may hand over an expanded gradient."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_of(shape: Shape, tiles: Tiles) -> int:
    """Queries a program: the wanted block, at least one batch."""
    return max(tiles.block, shape.batch_queries)


def explain(error: Exception, shape: Shape) -> InputError:
    """What to say when the GPU has too little shared memory."""
    return InputError(
        f"this GPU has too little shared memory for head size {shape.size} and {shape.group} query heads a KV "
        f"head in {shape.dtype} ({error}); use 16-bit tensors, a smaller head or a newer GPU"
    )


@triton.jit
def place(tokens, BLOCK: tl.constexpr, kv_heads):
    """Which block, KV head and batch entry a program has: heads fastest, so that neighbours share lines."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK)
    i_head = pid % kv_heads
    i_block = (pid // kv_heads) % blocks
    i_batch = pid // (kv_heads * blocks)
    return i_block, i_head.to(tl.int64), i_batch.to(tl.int64)


@triton.jit
def query_limit(p_positions, stride, i_batch, o_query, past, m_row, HAS_POSITIONS: tl.constexpr):
    """How far back each row may look. [BR]"""
    b_limit = o_query + past
    if HAS_POSITIONS:
        b_position = tl.load(p_positions + i_batch * stride + o_query, mask=m_row, other=0)
        b_limit = tl.minimum(b_limit, b_position)
    return b_limit


@triton.jit
def near_mask(o_own, b_limit, o_key, window):
    """Which keys of a dense tile are in each row's window. [BR, BN]"""
    b_distance = o_own[:, None] - o_key[None, :]
    return (b_distance >= 0) & (b_distance <= window) & (b_distance <= b_limit[:, None])


@triton.jit
def load_rows(p_x, o_row, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr):
    """Rows of a (tokens, size) matrix, zeros where the mask is false. [BR, BD]"""
    o_size = tl.arange(0, BD)
    p_tile = p_x + o_row.to(tl.int64)[:, None] * stride + o_size[None, :]
    if BD == SIZE:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    return tl.load(p_tile, mask=m_row[:, None] & (o_size < SIZE)[None, :], other=0.0)


@triton.jit
def load_batches(p_x, o_row, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr):
    """Rows of a (tokens, size) matrix for every batch of queries. [NB, C, BD]"""
    o_size = tl.arange(0, BD)
    p_tile = p_x + o_row.to(tl.int64)[:, :, None] * stride + o_size[None, None, :]
    if BD == SIZE:
        return tl.load(p_tile, mask=m_row[:, :, None], other=0.0)
    return tl.load(p_tile, mask=m_row[:, :, None] & (o_size < SIZE)[None, None, :], other=0.0)


@triton.jit
def query_rows(p_x, o_query, o_group, stride_t, stride_h, m_row, SIZE: tl.constexpr, BD: tl.constexpr):
    """Rows (query, head of the group) of one KV head's queries. [BR, BD]"""
    o_row = o_query.to(tl.int64) * stride_t + o_group.to(tl.int64) * stride_h
    return load_rows(p_x, o_row, 1, m_row, SIZE, BD)


@triton.jit
def store_query_rows(p_x, b_x, o_query, o_group, stride_t, stride_h, m_row, SIZE: tl.constexpr, BD: tl.constexpr):
    """Write rows (query, head of the group), cast to the tensor's dtype."""
    o_size = tl.arange(0, BD)
    o_row = o_query.to(tl.int64) * stride_t + o_group.to(tl.int64) * stride_h
    m_tile = m_row[:, None] & (o_size < SIZE)[None, :]
    tl.store(p_x + o_row[:, None] + o_size[None, :], b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def chunk_columns(p_set, first, rungs, BQ: tl.constexpr, RC: tl.constexpr):
    """Offset and query of each column of a chunk of rungs, unreachable past the last rung. [RC * BQ] each"""
    o_column = tl.arange(0, BQ * RC)
    o_rung = first + o_column // BQ
    b_offset = tl.load(p_set + 1 + o_rung, mask=o_rung < rungs, other=1 << 30)
    return b_offset, o_column % BQ, o_rung


@triton.jit
def chunk_keys(first_own, b_offset, o_slot, keys, NB: tl.constexpr, BQ: tl.constexpr):
    """Key index of each column for each batch of queries, and whether there is one. [NB, RC * BQ]"""
    o_own = first_own + tl.arange(0, NB)[:, None] * BQ + o_slot[None, :]
    o_key = o_own - b_offset[None, :]
    return o_key, (o_key >= 0) & (o_key < keys)


@triton.jit
def chunk_mask(b_limit, b_offset, o_slot, NB: tl.constexpr, ROWS: tl.constexpr, GP: tl.constexpr):
    """Which entries of a chunk count: the row's own query, within its limit. [NB, ROWS, RC * BQ]"""
    o_slot_of_row = tl.arange(0, ROWS) // GP
    m_own = o_slot_of_row[None, :, None] == o_slot[None, None, :]
    b_limits = tl.reshape(b_limit, [NB, ROWS])
    return m_own & (b_offset[None, None, :] <= b_limits[:, :, None])
