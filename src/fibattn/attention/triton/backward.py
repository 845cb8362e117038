"""The backward kernels: gradients of q by query blocks, then those of k and v by key blocks. No atomics.

This kernel mirrors the forward. Beside the gradient of q it leaves, for those of `key_gradients.py`, the row
sums `delta` and the weights and score gradients of the rungs: compact, (B, KV heads, rungs, Tq, group), a few
values a query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.columns import Columns, column_keys, column_mask, row_stride
from fibattn.attention.triton.dense_window import dense_window_grad
from fibattn.attention.triton.key_gradients import key_gradients
from fibattn.attention.triton.launch import Tiles
from fibattn.attention.triton.learned import add_rungs, column_limit, rung_mask, rung_products, rung_tile, rung_values
from fibattn.attention.triton.rows import (
    batch_rows,
    load_rows,
    place,
    query_limit,
    query_rows,
    row_starts,
    store_query_rows,
)
from fibattn.attention.triton.scores import NO_ROW, row_products, scaled_scores, softmax_weights
from fibattn.attention.triton.shape import Shape, shape_of

FROM_OUTPUT, SUMMED, GIVEN = (tl.constexpr(way) for way in range(3))
"""Where the row sums `delta` come from: `do . out`, or a launch before that sums weight times gradient. Where
scores' gradients nearly cancel, the rounding of `out` is more than float32 and float16 promise; bfloat16's own is
coarser."""


def query_tiles_for(shape: Shape, columns: Columns) -> Tiles:
    """Tile sizes of the kernel for the gradient of q, at most 99 KB of shared memory."""
    if shape.exact:
        return Tiles(launch.fitting_batches(2, shape, columns, 2**14), 16, near=16, warps=4, stages=1)
    if columns.dense:
        batches = launch.fitting_batches(4, shape, columns, 2**14)
        registers = launch.registers(shape, 128 if columns.learned else 96)
        return Tiles(batches, 16, near=32, warps=4, stages=2, registers=registers)
    return launch.column_tiles(shape, columns, learned_registers=128)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    scale: float,
    columns: Columns,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, and of the learned alpha, if any, in parts to be added up: (programs,)."""
    shape = shape_of(q, k)
    grad_out, lse = launch.inner_contiguous(grad_out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    batch, tokens = q.shape[:2]
    kv_heads, rungs = k.shape[2], columns.rungs.shape[1] - 1
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    # Two tensors, not halves of one: a pointer's alignment must not follow the length, or binaries would.
    weights, grads = (q.new_empty(batch, kv_heads, rungs, tokens, shape.group) for _ in range(2))
    wide = launch.wide(q, k, v, out, grad_out)
    tiles = query_tiles_for(shape, columns)
    blocks = launch.blocks(tokens, tiles.batches * shape.batch_queries)
    sums = torch.float64 if shape.exact else torch.float32
    partial = q.new_empty(batch * blocks * kv_heads, dtype=sums) if columns.learned else None
    with launch.Explained(shape):
        for delta_from in (FROM_OUTPUT,) if shape.dtype == torch.bfloat16 else (SUMMED, GIVEN):
            query_grad_kernel[(blocks * kv_heads, batch)](
                *(q, k, v, out, grad_out, lse, grad_lse, positions, columns.table),
                *(columns.rungs, columns.fractions, columns.factors),
                *(dq, delta, weights, grads, partial),
                *(scale, tokens, k.shape[1], columns.window, kv_heads, rungs),
                *(columns.near, columns.width, row_stride(columns.table)),
                *launch.strides(q, k, v, grad_out, out, dq),
                row_stride(positions),
                DELTA=delta_from,
                **launch.row_options(shape, tiles, columns, wide),
            )
        key_gradients(
            *(grad_out, grad_lse, lse, delta, q, k, v, positions, scale, columns),
            *(weights, grads, dk, dv, shape, wide),
        )
    return dq, dk, dv, partial


@launch.kernel
def query_grad_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_do,
    p_lse,
    p_grad_lse,
    p_positions,
    p_table,
    p_rungs,
    p_fractions,
    p_factors,
    p_dq,
    p_delta,
    p_weights,
    p_grads,
    p_partial,
    scale,
    tokens,
    keys,
    window,
    kv_heads,
    rungs_stored,
    near,
    width,
    stride_set,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_o,
    stride_dq,
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
    DELTA: tl.constexpr,
):
    """One program: the gradient of `NB` batches of `BQ` queries, one KV head."""
    BM: tl.constexpr = NB * BQ
    BR: tl.constexpr = NB * ROWS
    LEARNED: tl.constexpr = p_fractions is not None
    i_block, i_head, i_batch = place(kv_heads)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_do += i_batch * stride_do[0] + i_head * GROUP * stride_do[2]
    p_out += i_batch * stride_o[0] + i_head * GROUP * stride_o[2]
    p_k += i_batch * stride_k[0] + i_head * stride_k[2]
    p_v += i_batch * stride_v[0] + i_head * stride_v[2]
    p_set = p_table + i_head * stride_set
    past = keys - tokens
    first_own = i_block * BM + past
    columns = tl.load(p_set)

    o_query, o_group, m_row = batch_rows(i_block, tokens, NB, BQ, ROWS, GP, GROUP)
    b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
    b_do = query_rows(p_do, o_query, o_group, stride_do, m_row, SIZE, BD, WIDE)
    first_lse = (i_batch * kv_heads + i_head) * GROUP * tokens
    o_lse = row_starts(o_group, tokens, WIDE) + o_query
    p_lse += first_lse
    p_delta += first_lse
    b_lse = tl.load(p_lse + o_lse, mask=m_row, other=NO_ROW)
    b_lse_grad = tl.zeros([NB, ROWS], tl.float32)
    if p_grad_lse is not None:
        b_lse_grad = tl.load(p_grad_lse + first_lse + o_lse, mask=m_row, other=0.0).to(tl.float32)
    if DELTA == FROM_OUTPUT:
        b_out = query_rows(p_out, o_query, o_group, stride_o, m_row, SIZE, BD, WIDE)
        b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 2)
        tl.store(p_delta + o_lse, b_delta, mask=m_row)
    elif DELTA == GIVEN:
        b_delta = tl.load(p_delta + o_lse, mask=m_row, other=0.0)
    else:
        b_delta = tl.zeros([NB, ROWS], tl.float32)
    b_total = tl.zeros([NB, ROWS], tl.float32)
    b_weight = tl.zeros([NB, ROWS], tl.float32)
    b_dq = tl.zeros([NB, ROWS, BD], tl.float32)
    if DENSE:
        b_near, b_near_total, b_near_weight = dense_window_grad(
            *(p_q, p_k, p_v, p_do, p_positions),
            *(tl.reshape(b_lse, [BR]), tl.reshape(b_delta, [BR]), tl.reshape(b_lse_grad, [BR])),
            *(scale, tokens, keys, window, i_block, i_batch),
            *(stride_q, stride_k, stride_v, stride_do, stride_positions),
            *(GROUP, GP, SIZE, BD, BR, BM, BN, EXACT, WIDE),
        )
        b_dq = tl.reshape(b_near, [NB, ROWS, BD])
        b_total = tl.reshape(b_near_total, [NB, ROWS])
        b_weight = tl.reshape(b_near_weight, [NB, ROWS])

    b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)
    o_compact = (i_batch * kv_heads + i_head) * rungs_stored * tokens
    p_weights += o_compact * GROUP
    p_grads += o_compact * GROUP
    # Columns of a window alone are a tile or two, of which nothing is worth copying ahead.
    for first in tl.range(0, columns, C, num_stages=1 if LEARNED else None):
        b_shift, b_bits, o_key, m_key = column_keys(p_set, width, first, first_own, keys, NB, BQ, C)
        b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = row_products(b_q, b_k, EXACT)
        b_dp = row_products(b_do, b_v, EXACT)
        m_entry = column_mask(p_positions, b_shift, b_bits, b_limit, o_key, ROWS, GP)
        b_p = softmax_weights(scaled_scores(b_s, scale, EXACT), b_lse[:, :, None], EXACT)
        b_p = tl.where(m_entry, b_p, 0.0)
        if DELTA == SUMMED:
            b_total += tl.sum(b_p * b_dp, 2)
            b_weight += tl.sum(b_p, 2)
        b_ds = b_p * ((b_dp - b_delta[:, :, None]) + b_lse_grad[:, :, None])
        if not LEARNED and DELTA != SUMMED and first + C > near:
            # The other entries of a rung's columns are 0.
            rungs = (columns - near) // BQ
            o_rung = (first - near) // BQ + tl.arange(0, C // BQ)
            store_compact(p_weights, sum_rungs(b_p, BQ), o_rung, rungs, o_query, o_group, tokens, m_row, GROUP)
            store_compact(p_grads, sum_rungs(b_ds, BQ), o_rung, rungs, o_query, o_group, tokens, m_row, GROUP)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    if LEARNED:
        rungs = tl.load(p_rungs)
        o_own, b_reach = column_limit(p_positions, stride_positions, i_batch, i_block, tokens, past, NB, BQ, C)
        b_alpha = tl.zeros([NB, ROWS], tl.float64 if EXACT else tl.float32)
        for first in range(0, rungs, C // BQ):
            m_key, b_fraction, b_k, b_v, b_k_far, b_v_far = rung_tile(
                *(p_k, p_v, stride_k[1], stride_v[1], p_rungs, p_fractions, first, o_own, b_reach),
                *(BQ, SIZE, BD, WIDE),
            )
            b_s, b_s_slope = rung_products(b_q, b_k, b_k_far, b_fraction, EXACT)
            b_dp, b_dp_slope = rung_products(b_do, b_v, b_v_far, b_fraction, EXACT)
            b_p = softmax_weights(scaled_scores(b_s, scale, EXACT), b_lse[:, :, None], EXACT)
            b_p = tl.where(rung_mask(m_key, ROWS, GP, BQ), b_p, 0.0)
            if DELTA == SUMMED:
                b_total += tl.sum(b_p * b_dp, 2)
                b_weight += tl.sum(b_p, 2)
            b_ds = b_p * ((b_dp - b_delta[:, :, None]) + b_lse_grad[:, :, None])
            if DELTA != SUMMED:
                o_rung = first + tl.arange(0, C // BQ)
                store_compact(p_weights, sum_rungs(b_p, BQ), o_rung, rungs, o_query, o_group, tokens, m_row, GROUP)
                store_compact(p_grads, sum_rungs(b_ds, BQ), o_rung, rungs, o_query, o_group, tokens, m_row, GROUP)
                b_factor = rung_values(p_factors, first, C, BQ)[None, None, :]
                b_alpha += tl.sum((b_factor * (b_ds * scale * b_s_slope + b_p * b_dp_slope)).to(b_alpha.dtype), 2)
            b_dq = add_rungs(b_dq, b_ds, b_k, b_k_far, b_fraction)
        if DELTA != SUMMED:
            o_program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            tl.store(p_partial + o_program, tl.sum(tl.sum(b_alpha, 1), 0))

    if DELTA == SUMMED:
        # Weights add up to 1 but for their rounding, which must not reach the difference.
        tl.store(p_delta + o_lse, b_total / tl.where(m_row, b_weight, 1.0), mask=m_row)
    else:
        p_dq += i_batch * stride_dq[0] + i_head * GROUP * stride_dq[2]
        store_query_rows(p_dq, b_dq * scale, o_query, o_group, stride_dq, m_row, SIZE, BD, WIDE)


@triton.jit
def store_compact(p_x, b_x, o_rung, rungs, o_query, o_group, tokens, m_row, GROUP: tl.constexpr):
    """Write the value of each row and rung [NB, ROWS, R] to (rungs, Tq, group)."""
    o_row = o_query.to(tl.int64) * GROUP + o_group
    p_tile = p_x + o_rung.to(tl.int64)[None, None, :] * tokens * GROUP + o_row[:, :, None]
    m_tile = m_row[:, :, None] & ((o_rung >= 0) & (o_rung < rungs))[None, None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def sum_rungs(b_x, BQ: tl.constexpr):
    """The sums over each rung's columns. [NB, ROWS, C] to [NB, ROWS, C // BQ]"""
    return tl.sum(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // BQ, BQ]), 3)
