"""The forward kernel: output and log-sum-exp of a block of queries, for all query heads of a KV head.

The window's tiles come first, nearest first, so that every row has seen a key (its own) before anything is
rescaled; then the rungs, `RC` at a time. What moves: q and the output once, a window tile of
`BM + window` keys a block, and each far row of k and v once for every query and KV head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fibattn.attention.triton import common
from fibattn.attention.triton.common import (
    LN2,
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


def tiles_for(shape: Shape) -> Tiles:
    """Tile sizes, from a fixed table: nothing is tuned at run time."""
    wide = shape.padded_size > 128
    if shape.dtype == torch.float32:
        return Tiles(block=16 if not wide else 8, near=32 if not wide else 16, rungs=4, warps=4, stages=1)
    if wide:
        return Tiles(block=16, near=32, rungs=8, warps=4, stages=1)
    return Tiles(block=16, near=32, rungs=16, warps=4, stages=1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    scale: float,
    window: int,
    table: Tensor,
    fractions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output like q, and the natural log-sum-exp (B, Hq, Tq); `fractions` where the rungs are interpolated."""
    shape = common.shape_of(q, k)
    tiles = tiles_for(shape)
    block = common.block_of(shape, tiles)
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    grid = (triton.cdiv(tokens, block) * kv_heads * batch,)
    try:
        forward_kernel[grid](
            *(q, k, v, out, lse, positions, table, fractions),
            *(scale, tokens, keys, window, kv_heads, table.stride(0) if table.shape[0] > 1 else 0),
            *common.strides(q, k, v, out),
            common.positions_stride(positions),
            GROUP=shape.group,
            GP=shape.padded_group,
            SIZE=shape.size,
            BD=shape.padded_size,
            BQ=shape.batch_queries,
            ROWS=shape.rows,
            NB=block // shape.batch_queries,
            BN=max(tiles.near, block),
            RC=max(tiles.rungs, 16 // shape.batch_queries),
            HAS_POSITIONS=positions is not None,
            SCALED=fractions is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    except OutOfResources as error:
        raise common.explain(error, shape) from error
    return out, lse


# Nothing that varies with the length or the batch may ask for another binary. Strides do stay specialized to
# being multiples of 16, or loads could not be vectorized; with the usual head sizes they always are.
_UNSPECIALIZED = ["tokens", "keys", "window", "kv_heads", "stride_set", "stride_positions"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_positions,
    p_table,
    p_fractions,
    scale,
    tokens,
    keys,
    window,
    kv_heads,
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
    stride_ob,
    stride_ot,
    stride_oh,
    stride_positions,
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
    SCALED: tl.constexpr,
):
    """One program: `NB` batches of `BQ` queries, one KV head."""
    BM: tl.constexpr = NB * BQ
    BR: tl.constexpr = NB * ROWS
    i_block, i_head, i_batch = place(tokens, BM, kv_heads)
    p_q += i_batch * stride_qb + i_head * GROUP * stride_qh
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
    b_max = tl.full([BR], -float("inf"), tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    b_acc = tl.zeros([BR, BD], tl.float32)
    scale_log2 = scale * LOG2E

    tiles = tl.cdiv(BM + tl.minimum(window, first_own), BN)
    for i in range(tiles):
        o_key = first_own + BM - (i + 1) * BN + tl.arange(0, BN)
        m_key = (o_key >= 0) & (o_key < keys)
        b_k = load_rows(p_k, o_key, stride_kt, m_key, SIZE, BD)
        b_v = load_rows(p_v, o_key, stride_vt, m_key, SIZE, BD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_s = tl.where(near_mask(o_query + past, b_limit, o_key, window), b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_acc = b_acc * b_shrink[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = b_new

    b_q3 = tl.reshape(b_q, [NB, ROWS, BD])
    b_acc3 = tl.reshape(b_acc, [NB, ROWS, BD])
    b_max3 = tl.reshape(b_max, [NB, ROWS])
    b_sum3 = tl.reshape(b_sum, [NB, ROWS])
    rungs = tl.load(p_set)
    for first in range(0, rungs, RC):
        b_offset, o_slot, o_rung = chunk_columns(p_set, first, rungs, BQ, RC)
        o_key, m_key = chunk_keys(first_own, b_offset, o_slot, keys, NB, BQ)
        b_k = load_batches(p_k, o_key, stride_kt, m_key, SIZE, BD)
        b_v = load_batches(p_v, o_key, stride_vt, m_key, SIZE, BD)
        b_s = tl.dot(b_q3, tl.permute(b_k, (0, 2, 1)), input_precision="ieee")
        if SCALED:
            m_far = m_key & (o_key > 0)
            b_k_far = load_batches(p_k, o_key - 1, stride_kt, m_far, SIZE, BD)
            b_v_far = load_batches(p_v, o_key - 1, stride_vt, m_far, SIZE, BD)
            b_s_far = tl.dot(b_q3, tl.permute(b_k_far, (0, 2, 1)), input_precision="ieee")
            b_f = tl.load(p_fractions + o_rung, mask=o_rung < rungs, other=0.0)
            # The first key of a document has none before it to interpolate with.
            m_first = tl.reshape(b_limit, [NB, ROWS])[:, :, None] == b_offset[None, None, :]
            b_f = tl.where(m_first, 0.0, b_f[None, None, :])
            b_s = b_s + b_f * (b_s_far - b_s)
        m_entry = chunk_mask(b_limit, b_offset, o_slot, NB, ROWS, GP)
        b_s = tl.where(m_entry, b_s * scale_log2, -float("inf"))
        b_new3 = tl.maximum(b_max3, tl.max(b_s, 2))
        b_p = tl.exp2(b_s - b_new3[:, :, None])
        b_shrink3 = tl.exp2(b_max3 - b_new3)
        b_sum3 = b_sum3 * b_shrink3 + tl.sum(b_p, 2)
        b_acc3 = b_acc3 * b_shrink3[:, :, None]
        if SCALED:
            b_p_far = b_p * b_f
            b_acc3 = tl.dot(b_p_far.to(b_v.dtype), b_v_far, b_acc3, input_precision="ieee")
            b_p = b_p - b_p_far
        b_acc3 = tl.dot(b_p.to(b_v.dtype), b_v, b_acc3, input_precision="ieee")
        b_max3 = b_new3

    b_max = tl.reshape(b_max3, [BR])
    b_sum = tl.reshape(b_sum3, [BR])
    b_acc = tl.reshape(b_acc3, [BR, BD]) / b_sum[:, None]
    p_out += i_batch * stride_ob + i_head * GROUP * stride_oh
    store_query_rows(p_out, b_acc, o_query, o_group, stride_ot, stride_oh, m_row, SIZE, BD)
    o_lse = ((i_batch * kv_heads + i_head) * GROUP + o_group) * tokens + o_query
    tl.store(p_lse + o_lse, (b_max + tl.log2(b_sum)) * LN2, mask=m_row)
