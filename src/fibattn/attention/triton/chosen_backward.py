"""The gradients of attention to a window and to chosen blocks: of queries by tiles, of keys and values by blocks.

The kernel for queries mirrors the forward and leaves the row sums `delta`. That for keys has a block or a
part of one: it walks the queries that have these keys in their window, then those that chose the block. No atomics.
"""

import torch
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.chosen import SLOTS, TILE, Numbers, choosers, row_shift, tiles_of
from fibattn.attention.triton.chosen_forward import (
    Given,
    Tiles,
    far_mask,
    listed_keys,
    options,
    parts_of,
    tile_rows,
    tiles_for,
)
from fibattn.attention.triton.columns import row_stride
from fibattn.attention.triton.dense_window import near_mask, window_keys, window_tiles
from fibattn.attention.triton.key_gradients import add_rows
from fibattn.attention.triton.rows import load_rows, place, query_limit, query_rows, row_starts, store_rows
from fibattn.attention.triton.scores import NO_ROW, row_products, scaled_scores, softmax_weights
from fibattn.attention.triton.shape import Shape, shape_of


def key_tiles_for(shape: Shape, block: int) -> Tiles:
    """Tile sizes of the kernel for the gradients of keys, which has a block or a part of one."""
    if shape.exact:
        return Tiles(min(block, 32), 4, 1)
    warps = 2 if shape.padded_size <= 64 and shape.padded_group <= 4 else 4
    return Tiles(min(block, 32), warps, 2 if shape.padded_size <= 128 else 1)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    given: Given,
    positions: Tensor | None,
    shift: Tensor | None,
    bits: Tensor,
    lists: Tensor,
    numbers: Numbers,
) -> Given:
    """Gradients of what is given."""
    (q, k), block = given[:2], numbers.block
    shape = shape_of(q, k)
    grad_out, lse = launch.inner_contiguous(grad_out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    batch, tokens = q.shape[:2]
    keys, kv_heads = k.shape[1:3]
    first_tile, tiles = tiles_of(tokens, keys, shift, block)
    dq, dk, dv, dfq, dfk = grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given)
    delta = torch.empty_like(lse)
    wide = launch.wide(*given, out, grad_out)
    sizes = (numbers.scale, tokens, keys, numbers.window, kv_heads, tiles, first_tile)
    with launch.Explained(shape):
        how = options(shape, tiles_for(shape), block, wide)
        chosen_query_grad_kernel[(tiles * parts_of(how) * kv_heads, batch)](
            *(*given, bits, lists, out, grad_out, lse, grad_lse, positions, shift, delta, dq, dfq),
            *sizes,
            *launch.strides(*given, out, grad_out, dq),
            *(row_stride(positions), row_stride(shift)),
            **how,
        )
        key_tiles, lists = key_tiles_for(shape, block), choosers(bits, keys, shift, block)
        parts = launch.blocks(keys + (0 if shift is None else block - 1), key_tiles.keys)
        chosen_key_grad_kernel[(parts * kv_heads, batch)](
            *(*given, lists, grad_out, lse, delta, positions, shift, dk, dv, dfk),
            *(*sizes[:-2], lists.shape[2]),
            *launch.strides(*given, grad_out, dk),
            *(row_stride(positions), row_stride(shift)),
            **options(shape, key_tiles, block, wide),
        )
    return grads  # pyright: ignore[reportReturnType]


@launch.kernel
def chosen_query_grad_kernel(
    p_q,
    p_k,
    p_v,
    p_far_q,
    p_far_k,
    p_bits,
    p_lists,
    p_out,
    p_do,
    p_lse,
    p_grad_lse,
    p_positions,
    p_shift,
    p_delta,
    p_dq,
    p_dfq,
    scale,
    tokens,
    keys,
    window,
    kv_heads,
    tiles,
    first_tile,
    stride_q,
    stride_k,
    stride_v,
    stride_fq,
    stride_fk,
    stride_o,
    stride_do,
    stride_dq,
    stride_positions,
    stride_shift,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: both gradients of a tile of queries, `GP` query heads of one KV head; laid out alike."""
    BR: tl.constexpr = TILE * GP
    i_tile, i_head, i_batch = place(kv_heads)
    i_part = i_tile % tl.cdiv(GROUP, GP)
    i_tile = i_tile // tl.cdiv(GROUP, GP)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_far_q += i_batch * stride_fq[0] + i_head * GROUP * stride_fq[2]
    p_k += i_batch * stride_k[0] + i_head * stride_k[2]
    p_far_k += i_batch * stride_fk[0] + i_head * stride_fk[2]
    p_v += i_batch * stride_v[0] + i_head * stride_v[2]
    p_do += i_batch * stride_do[0] + i_head * GROUP * stride_do[2]
    p_out += i_batch * stride_o[0] + i_head * GROUP * stride_o[2]
    p_list = p_lists + ((i_batch * kv_heads + i_head) * tiles + i_tile) * (1 + SLOTS)
    past = keys - tokens
    shift = row_shift(p_shift, stride_shift, i_batch)
    first_own = (first_tile + i_tile) * TILE - shift
    o_query, o_group, m_row = tile_rows(first_own - past, i_part, tokens, BR, GP, GROUP)
    o_own = o_query + past
    b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
    b_bits = tl.load(p_bits + (i_batch * kv_heads + i_head) * tokens + o_query, mask=m_row, other=0)
    b_do = query_rows(p_do, o_query, o_group, stride_do, m_row, SIZE, BD, WIDE)
    b_out = query_rows(p_out, o_query, o_group, stride_o, m_row, SIZE, BD, WIDE)
    o_lse = (i_batch * kv_heads + i_head) * GROUP * tokens + row_starts(o_group, tokens, WIDE) + o_query
    b_lse = tl.load(p_lse + o_lse, mask=m_row, other=NO_ROW)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o_lse, mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_delta + o_lse, b_delta, mask=m_row)

    b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)
    b_dq = tl.zeros([BR, BD], tl.float32)
    for i_near in range(window_tiles(window, tl.maximum(first_own, 0), TILE, BN)):
        o_key, m_key = window_keys(i_near, first_own, keys, TILE, BN)
        b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = scaled_scores(row_products(b_q, b_k, EXACT), scale, EXACT)
        b_p = softmax_weights(b_s, b_lse[:, None], EXACT)
        b_p = tl.where(near_mask(o_own, b_limit, o_key, window), b_p, 0.0)
        b_ds = b_p * (row_products(b_do, b_v, EXACT) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    o_row = row_starts(o_query, stride_dq[1], WIDE) + row_starts(o_group, stride_dq[2], WIDE)
    first_row = i_batch * stride_dq[0] + i_head * GROUP * stride_dq[2]
    store_rows(p_dq + first_row, b_dq * scale, o_row, 1, m_row, SIZE, BD, WIDE)

    b_q = query_rows(p_far_q, o_query, o_group, stride_fq, m_row, SIZE, BD, WIDE)
    b_dq = tl.zeros([BR, BD], tl.float32)
    listed = tl.load(p_list) * BLOCK
    for first in range(0, listed, BN):
        o_block, o_key, m_key = listed_keys(p_list, first, listed, shift, BLOCK, BN)
        b_k = load_rows(p_far_k, o_key, stride_fk[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = scaled_scores(row_products(b_q, b_k, EXACT), scale, EXACT)
        b_p = softmax_weights(b_s, b_lse[:, None], EXACT)
        b_p = tl.where(far_mask(b_bits, o_own, o_block, o_key, m_key, window), b_p, 0.0)
        b_ds = b_p * (row_products(b_do, b_v, EXACT) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    store_rows(p_dfq + first_row, b_dq * scale, o_row, 1, m_row, SIZE, BD, WIDE)


@launch.kernel
def chosen_key_grad_kernel(
    p_q,
    p_k,
    p_v,
    p_far_q,
    p_far_k,
    p_lists,
    p_do,
    p_lse,
    p_delta,
    p_positions,
    p_shift,
    p_dk,
    p_dv,
    p_dfk,
    scale,
    tokens,
    keys,
    window,
    kv_heads,
    blocks,
    stride_q,
    stride_k,
    stride_v,
    stride_fq,
    stride_fk,
    stride_do,
    stride_dk,
    stride_positions,
    stride_shift,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the gradients of `BN` keys, all of one block, and of their values, one KV head; laid out alike."""
    BR: tl.constexpr = TILE * GP
    i_keys, i_head, i_batch = place(kv_heads)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_far_q += i_batch * stride_fq[0] + i_head * GROUP * stride_fq[2]
    p_do += i_batch * stride_do[0] + i_head * GROUP * stride_do[2]
    p_k += i_batch * stride_k[0] + i_head * stride_k[2]
    p_far_k += i_batch * stride_fk[0] + i_head * stride_fk[2]
    p_v += i_batch * stride_v[0] + i_head * stride_v[2]
    p_lse += (i_batch * kv_heads + i_head) * GROUP * tokens
    p_delta += (i_batch * kv_heads + i_head) * GROUP * tokens
    past = keys - tokens
    shift = row_shift(p_shift, stride_shift, i_batch)
    first_key = i_keys * BN - shift
    o_key = first_key + tl.arange(0, BN)
    m_key = (o_key >= 0) & (o_key < keys)
    SUMS: tl.constexpr = tl.float64 if EXACT else tl.float32
    b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
    b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
    b_dk = tl.zeros([BN, BD], SUMS)
    b_dv = tl.zeros([BN, BD], SUMS)
    begin = tl.maximum(first_key - past, 0)
    end = tl.minimum(first_key - past + BN + tl.minimum(window, keys), tokens)
    for i_part in range(0, tl.cdiv(GROUP, GP)):
        for start in range(begin, end, TILE):
            o_query, o_group, m_row = tile_rows(start, i_part, tokens, BR, GP, GROUP)
            b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
            b_distance = (o_query + past)[None, :] - o_key[:, None]
            m_entry = (b_distance >= 0) & (b_distance <= window) & (b_distance <= b_limit[None, :])
            b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)
            b_do = query_rows(p_do, o_query, o_group, stride_do, m_row, SIZE, BD, WIDE)
            o_lse = row_starts(o_group, tokens, WIDE) + o_query
            b_dk, b_dv = add_rows(b_dk, b_dv, b_k, b_v, b_q, b_do, p_lse, p_delta, o_lse, m_row, m_entry, scale, EXACT)
    first_row = i_batch * stride_dk[0] + i_head * stride_dk[2]
    store_rows(p_dk + first_row, b_dk * scale, o_key, stride_dk[1], m_key, SIZE, BD, WIDE)

    b_k = load_rows(p_far_k, o_key, stride_fk[1], m_key, SIZE, BD, WIDE)
    b_dk = tl.zeros([BN, BD], SUMS)
    MOST: tl.constexpr = SLOTS * BLOCK
    i_block = i_keys * BN // BLOCK
    p_list = p_lists + ((i_batch * kv_heads + i_head) * blocks + i_block) * (1 + MOST)
    # The last keys may be in a block behind the last that has a list.
    listed = tl.load(p_list, mask=i_block < blocks, other=0)
    for i_part in range(0, tl.cdiv(GROUP, GP)):
        for first in range(0, listed, TILE):
            o_entry, o_group, m_row = tile_rows(first, i_part, listed, BR, GP, GROUP)
            o_query = tl.load(p_list + 1 + o_entry, mask=m_row, other=0)
            m_entry = m_row[None, :] & ((o_query + past)[None, :] - o_key[:, None] > window)
            b_q = query_rows(p_far_q, o_query, o_group, stride_fq, m_row, SIZE, BD, WIDE)
            b_do = query_rows(p_do, o_query, o_group, stride_do, m_row, SIZE, BD, WIDE)
            o_lse = row_starts(o_group, tokens, WIDE) + o_query
            b_dk, b_dv = add_rows(b_dk, b_dv, b_k, b_v, b_q, b_do, p_lse, p_delta, o_lse, m_row, m_entry, scale, EXACT)
    store_rows(p_dfk + first_row, b_dk * scale, o_key, stride_dk[1], m_key, SIZE, BD, WIDE)
    store_rows(p_dv + first_row, b_dv, o_key, stride_dk[1], m_key, SIZE, BD, WIDE)
