"""The forward kernel: output and log-sum-exp of batches of queries, for all query heads of a KV head.

A program takes batches of rows (`rows.py`). A wide window's dense tiles come first (`dense_window.py`), then the
columns (`columns.py`), the window's before the rungs': so every row has seen a key, its own, before anything is
rescaled. What moves: q and the output once, and every column of k and v once (both keys of a rung between two) for a
batch of queries and KV head.
"""

import torch
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.columns import Columns, column_keys, column_mask, row_stride
from fibattn.attention.triton.dense_window import dense_window
from fibattn.attention.triton.launch import Tiles
from fibattn.attention.triton.learned import add_rungs, column_limit, rung_mask, rung_products, rung_tile
from fibattn.attention.triton.rows import (
    batch_rows,
    load_rows,
    place,
    query_limit,
    query_rows,
    row_starts,
    store_query_rows,
)
from fibattn.attention.triton.scores import LN2, row_products, scaled_scores, softmax_step
from fibattn.attention.triton.shape import Shape, shape_of


def tiles_for(shape: Shape, columns: Columns) -> Tiles:
    """Tile sizes, from a fixed table: nothing is tuned at run time. They take at most 99 KB of shared memory."""
    if shape.exact:
        return Tiles(launch.fitting_batches(4, shape, columns, 2**14), 16, near=16, warps=4, stages=1)
    if columns.dense:
        batches = launch.fitting_batches(4 if shape.padded_size <= 64 else 8, shape, columns, 2**15)
        return Tiles(batches, 16, near=32, warps=4, stages=2, registers=launch.registers(shape, 96))
    return launch.column_tiles(shape, columns, learned_registers=96)


def forward(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, scale: float, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Output like q, and the natural log-sum-exp (B, Hq, Tq)."""
    shape = shape_of(q, k)
    tiles = tiles_for(shape, columns)
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float64 if shape.exact else torch.float32)
    grid = (launch.blocks(tokens, tiles.batches * shape.batch_queries) * kv_heads, batch)
    with launch.Explained(shape):
        forward_kernel[grid](
            *(q, k, v, out, lse, positions, columns.table, columns.rungs, columns.fractions),
            *(scale, tokens, keys, columns.window, kv_heads, columns.width, row_stride(columns.table)),
            *launch.strides(q, k, v, out),
            row_stride(positions),
            **launch.row_options(shape, tiles, columns, launch.wide(q, k, v)),
        )
    return out, lse


@launch.kernel
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_positions,
    p_table,
    p_rungs,
    p_fractions,
    scale,
    tokens,
    keys,
    window,
    kv_heads,
    width,
    stride_set,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_positions,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    ROWS: tl.constexpr,
    NB: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: `NB` batches of `BQ` queries, one KV head."""
    BM: tl.constexpr = NB * BQ
    LEARNED: tl.constexpr = p_fractions is not None
    i_block, i_head, i_batch = place(kv_heads)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_k += i_batch * stride_k[0] + i_head * stride_k[2]
    p_v += i_batch * stride_v[0] + i_head * stride_v[2]
    p_set = p_table + i_head * stride_set
    past = keys - tokens
    first_own = i_block * BM + past
    columns = tl.load(p_set)

    o_query, o_group, m_row = batch_rows(i_block, tokens, NB, BQ, ROWS, GP, GROUP)
    b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
    if DENSE:
        b_max, b_sum, b_acc = dense_window(
            *(p_q, p_k, p_v, p_positions, scale, tokens, keys, window, i_block, i_batch),
            *(stride_q, stride_k, stride_v, stride_positions),
            *(GROUP, GP, SIZE, BD, NB * ROWS, BM, BN, EXACT, WIDE),
        )
        b_max = tl.reshape(b_max, [NB, ROWS])
        b_sum = tl.reshape(b_sum, [NB, ROWS])
        b_acc = tl.reshape(b_acc, [NB, ROWS, BD])
    else:
        b_max = tl.full([NB, ROWS], -float("inf"), tl.float64 if EXACT else tl.float32)
        b_sum = tl.zeros([NB, ROWS], tl.float32)
        b_acc = tl.zeros([NB, ROWS, BD], tl.float32)

    b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)
    # Columns of a window alone are a tile or two, of which nothing is worth copying ahead.
    for first in tl.range(0, columns, C, num_stages=1 if LEARNED else None):
        b_shift, b_bits, o_key, m_key = column_keys(p_set, width, first, first_own, keys, NB, BQ, C)
        b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = row_products(b_q, b_k, EXACT)
        m_entry = column_mask(p_positions, b_shift, b_bits, b_limit, o_key, ROWS, GP)
        b_s = tl.where(m_entry, scaled_scores(b_s, scale, EXACT), -float("inf"))
        b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, EXACT)
        b_acc = b_acc * b_shrink[:, :, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    if LEARNED:
        o_own, b_reach = column_limit(p_positions, stride_positions, i_batch, i_block, tokens, past, NB, BQ, C)
        for first in range(0, tl.load(p_rungs), C // BQ):
            m_key, b_fraction, b_k, b_v, b_k_far, b_v_far = rung_tile(
                *(p_k, p_v, stride_k[1], stride_v[1], p_rungs, p_fractions, first, o_own, b_reach),
                *(BQ, SIZE, BD, WIDE),
            )
            b_s, _ = rung_products(b_q, b_k, b_k_far, b_fraction, EXACT)
            b_s = scaled_scores(b_s, scale, EXACT)
            b_s = tl.where(rung_mask(m_key, ROWS, GP, BQ), b_s, -float("inf"))
            b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, EXACT)
            b_acc = add_rungs(b_acc * b_shrink[:, :, None], b_p, b_v, b_v_far, b_fraction)

    p_out += i_batch * stride_o[0] + i_head * GROUP * stride_o[2]
    b_acc *= (1.0 / b_sum)[:, :, None]
    store_query_rows(p_out, b_acc, o_query, o_group, stride_o, m_row, SIZE, BD, WIDE)
    p_lse += (i_batch * kv_heads + i_head) * GROUP * tokens
    kept: tl.constexpr = p_lse.dtype.element_ty
    b_lse = tl.log2(b_sum.to(kept)) * LN2 + b_max.to(kept) * (1.0 if EXACT else LN2)
    tl.store(p_lse + row_starts(o_group, tokens, WIDE) + o_query, b_lse, mask=m_row)
