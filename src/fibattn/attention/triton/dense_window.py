"""A window too wide for columns: dense tiles of keys, shared by the batches of a program's block of queries.

Tiles come nearest first. The first has every row's own key, so that no row's maximum stays infinite.
"""

import triton
import triton.language as tl

from fibattn.attention.triton.rows import block_rows, load_rows, query_limit, query_rows
from fibattn.attention.triton.scores import row_products, scaled_scores, softmax_step, softmax_weights


@triton.jit
def dense_window(
    p_q,
    p_k,
    p_v,
    p_positions,
    scale,
    tokens,
    keys,
    window,
    i_block,
    i_batch,
    stride_q,
    stride_k,
    stride_v,
    stride_positions,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Maximum, sum and weighted values over the window of a block's rows. [BR], [BR], [BR, BD]"""
    past = keys - tokens
    first_own = i_block * BM + past
    o_query, o_group, m_row = block_rows(i_block * BM, tokens, BR, GP, GROUP)
    b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
    b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)
    b_max = tl.full([BR], -float("inf"), tl.float64 if EXACT else tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    b_acc = tl.zeros([BR, BD], tl.float32)
    for i_tile in range(window_tiles(window, first_own, BM, BN)):
        o_key, m_key = window_keys(i_tile, first_own, keys, BM, BN)
        b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = scaled_scores(row_products(b_q, b_k, EXACT), scale, EXACT)
        b_s = tl.where(near_mask(o_query + past, b_limit, o_key, window), b_s, -float("inf"))
        b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, EXACT)
        b_acc = b_acc * b_shrink[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_max, b_sum, b_acc


@triton.jit
def dense_window_grad(
    p_q,
    p_k,
    p_v,
    p_do,
    p_positions,
    b_lse,
    b_delta,
    b_lse_grad,
    scale,
    tokens,
    keys,
    window,
    i_block,
    i_batch,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_positions,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The window's part: the gradient of a block's rows before the scale, and what `delta` is the ratio of."""
    past = keys - tokens
    first_own = i_block * BM + past
    o_query, o_group, m_row = block_rows(i_block * BM, tokens, BR, GP, GROUP)
    b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
    b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)
    b_do = query_rows(p_do, o_query, o_group, stride_do, m_row, SIZE, BD, WIDE)
    b_dq = tl.zeros([BR, BD], tl.float32)
    b_total = tl.zeros([BR], tl.float32)
    b_weight = tl.zeros([BR], tl.float32)
    for i_tile in range(window_tiles(window, first_own, BM, BN)):
        o_key, m_key = window_keys(i_tile, first_own, keys, BM, BN)
        b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = scaled_scores(row_products(b_q, b_k, EXACT), scale, EXACT)
        b_p = softmax_weights(b_s, b_lse[:, None], EXACT)
        b_p = tl.where(near_mask(o_query + past, b_limit, o_key, window), b_p, 0.0)
        b_dp = row_products(b_do, b_v, EXACT)
        b_total += tl.sum(b_p * b_dp, 1)
        b_weight += tl.sum(b_p, 1)
        b_ds = b_p * ((b_dp - b_delta[:, None]) + b_lse_grad[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq, b_total, b_weight


@triton.jit
def window_tiles(window, first_own, BM: tl.constexpr, BN: tl.constexpr):
    """How many tiles reach from a block's last query back to the window of its first."""
    return tl.cdiv(tl.minimum(window, first_own) + BM, BN)


@triton.jit
def window_keys(i_tile, first_own, keys, BM: tl.constexpr, BN: tl.constexpr):
    """The keys of a tile, and whether they exist. [BN] each"""
    o_key = first_own + BM - (i_tile + 1) * BN + tl.arange(0, BN)
    return o_key, (o_key >= 0) & (o_key < keys)


@triton.jit
def near_mask(o_own, b_limit, o_key, window):
    """Which keys of a dense tile are in each row's window. [BR, BN]"""
    b_distance = o_own[:, None] - o_key[None, :]
    return (b_distance >= 0) & (b_distance <= window) & (b_distance <= b_limit[:, None])
