"""The rows of a tile: which queries and heads they are, how far back each may look, how they are read and written.

The query heads of a KV head read the same keys, so one program serves all of them: its rows are
(query, head of the group) pairs, query-major, the group padded to a power of two (`GP`). Row kernels take them in
batches of `ROWS` (16, the least a matrix instruction takes): `BQ` queries times the padded group.

Positions. `limit` is how far back a query may look: its own key index, or less inside a packed document.
A distance exists for it when it is at most the limit; distance 0 always does, so no row is ever empty.
"""

import triton
import triton.language as tl


@triton.jit
def place(kv_heads):
    """Which block, KV head and batch entry a program has: heads fastest, so that neighbours share lines."""
    i_program = tl.program_id(0)
    return i_program // kv_heads, (i_program % kv_heads).to(tl.int64), tl.program_id(1).to(tl.int64)


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
def block_rows(first_query, tokens, BR: tl.constexpr, GP: tl.constexpr, GROUP: tl.constexpr):
    """The same for a block of rows that is not cut into batches. [BR] each"""
    o_row = tl.arange(0, BR)
    o_query, o_group = first_query + o_row // GP, o_row % GP
    return o_query, o_group, (o_query < tokens) & (o_group < GROUP)


@triton.jit
def query_limit(p_positions, stride, i_batch, o_query, past, m_row):
    """How far back each row may look. [BR]"""
    b_limit = o_query + past
    if p_positions is not None:
        b_position = tl.load(p_positions + i_batch * stride + o_query, mask=m_row, other=0)
        b_limit = tl.minimum(b_limit, b_position)
    return b_limit


@triton.jit
def row_starts(o_row, stride, WIDE: tl.constexpr):
    """Where rows start, in elements; in 64 bits only where 32 do not suffice, for they cost three times as much."""
    return o_row.to(tl.int64 if WIDE else tl.int32) * stride


@triton.jit
def load_rows(p_x, o_row, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows [...] of a (tokens, size) matrix, zeros where the mask is false. [..., BD]"""
    o_size = tl.arange(0, BD)
    p_tile = p_x + (tl.expand_dims(row_starts(o_row, stride, WIDE), -1) + o_size[None, :])
    if BD == SIZE:
        return tl.load(p_tile, mask=tl.expand_dims(m_row, -1), other=0.0)
    return tl.load(p_tile, mask=tl.expand_dims(m_row, -1) & (o_size < SIZE)[None, :], other=0.0)


@triton.jit
def query_rows(p_x, o_query, o_group, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Rows (query, head of the group) [...] of one KV head's queries. [..., BD]"""
    o_row = row_starts(o_query, stride[1], WIDE) + row_starts(o_group, stride[2], WIDE)
    return load_rows(p_x, o_row, 1, m_row, SIZE, BD, WIDE)


@triton.jit
def store_rows(p_x, b_x, o_row, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr):
    """Write rows [..., BD] of a (tokens, size) matrix, cast to the tensor's dtype."""
    o_size = tl.arange(0, BD)
    m_tile = tl.expand_dims(m_row, -1) & (o_size < SIZE)[None, :]
    p_tile = p_x + (tl.expand_dims(row_starts(o_row, stride, WIDE), -1) + o_size[None, :])
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def store_query_rows(
    p_x, b_x, o_query, o_group, stride, m_row, SIZE: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr
):
    """Write rows (query, head of the group) [..., BD], cast to the tensor's dtype."""
    o_row = row_starts(o_query, stride[1], WIDE) + row_starts(o_group, stride[2], WIDE)
    store_rows(p_x, b_x, o_row, 1, m_row, SIZE, BD, WIDE)
