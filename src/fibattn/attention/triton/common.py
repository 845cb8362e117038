"""What the kernels share: checks of the input, tile sizes, the columns on the device, tile arithmetic.

Rows. The query heads of a KV head read the same keys, so one program serves all of them: its rows are
(query, head of the group) pairs, query-major, the group padded to a power of two. Rows come in batches of
`ROWS` (16, the least a matrix instruction takes): `BQ` queries times the padded group.

Columns. The keys of a batch are listed in a table, the same for all batches: the key of column `c` is
`shift[c]` before the batch's first query, and `bits[c]` says for which of the batch's queries it counts.
A window of `W` takes `W + BQ` columns, nearly all of which count for all queries; a rung takes `BQ`, one for
each query. So a batch is a dense product of 16 rows with a few dozen gathered columns (56 for the paper's
window of 12, ten rungs and groups of 4) and each row of k and v is read once for the whole group. A window too
wide for that goes through dense tiles, shared by the batches of a block, and only the rungs through columns.
A learned scale, known to the device alone, puts rungs between two keys. They are in no table of columns: their `BQ`
columns follow from the near offset, and each stands for two keys, the near one and the one before it. A tile of them is
two products, of which the fraction makes the scores of one.

Positions. `limit` is how far back a query may look: its own key index, or less inside a packed document.
A distance exists for it when it is at most the limit; distance 0 always does, so no row is ever empty.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.errors import InputError

UNREACHABLE = 2**30
"""An offset farther than any key: what fills up the shorter sets, and what a dropped rung becomes."""

# `EXACT`, in the kernels, says that inputs are float32: they deserve scores scaled without a rounding more, a
# log-sum-exp in float64 between forward and backward, and long sums in float64.

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

NO_ROW = tl.constexpr(1e30)
"""The log-sum-exp of a row that does not exist: its weights are 0."""

_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)


WIDEST_NEAR = 64
"""A window that takes more columns than this goes through dense tiles."""

MOST_RUNGS = 16
"""No tile has more rungs between two keys than this: so far past the last one tiles may read."""

COLUMNS_MULTIPLE = 64
"""The table of columns is padded to a multiple of this, the most columns of a tile."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a row kernel: batches a program, columns a tile, keys a dense tile."""

    batches: int
    columns: int
    near: int
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
    if k.shape[1] >= UNREACHABLE:
        raise InputError(f"{k.shape[1]} key tokens; the GPU kernels take fewer than {UNREACHABLE}")
    if q.shape[0] >= 2**16:
        raise InputError(f"the batch is {q.shape[0]}; the GPU kernels take at most {2**16 - 1}: split it")
    return _shape(q.shape[3], q.shape[2] // k.shape[2], q.dtype)


@cache
def _shape(size: int, group: int, dtype: torch.dtype) -> Shape:
    if dtype not in _SUPPORTED:
        raise InputError(
            f"q is {dtype}; the GPU kernels take {', '.join(map(str, _SUPPORTED))}: convert it, "
            "or use backend='reference'"
        )
    if size % 8 or not 16 <= size <= 256:
        raise InputError(
            f"head size is {size}; the GPU kernels take multiples of 8 from 16 to 256: pad it with zeros "
            "(and give `scale`), or use backend='reference'"
        )
    padded = triton.next_power_of_2(group)
    rows = max(16, padded)
    return Shape(group, padded, size, triton.next_power_of_2(size), rows // padded, rows, dtype)


def kept_on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor for good, for a cache.

    It is made in a thread of its own: when `torch.compile` prepares a CUDA graph, what this thread allocates lies in
    the graph's memory and is written over with every replay.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: torch.tensor(values, dtype=dtype).to(device)).result()


@cache
def offset_table(sets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Offsets on the device, int32 (sets, 1 + most rungs): their number, then the offsets.

    Kept for good: a model has a handful of patterns. The first call copies, which stalls once.
    """
    width = max(map(len, sets))
    rows = [[len(one), *(min(d, UNREACHABLE) for d in one), *[UNREACHABLE] * (width - len(one))] for one in sets]
    return kept_on_device(rows, torch.int32, device)


def near_columns(window: int, batch_queries: int, multiple: int) -> int:
    """How many columns the window takes, a multiple of `multiple`; 0 where it goes through dense tiles."""
    columns = -(-(window + batch_queries) // multiple) * multiple
    return columns if columns <= WIDEST_NEAR else 0


def near_column(window: int, batch_queries: int, column: int) -> tuple[int, int]:
    """Shift and bits of one of the window's columns: its distance from query `t` of a batch is `t + shift`."""
    shift = column - (batch_queries - 1)
    return shift, sum(1 << t for t in range(batch_queries) if 0 <= t + shift <= window)


def column_table(sets: tuple[tuple[int, ...], ...], window: int, batch_queries: int, device: torch.device) -> Tensor:
    """Columns on the device, int32 (sets, 1 + 2 * width): their number, then shifts, then bits."""
    near = [near_column(window, batch_queries, c) for c in range(near_columns(window, batch_queries, batch_queries))]
    rows = [
        near + [(min(d, UNREACHABLE) - t, 1 << t) for d in offsets for t in range(batch_queries)] for offsets in sets
    ]
    width = columns_width(max(map(len, rows)))
    padded = [row + [(UNREACHABLE, 0)] * (width - len(row)) for row in rows]
    table = [[len(row), *(c[0] for c in full), *(c[1] for c in full)] for row, full in zip(rows, padded, strict=True)]
    return kept_on_device(table, torch.int32, device)


def columns_width(columns: int) -> int:
    """The width of a table that holds so many columns."""
    return max(1, -(-columns // COLUMNS_MULTIPLE)) * COLUMNS_MULTIPLE


@dataclass(frozen=True)
class Columns:
    """What the row kernels read: the columns of every set, and how the window is read."""

    table: Tensor
    window: int
    near: int
    """Columns of the window."""
    rungs: Tensor | None = None
    """Where rungs are interpolated, they are not among the columns: their number, then their near offsets."""
    fractions: Tensor | None = None
    """How far beyond the near offset each of them is."""
    factors: Tensor | None = None
    """What each of them is times the learned scale."""

    @property
    def scaled(self) -> bool:
        """Whether rungs are interpolated."""
        return self.rungs is not None

    @property
    def dense(self) -> bool:
        """Whether the window goes through dense tiles instead of columns."""
        return self.near == 0

    @property
    def width(self) -> int:
        """Columns the table has room for."""
        return (self.table.shape[1] - 1) // 2

    @property
    def stride_set(self) -> int:
        """From one KV head's columns to the next one's; 0 where all share them."""
        return self.table.stride(0) if self.table.shape[0] > 1 else 0


def fixed_columns(q: Tensor, k: Tensor, window: int, sets: tuple[tuple[int, ...], ...]) -> Columns:
    """The columns of fixed offsets, one set or one for each KV head."""
    return _fixed_columns(sets, window, shape_of(q, k).batch_queries, q.device)


@cache
def _fixed_columns(sets: tuple[tuple[int, ...], ...], window: int, batch_queries: int, device: torch.device) -> Columns:
    near = near_columns(window, batch_queries, batch_queries)
    return Columns(column_table(sets, window, batch_queries, device), window, near)


def fitting_batches(wanted: int, shape: Shape, columns: int, limit: int) -> int:
    """Batches a program, halved until the rows or columns of all of them take at most `limit` bytes."""
    while wanted > 1 and wanted * max(shape.rows, columns) * shape.padded_size * shape.dtype.itemsize > limit:
        wanted //= 2
    return wanted


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`. Triton's own function for this takes 15 microseconds on the host."""
    return -(-count // size)


def wide(*tensors: Tensor) -> bool:
    """Whether a batch entry of (B, T, H, D) tensors has elements that 32-bit offsets do not reach."""
    for x in tensors:
        _, tokens, heads, size = x.shape
        _, stride_t, stride_h, _ = x.stride()
        if max(tokens * stride_t + heads * stride_h + size, tokens * heads * size) >= 2**31:
            return True
    return False


def positions_stride(positions: Tensor | None) -> int:
    """The batch stride of `positions`, 0 where all rows of the batch share them."""
    return 0 if positions is None or positions.shape[0] == 1 else positions.stride(0)


def strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head strides of (B, T, H, D) tensors."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def inner_contiguous(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous: autograd may hand over an expanded gradient."""
    return x if x.stride(-1) == 1 else x.contiguous()


def explain(error: Exception, shape: Shape) -> InputError:
    """What to say when the GPU has too little shared memory."""
    return InputError(
        f"this GPU has too little shared memory for head size {shape.size} and {shape.group} query heads a KV "
        f"head in {shape.dtype} ({error}); use 16-bit tensors, a smaller head or a newer GPU"
    )


@triton.jit
def place(kv_heads):
    """Which block, KV head and batch entry a program has: heads fastest, so that neighbours share lines."""
    i_program = tl.program_id(0)
    return i_program // kv_heads, (i_program % kv_heads).to(tl.int64), tl.program_id(1).to(tl.int64)


@triton.jit
def query_limit(p_positions, stride, i_batch, o_query, past, m_row, HAS_POSITIONS: tl.constexpr):
    """How far back each row may look. [BR]"""
    b_limit = o_query + past
    if HAS_POSITIONS:
        b_position = tl.load(p_positions + i_batch * stride + o_query, mask=m_row, other=0)
        b_limit = tl.minimum(b_limit, b_position)
    return b_limit


@triton.jit
def score_scale(scale, EXACT: tl.constexpr):
    """What scores are multiplied by: 16-bit inputs take their exponentials' base 2 in, float32 cannot afford to."""
    return scale if EXACT else scale * LOG2E


@triton.jit
def power(b_x, EXACT: tl.constexpr):
    """The exponential of a difference of scaled scores."""
    return tl.exp2(b_x * LOG2E) if EXACT else tl.exp2(b_x)


@triton.jit
def softmax_weights(b_s, b_lse, EXACT: tl.constexpr):
    """The exponential of scaled scores less the natural log-sum-exp, which is float64 where it must be exact."""
    if EXACT:
        b_high = b_lse.to(tl.float32)
        b_s = (b_s - b_high) - (b_lse - b_high).to(tl.float32)
    else:
        b_s -= b_lse * LOG2E
    return power(b_s, EXACT)


@triton.jit
def row_products(b_x, b_y, EXACT: tl.constexpr):
    """Products of all rows of [..., R, BD] and [..., C, BD]. [..., R, C]

    float32 is summed in parts of 16 and these in pairs: one long sum is rounded more often than PyTorch's. The pairs
    are added in float64, or the compiler would make one long sum of two products that are added.
    """
    if EXACT and b_x.shape[-1] > 16:
        b_x_even, b_x_odd = tl.split(in_pairs(b_x))
        b_y_even, b_y_odd = tl.split(in_pairs(b_y))
        b_even = row_products(b_x_even, b_y_even, EXACT).to(tl.float64)
        b_products = (b_even + row_products(b_x_odd, b_y_odd, EXACT).to(tl.float64)).to(tl.float32)
    elif len(b_x.shape) == 3:
        b_products = tl.dot(b_x, tl.permute(b_y, (0, 2, 1)), input_precision="ieee")
    else:
        b_products = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
    return b_products


@triton.jit
def in_pairs(b_x):
    """The rows' elements two by two. [..., BD] to [..., BD // 2, 2]"""
    if len(b_x.shape) == 3:
        b_pairs = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2])
    else:
        b_pairs = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2])
    return b_pairs


@triton.jit
def near_mask(o_own, b_limit, o_key, window):
    """Which keys of a dense tile are in each row's window. [BR, BN]"""
    b_distance = o_own[:, None] - o_key[None, :]
    return (b_distance >= 0) & (b_distance <= window) & (b_distance <= b_limit[:, None])


@triton.jit
def row_starts(o_row, stride, WIDE: tl.constexpr):
    """Where rows start, in elements; in 64 bits only where 32 do not suffice, for they cost three times as much."""
    return o_row.to(tl.int64 if WIDE else tl.int32) * stride


@triton.jit
def load_rows(p_x, o_row, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a (tokens, size) matrix, zeros where the mask is false. [BR, BD]"""
    o_size = tl.arange(0, BD)
    p_tile = p_x + (row_starts(o_row, stride, WIDE)[:, None] + o_size[None, :])
    if BD == SIZE:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    return tl.load(p_tile, mask=m_row[:, None] & (o_size < SIZE)[None, :], other=0.0)


@triton.jit
def batch_rows(
    i_block, tokens, NB: tl.constexpr, BQ: tl.constexpr, ROWS: tl.constexpr, GP: tl.constexpr, GROUP: tl.constexpr
):
    """Query and head of the group of each row of each batch, and whether it exists. [NB, ROWS] each"""
    o_row = tl.arange(0, ROWS)
    o_query = (i_block * NB + tl.arange(0, NB)[:, None]) * BQ + (o_row // GP)[None, :]
    o_group = (o_row % GP)[None, :] + tl.zeros([NB, ROWS], tl.int32)
    return o_query, o_group, (o_query < tokens) & (o_group < GROUP)


@triton.jit
def load_batches(p_x, o_row, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a (tokens, size) matrix for every batch of queries. [NB, C, BD]"""
    o_size = tl.arange(0, BD)
    p_tile = p_x + (row_starts(o_row, stride, WIDE)[:, :, None] + o_size[None, None, :])
    if BD == SIZE:
        return tl.load(p_tile, mask=m_row[:, :, None], other=0.0)
    return tl.load(p_tile, mask=m_row[:, :, None] & (o_size < SIZE)[None, None, :], other=0.0)


@triton.jit
def query_batches(
    p_x, o_query, o_group, stride_t, stride_h, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr
):
    """Rows (query, head of the group) of one KV head's queries. [NB, ROWS, BD]"""
    o_row = row_starts(o_query, stride_t, WIDE) + row_starts(o_group, stride_h, WIDE)
    return load_batches(p_x, o_row, 1, m_row, SIZE, BD, WIDE)


@triton.jit
def query_rows(
    p_x, o_query, o_group, stride_t, stride_h, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr
):
    """The same without batches. [BR, BD]"""
    o_row = row_starts(o_query, stride_t, WIDE) + row_starts(o_group, stride_h, WIDE)
    return load_rows(p_x, o_row, 1, m_row, SIZE, BD, WIDE)


@triton.jit
def store_batches(
    p_x, b_x, o_query, o_group, stride_t, stride_h, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr
):
    """Write rows (query, head of the group) [NB, ROWS, BD], cast to the tensor's dtype."""
    o_size = tl.arange(0, BD)
    o_row = row_starts(o_query, stride_t, WIDE) + row_starts(o_group, stride_h, WIDE)
    m_tile = m_row[:, :, None] & (o_size < SIZE)[None, None, :]
    tl.store(p_x + (o_row[:, :, None] + o_size[None, None, :]), b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def store_rows(p_x, b_x, o_row, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Write rows of a (tokens, size) matrix [BN, BD], cast to the tensor's dtype."""
    o_size = tl.arange(0, BD)
    m_tile = m_row[:, None] & (o_size < SIZE)[None, :]
    p_tile = p_x + (row_starts(o_row, stride, WIDE)[:, None] + o_size[None, :])
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def column_keys(p_set, width, first, first_own, keys, NB: tl.constexpr, BQ: tl.constexpr, C: tl.constexpr):
    """Shift and bits of a tile of columns [C], key index of each for each batch and whether there is one [NB, C]."""
    o_column = first + tl.arange(0, C)
    b_shift = tl.load(p_set + 1 + o_column)
    b_bits = tl.load(p_set + 1 + width + o_column)
    o_key = first_own + tl.arange(0, NB)[:, None] * BQ - b_shift[None, :]
    return b_shift, b_bits, o_key, o_key.to(tl.uint32) < tl.cast(keys, tl.uint32)


@triton.jit
def column_mask(b_shift, b_bits, b_limit, o_key, ROWS: tl.constexpr, GP: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Which entries of a tile count: the key is one of the row's query's, within its limit. [NB, ROWS, C]"""
    if HAS_POSITIONS:
        b_slot = tl.arange(0, ROWS) // GP
        m_within = b_shift[None, None, :] <= (b_limit - b_slot[None, :])[:, :, None]
        return m_within & rows_of(b_bits[None, :], ROWS, GP)
    # The limit is the first key, the same for all rows.
    return rows_of(tl.where(o_key >= 0, b_bits[None, :], 0), ROWS, GP)


@triton.jit
def rows_of(b_bits, ROWS: tl.constexpr, GP: tl.constexpr):
    """The entries of the queries that columns [NB, C] count for. [NB, ROWS, C]"""
    b_slot = tl.arange(0, ROWS) // GP
    return (b_bits[:, None, :] & (1 << b_slot)[None, :, None]) != 0


@triton.jit
def column_limit(
    p_positions,
    stride,
    i_batch,
    i_block,
    tokens,
    past,
    NB: tl.constexpr,
    BQ: tl.constexpr,
    C: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """Key index of the query of each column of a tile of rungs for each batch, and how far back it may look. [NB, C]"""
    o_query = (i_block * NB + tl.arange(0, NB)[:, None]) * BQ + (tl.arange(0, C) % BQ)[None, :]
    m_query = o_query < tokens
    b_limit = query_limit(p_positions, stride, i_batch, o_query, past, m_query, HAS_POSITIONS)
    return o_query + past, tl.where(m_query, b_limit, -1)


@triton.jit
def rung_keys(p_rungs, first, o_own, b_limit, BQ: tl.constexpr):
    """Near key and far key of each column of a tile of rungs, and whether there are any. [NB, C]"""
    b_distance = rung_values(p_rungs + 1, first, o_own.shape[1], BQ)[None, :]
    o_near = o_own - b_distance
    # The first key of a document has none before it: it is interpolated with itself.
    return o_near, tl.where(b_distance < b_limit, o_near - 1, o_near), b_distance <= b_limit


@triton.jit
def rung_mask(m_key, ROWS: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr):
    """Which entries of a tile of rungs count. [NB, ROWS, C]"""
    o_slot = tl.arange(0, m_key.shape[1]) % BQ
    return rows_of(tl.where(m_key, 1 << o_slot[None, :], 0), ROWS, GP)


@triton.jit
def rung_values(p_x, first, C: tl.constexpr, BQ: tl.constexpr):
    """What a table of rungs has for each column of a tile of them. [C]"""
    return tl.load(p_x + first + tl.arange(0, C) // BQ)


@triton.jit
def sum_rungs(b_x, BQ: tl.constexpr):
    """The sums over each rung's columns. [NB, ROWS, C] to [NB, ROWS, C // BQ]"""
    return tl.sum(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // BQ, BQ]), 3)
