"""The backward kernels: gradients of q by query blocks, then those of k and v by key blocks. No atomics.

The first kernel mirrors the forward. Beside the gradient of q it leaves, for the second one, the row sums
`delta` and the weights and score gradients of the rungs: compact, (B, KV heads, rungs, Tq, group), a few
values a query. The transpose of a fixed offset is a fixed offset, so the second kernel walks the queries at
`key + offset` in a fixed order and needs, for a rung, neither keys, values, exponentials nor reductions:
`dk[j] += grad[j + d] * q[j + d]` and `dv[j] += weight[j + d] * do[j + d]`, element by element in float32.
The window it recomputes as dense tiles, which costs no memory in the window's width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fibattn.attention.triton import common
from fibattn.attention.triton.common import (
    LOG2E,
    Shape,
    Tiles,
    chunk_columns,
    chunk_keys,
    chunk_mask,
    load_batches,
    load_rows,
    near_mask,
    place,
    query_limit,
    query_rows,
    store_query_rows,
)


def query_tiles_for(shape: Shape) -> Tiles:
    """Tile sizes of the kernel for the gradient of q."""
    wide = shape.padded_size > 128
    if shape.dtype == torch.float32:
        return Tiles(block=16 if not wide else 8, near=32 if not wide else 16, rungs=4, warps=4, stages=1)
    if wide:
        return Tiles(block=16, near=32, rungs=4, warps=4, stages=1)
    return Tiles(block=16, near=32, rungs=16 if shape.padded_size <= 64 else 8, warps=4, stages=1)


def key_tiles_for(shape: Shape) -> Tiles:
    """Tile sizes of the kernel for the gradients of k and v: keys a program, rows (query, head) a window tile."""
    if shape.dtype == torch.float32:
        return Tiles(block=32 if shape.padded_size <= 64 else 16, near=32, rungs=1, warps=4, stages=1)
    block = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16}[shape.padded_size]
    return Tiles(block=block, near=64 if shape.padded_size <= 64 else 32, rungs=1, warps=4, stages=1)


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
    window: int,
    table: Tensor,
    fractions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, and of the fractions, if any, in parts to be added up: (rungs, programs)."""
    shape = common.shape_of(q, k)
    grad_out, lse = common.inner_contiguous(grad_out), lse.contiguous()
    batch, tokens = q.shape[:2]
    kv_heads, rungs = k.shape[2], table.shape[1] - 1
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    compact = q.new_empty(2, batch, kv_heads, rungs, tokens, shape.group)
    sizes = {
        "GROUP": shape.group,
        "GP": shape.padded_group,
        "SIZE": shape.size,
        "BD": shape.padded_size,
        "HAS_POSITIONS": positions is not None,
        "SCALED": fractions is not None,
    }
    common_scalars = (
        *(scale, tokens, k.shape[1], window, kv_heads, rungs, table.stride(0) if table.shape[0] > 1 else 0),
        *common.strides(q, k, v, grad_out),
        common.positions_stride(positions),
    )
    tiles = query_tiles_for(shape)
    block = common.block_of(shape, tiles)
    programs = triton.cdiv(tokens, block) * kv_heads * batch
    partial = None if fractions is None else q.new_empty(rungs, programs, dtype=torch.float32)
    try:
        query_grad_kernel[(programs,)](
            *(q, k, v, out, grad_out, lse, grad_lse, positions, table, fractions),
            *(dq, delta, compact[0], compact[1], partial),
            *common_scalars,
            *common.strides(out, dq),
            *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
            HAS_GRAD_LSE=grad_lse is not None,
            BQ=shape.batch_queries,
            ROWS=shape.rows,
            NB=block // shape.batch_queries,
            BN=max(tiles.near, block),
            RC=max(tiles.rungs, 16 // shape.batch_queries),
            **sizes,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = key_tiles_for(shape)
        key_grad_kernel[(triton.cdiv(k.shape[1], tiles.block) * kv_heads * batch,)](
            *(q, k, v, grad_out, lse, delta, positions, table, fractions, compact[0], compact[1], dk, dv),
            *common_scalars,
            *common.strides(dk, dv),
            BN=tiles.block,
            BR=max(tiles.near, shape.padded_group),
            **sizes,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    except OutOfResources as error:
        raise common.explain(error, shape) from error
    return dq, dk, dv, partial


# As in the forward. The strides of the log-sum-exp's gradient follow the length.
_UNSPECIALIZED = [
    *("tokens", "keys", "window", "kv_heads", "rungs_stored", "stride_set", "stride_positions"),
    *("stride_lb", "stride_lh", "stride_lt"),
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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
    p_fractions,
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
    stride_set,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_positions,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_lb,
    stride_lh,
    stride_lt,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    ROWS: tl.constexpr,
    NB: tl.constexpr,
    BN: tl.constexpr,
    RC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One program: the gradient of `NB` batches of `BQ` queries, one KV head."""
    BM: tl.constexpr = NB * BQ
    BR: tl.constexpr = NB * ROWS
    i_block, i_head, i_batch = place(tokens, BM, kv_heads)
    p_q += i_batch * stride_qb + i_head * GROUP * stride_qh
    p_do += i_batch * stride_gb + i_head * GROUP * stride_gh
    p_out += i_batch * stride_ob + i_head * GROUP * stride_oh
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    p_set = p_table + i_head * stride_set
    past = keys - tokens
    first_own = i_block * BM + past

    o_row = tl.arange(0, BR)
    o_query, o_group = i_block * BM + o_row // GP, o_row % GP
    m_row = (o_query < tokens) & (o_group < GROUP)
    b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row, HAS_POSITIONS)
    b_q = query_rows(p_q, o_query, o_group, stride_qt, stride_qh, m_row, SIZE, BD)
    b_do = query_rows(p_do, o_query, o_group, stride_gt, stride_gh, m_row, SIZE, BD)
    b_out = query_rows(p_out, o_query, o_group, stride_ot, stride_oh, m_row, SIZE, BD)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    o_head = i_head * GROUP + o_group
    o_lse = (i_batch * kv_heads * GROUP + o_head) * tokens + o_query
    if HAS_GRAD_LSE:
        p_row = p_grad_lse + i_batch * stride_lb + o_head * stride_lh + o_query.to(tl.int64) * stride_lt
        b_delta -= tl.load(p_row, mask=m_row, other=0.0)
    tl.store(p_delta + o_lse, b_delta, mask=m_row)
    # Rows that do not exist: a log-sum-exp of infinity makes their weights 0.
    b_lse = tl.load(p_lse + o_lse, mask=m_row, other=float("inf")) * LOG2E
    b_dq = tl.zeros([BR, BD], tl.float32)
    scale_log2 = scale * LOG2E

    tiles = tl.cdiv(BM + tl.minimum(window, first_own), BN)
    for i in range(tiles):
        o_key = first_own + BM - (i + 1) * BN + tl.arange(0, BN)
        m_key = (o_key >= 0) & (o_key < keys)
        b_k = load_rows(p_k, o_key, stride_kt, m_key, SIZE, BD)
        b_v = load_rows(p_v, o_key, stride_vt, m_key, SIZE, BD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_p = tl.where(near_mask(o_query + past, b_limit, o_key, window), b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    b_q3 = tl.reshape(b_q, [NB, ROWS, BD])
    b_do3 = tl.reshape(b_do, [NB, ROWS, BD])
    b_dq3 = tl.reshape(b_dq, [NB, ROWS, BD])
    b_lse3 = tl.reshape(b_lse, [NB, ROWS])[:, :, None]
    b_delta3 = tl.reshape(b_delta, [NB, ROWS])[:, :, None]
    rungs = tl.load(p_set)
    o_compact = (i_batch * kv_heads + i_head) * rungs_stored * tokens
    p_weights += o_compact * GROUP
    p_grads += o_compact * GROUP
    for first in range(0, rungs, RC):
        b_offset, o_slot, o_rung = chunk_columns(p_set, first, rungs, BQ, RC)
        o_key, m_key = chunk_keys(first_own, b_offset, o_slot, keys, NB, BQ)
        b_k = load_batches(p_k, o_key, stride_kt, m_key, SIZE, BD)
        b_v = load_batches(p_v, o_key, stride_vt, m_key, SIZE, BD)
        b_s = tl.dot(b_q3, tl.permute(b_k, (0, 2, 1)), input_precision="ieee")
        b_dp = tl.dot(b_do3, tl.permute(b_v, (0, 2, 1)), input_precision="ieee")
        if SCALED:
            m_far = m_key & (o_key > 0)
            b_k_far = load_batches(p_k, o_key - 1, stride_kt, m_far, SIZE, BD)
            b_v_far = load_batches(p_v, o_key - 1, stride_vt, m_far, SIZE, BD)
            b_s_step = tl.dot(b_q3, tl.permute(b_k_far, (0, 2, 1)), input_precision="ieee") - b_s
            b_dp_step = tl.dot(b_do3, tl.permute(b_v_far, (0, 2, 1)), input_precision="ieee") - b_dp
            b_f = tl.load(p_fractions + o_rung, mask=o_rung < rungs, other=0.0)
            # The first key of a document has none before it to interpolate with.
            m_first = tl.reshape(b_limit, [NB, ROWS])[:, :, None] == b_offset[None, None, :]
            b_f = tl.where(m_first, 0.0, b_f[None, None, :])
            b_s += b_f * b_s_step
            b_dp += b_f * b_dp_step
        m_entry = chunk_mask(b_limit, b_offset, o_slot, NB, ROWS, GP)
        b_p = tl.where(m_entry, tl.exp2(b_s * scale_log2 - b_lse3), 0.0)
        b_ds = b_p * (b_dp - b_delta3)
        store_compact(p_weights, b_p, first, rungs, o_query, o_group, tokens, m_row, GROUP, NB, ROWS, BQ, RC)
        store_compact(p_grads, b_ds, first, rungs, o_query, o_group, tokens, m_row, GROUP, NB, ROWS, BQ, RC)
        if SCALED:
            b_df = tl.where(m_first, 0.0, b_ds * scale * b_s_step + b_p * b_dp_step)
            b_df = tl.sum(tl.reshape(tl.sum(tl.sum(b_df, 0), 0), [RC, BQ]), 1)
            o_df = first + tl.arange(0, RC)
            p_df = p_partial + o_df.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            tl.store(p_df, b_df, mask=o_df < rungs)
            b_ds_far = b_ds * b_f
            b_dq3 = tl.dot(b_ds_far.to(b_k.dtype), b_k_far, b_dq3, input_precision="ieee")
            b_ds = b_ds - b_ds_far
        b_dq3 = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq3, input_precision="ieee")

    b_dq = tl.reshape(b_dq3, [BR, BD]) * scale
    p_dq += i_batch * stride_dqb + i_head * GROUP * stride_dqh
    store_query_rows(p_dq, b_dq, o_query, o_group, stride_dqt, stride_dqh, m_row, SIZE, BD)


@triton.jit
def store_compact(
    p_x,
    b_x,
    first,
    rungs,
    o_query,
    o_group,
    tokens,
    m_row,
    GROUP: tl.constexpr,
    NB: tl.constexpr,
    ROWS: tl.constexpr,
    BQ: tl.constexpr,
    RC: tl.constexpr,
):
    """Write the one entry of each row and rung that counts (the others are 0) to (rungs, Tq, group)."""
    b_compact = tl.sum(tl.reshape(b_x, [NB * ROWS, RC, BQ]), 2)
    o_rung = first + tl.arange(0, RC)
    o_row = o_query.to(tl.int64) * GROUP + o_group
    p_tile = p_x + o_rung.to(tl.int64)[None, :] * tokens * GROUP + o_row[:, None]
    tl.store(p_tile, b_compact.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_rung < rungs)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def key_grad_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse,
    p_delta,
    p_positions,
    p_table,
    p_fractions,
    p_weights,
    p_grads,
    p_dk,
    p_dv,
    scale,
    tokens,
    keys,
    window,
    kv_heads,
    rungs_stored,
    stride_set,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_positions,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_dvb,
    stride_dvt,
    stride_dvh,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One program: the gradients of `BN` keys and values of one KV head."""
    BM: tl.constexpr = BR // GP
    i_block, i_head, i_batch = place(keys, BN, kv_heads)
    p_q += i_batch * stride_qb + i_head * GROUP * stride_qh
    p_do += i_batch * stride_gb + i_head * GROUP * stride_gh
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    past = keys - tokens
    p_weights += (i_batch * kv_heads + i_head) * rungs_stored * tokens * GROUP
    p_grads += (i_batch * kv_heads + i_head) * rungs_stored * tokens * GROUP
    p_set = p_table + i_head * stride_set
    o_tile = tl.arange(0, BN)
    o_key = i_block * BN + o_tile
    first_query = i_block * BN - past
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)

    # The rungs: rows that follow one another, times one number each. Head by head, so that the rows which
    # neighbouring rungs share are still in the cache.
    SIDES: tl.constexpr = 2 if SCALED else 1
    o_size = tl.arange(0, BD)
    m_size = o_size < SIZE
    o_q = o_tile.to(tl.int64)[:, None] * stride_qt + o_size[None, :]
    o_do = o_tile.to(tl.int64)[:, None] * stride_gt + o_size[None, :]
    rungs = tl.load(p_set)
    for i_group in range(GROUP):
        for i in range(rungs * SIDES):
            i_rung = i // SIDES
            near = tl.load(p_set + 1 + i_rung)
            first = first_query + near + i % SIDES
            m_query = (first + o_tile >= 0) & (first + o_tile < tokens)
            p_entry = (tl.cast(i_rung, tl.int64) * tokens + first) * GROUP + i_group
            b_ds = tl.load(p_grads + p_entry + o_tile * GROUP, mask=m_query, other=0.0).to(tl.float32)
            b_p = tl.load(p_weights + p_entry + o_tile * GROUP, mask=m_query, other=0.0).to(tl.float32)
            if SCALED:
                o_query = first + o_tile
                b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_query, HAS_POSITIONS)
                b_f = tl.where(b_limit == near, 0.0, tl.load(p_fractions + i_rung))
                b_f = tl.where(i % SIDES == 0, 1.0 - b_f, b_f)
                b_ds *= b_f
                b_p *= b_f
            p_q_tile = p_q + tl.cast(first, tl.int64) * stride_qt + tl.cast(i_group, tl.int64) * stride_qh + o_q
            p_do_tile = p_do + tl.cast(first, tl.int64) * stride_gt + tl.cast(i_group, tl.int64) * stride_gh + o_do
            if SIZE == BD:
                b_q = tl.load(p_q_tile, mask=m_query[:, None], other=0.0)
                b_do = tl.load(p_do_tile, mask=m_query[:, None], other=0.0)
            else:
                b_q = tl.load(p_q_tile, mask=m_query[:, None] & m_size[None, :], other=0.0)
                b_do = tl.load(p_do_tile, mask=m_query[:, None] & m_size[None, :], other=0.0)
            b_dk += b_ds[:, None] * b_q.to(tl.float32)
            b_dv += b_p[:, None] * b_do.to(tl.float32)

    # The window: dense tiles of keys by rows (query, head of the group), weights recomputed.
    m_key = o_key < keys
    b_k = load_rows(p_k, o_key, stride_kt, m_key, SIZE, BD)
    b_v = load_rows(p_v, o_key, stride_vt, m_key, SIZE, BD)
    scale_log2 = scale * LOG2E

    begin = tl.maximum(i_block * BN - past, 0)
    end = tl.minimum(i_block * BN + BN + window - past, tokens)
    for start in range(begin, end, BM):
        o_row = tl.arange(0, BR)
        o_query, o_group = start + o_row // GP, o_row % GP
        m_row = (o_query < tokens) & (o_group < GROUP)
        b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row, HAS_POSITIONS)
        b_q = query_rows(p_q, o_query, o_group, stride_qt, stride_qh, m_row, SIZE, BD)
        b_do = query_rows(p_do, o_query, o_group, stride_gt, stride_gh, m_row, SIZE, BD)
        o_lse = ((i_batch * kv_heads + i_head) * GROUP + o_group) * tokens + o_query
        b_lse = tl.load(p_lse + o_lse, mask=m_row, other=float("inf")) * LOG2E
        b_delta = tl.load(p_delta + o_lse, mask=m_row, other=0.0)
        m_near = tl.trans(near_mask(o_query + past, b_limit, o_key, window))
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2
        b_p = tl.where(m_near, tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    p_dk += i_batch * stride_dkb + i_head * stride_dkh
    p_dv += i_batch * stride_dvb + i_head * stride_dvh
    o_zero = tl.zeros([BN], tl.int32)
    store_query_rows(p_dk, b_dk * scale, o_key, o_zero, stride_dkt, 0, m_key, SIZE, BD)
    store_query_rows(p_dv, b_dv, o_key, o_zero, stride_dvt, 0, m_key, SIZE, BD)
