"""The columns of a row kernel's tiles: tables that the host keeps on the device, and how kernels read them.

The keys of a batch of queries (`rows.py`) are listed in a table, the same for all batches: the key of column `c` is
`shift[c]` before the batch's first query, and `bits[c]` says for which of the batch's queries it counts.
A window of `W` takes `W + BQ` columns, nearly all of which count for all queries; a rung takes `BQ`, one for
each query. So a batch is a dense product of 16 rows with a few dozen gathered columns (56 for the paper's
window of 12, ten rungs and groups of 4) and each row of k and v is read once for the whole group. A window too
wide for that is left to `dense_window.py`, and only the rungs go through columns.

Rungs that a learned alpha puts between two keys are in no table of columns; see `learned.py`.
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

from fibattn.attention.triton.shape import UNREACHABLE, shape_of

WIDEST_NEAR = 64
"""A window that takes more columns than this goes through dense tiles."""

COLUMNS_MULTIPLE = 64
"""The table of columns is padded to a multiple of this, the most columns of a tile."""


@dataclass(frozen=True)
class Columns:
    """What the row kernels read: the columns of every set, how the window is read, and the rungs."""

    table: Tensor
    window: int
    near: int
    """Columns of the window."""
    rungs: Tensor
    """Offsets as `offset_table` has them. Where alpha is learned, they are not among the columns, but near offsets."""
    fractions: Tensor | None = None
    """Where alpha is learned: how far beyond the near offset each rung is."""
    factors: Tensor | None = None
    """Where alpha is learned: what each rung is times alpha."""

    @property
    def learned(self) -> bool:
        """Whether rungs lie between two keys."""
        return self.fractions is not None

    @property
    def dense(self) -> bool:
        """Whether the window goes through dense tiles instead of columns."""
        return self.near == 0

    @property
    def width(self) -> int:
        """Columns the table has room for."""
        return (self.table.shape[1] - 1) // 2


def row_stride(table: Tensor | None) -> int:
    """From the row of one KV head or batch entry to the next one's; 0 where all share it."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def fixed_columns(q: Tensor, k: Tensor, window: int, sets: tuple[tuple[int, ...], ...]) -> Columns:
    """The columns of fixed offsets, one set or one for each KV head."""
    return _fixed_columns(sets, window, shape_of(q, k).batch_queries, q.device)


@cache
def _fixed_columns(sets: tuple[tuple[int, ...], ...], window: int, batch_queries: int, device: torch.device) -> Columns:
    table = column_table(sets, window, batch_queries, device)
    return Columns(table, window, near_columns(window, batch_queries), offset_table(sets, device))


def column_table(sets: tuple[tuple[int, ...], ...], window: int, batch_queries: int, device: torch.device) -> Tensor:
    """Columns on the device, int32 (sets, 1 + 2 * width): their number, then shifts, then bits."""
    # A near key's distance from query `t` of a batch is `t + shift`.
    shifts = range(1 - batch_queries, near_columns(window, batch_queries) + 1 - batch_queries)
    near = [(shift, sum(1 << t for t in range(batch_queries) if 0 <= t + shift <= window)) for shift in shifts]
    rows = [
        near + [(min(d, UNREACHABLE) - t, 1 << t) for d in offsets for t in range(batch_queries)] for offsets in sets
    ]
    width = max(1, -(-max(map(len, rows)) // COLUMNS_MULTIPLE)) * COLUMNS_MULTIPLE
    padded = [row + [(UNREACHABLE, 0)] * (width - len(row)) for row in rows]
    table = [[len(row), *(c[0] for c in full), *(c[1] for c in full)] for row, full in zip(rows, padded, strict=True)]
    return kept_on_device(table, torch.int32, device)


def near_columns(window: int, batch_queries: int) -> int:
    """How many columns the window takes, a multiple of `batch_queries`; 0 where it goes through dense tiles."""
    columns = -(-(window + batch_queries) // batch_queries) * batch_queries
    return columns if columns <= WIDEST_NEAR else 0


@cache
def offset_table(sets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Offsets on the device, int32 (sets, 1 + most rungs): their number, then the offsets.

    Kept for good: a model has a handful of patterns. The first call copies, which stalls once.
    """
    width = max(map(len, sets))
    rows = [[len(one), *(min(d, UNREACHABLE) for d in one), *[UNREACHABLE] * (width - len(one))] for one in sets]
    return kept_on_device(rows, torch.int32, device)


def kept_on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor for good, for a cache.

    It is made in a thread of its own: when `torch.compile` prepares a CUDA graph, what this thread allocates lies in
    the graph's memory and is written over with every replay.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: torch.tensor(values, dtype=dtype).to(device)).result()


@triton.jit
def column_keys(p_set, width, first, first_own, keys, NB: tl.constexpr, BQ: tl.constexpr, C: tl.constexpr):
    """Shift and bits of a tile of columns [C], key index of each for each batch and whether there is one [NB, C]."""
    o_column = first + tl.arange(0, C)
    b_shift = tl.load(p_set + 1 + o_column)
    b_bits = tl.load(p_set + 1 + width + o_column)
    o_key = first_own + tl.arange(0, NB)[:, None] * BQ - b_shift[None, :]
    return b_shift, b_bits, o_key, o_key.to(tl.uint32) < tl.cast(keys, tl.uint32)


@triton.jit
def column_mask(p_positions, b_shift, b_bits, b_limit, o_key, ROWS: tl.constexpr, GP: tl.constexpr):
    """Which entries of a tile count: the key is one of the row's query's, within its limit. [NB, ROWS, C]"""
    if p_positions is not None:
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
