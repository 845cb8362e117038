"""Decoding where queries choose blocks: one new token of every sequence against its rings, in one launch.

A program has one sequence and one KV head, as in `decode.py`. It reads all far keys in reach once for the means of
their blocks, lets the query heads choose, then attends to the window and to what was chosen. Nothing in it depends on
how long the sequence is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.chosen import SLOTS, Numbers
from fibattn.attention.triton.columns import row_stride
from fibattn.attention.triton.decode import ring_row, ring_tile, tiles_for, token_place
from fibattn.attention.triton.rows import load_rows, store_rows
from fibattn.attention.triton.scores import LOG2E, softmax_step
from fibattn.attention.triton.shape import shape_of


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    far: tuple[Tensor, Tensor, Tensor] | None,
    trust: Tensor | None,
    cache_positions: Tensor,
    positions: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """Output like q (B, 1, Hq, D); writes k, v and far keys (B, 1, Hkv, D) into the rings (B, rows, Hkv, D).

    `far` has the ring of the far keys, the far queries and the far keys.
    """
    scale, window, reach, block, count, anchored = numbers
    shape = shape_of(q, k)
    batch, kv_heads = k.shape[0], k.shape[2]
    far_cache, far_q, far_k = (k_cache, q, k) if far is None else far
    caches = (k_cache, v_cache, far_cache)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    columns, stages = tiles_for(shape, window)
    with launch.Explained(shape):
        chosen_decode_kernel[(batch * kv_heads,)](
            *(q, far_q, *caches, k, v, far_k, trust, out, cache_positions, positions),
            *(scale, k_cache.shape[1], window, reach, kv_heads),
            *(row_stride(cache_positions), row_stride(positions)),
            *launch.strides(q, far_q, *caches, k, v, far_k, out),
            ROWS=shape.rows,
            BN=min(columns, block),
            BLOCK=block,
            COUNT=count,
            ANCHORED=anchored,
            FAR=far is not None,
            **launch.of_shape(shape),
            num_warps=4,
            num_stages=stages,
        )
    return out


@launch.kernel
def chosen_decode_kernel(
    p_q,
    p_far_q,
    p_k_cache,
    p_v_cache,
    p_far_cache,
    p_k,
    p_v,
    p_far_k,
    p_trust,
    p_out,
    p_cache_positions,
    p_positions,
    scale,
    rows,
    window,
    reach,
    kv_heads,
    stride_cache_positions,
    stride_positions,
    stride_q,
    stride_far_q,
    stride_k_cache,
    stride_v_cache,
    stride_far_cache,
    stride_k,
    stride_v,
    stride_far_k,
    stride_o,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    ANCHORED: tl.constexpr,
    FAR: tl.constexpr,
):
    """One program: one sequence, one KV head. With `FAR` the far keys have a ring of their own."""
    i_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    p_k_cache += i_batch * stride_k_cache[0] + i_head * stride_k_cache[2]
    p_v_cache += i_batch * stride_v_cache[0] + i_head * stride_v_cache[2]
    p_far_cache += i_batch * stride_far_cache[0] + i_head * stride_far_cache[2]
    position, inside = token_place(p_cache_positions, stride_cache_positions, p_positions, stride_positions, i_batch)
    limit, own = tl.minimum(position, inside), position % rows

    o_size = tl.arange(0, BD)
    m_size = o_size < SIZE
    b_k_own = tl.load(p_k + i_batch * stride_k[0] + i_head * stride_k[2] + o_size, mask=m_size, other=0.0)
    b_v_own = tl.load(p_v + i_batch * stride_v[0] + i_head * stride_v[2] + o_size, mask=m_size, other=0.0)
    tl.store(p_k_cache + own * stride_k_cache[1] + o_size, b_k_own, mask=m_size)
    tl.store(p_v_cache + own * stride_v_cache[1] + o_size, b_v_own, mask=m_size)
    if FAR:
        p_far_own = p_far_k + i_batch * stride_far_k[0] + i_head * stride_far_k[2]
        b_far_own = tl.load(p_far_own + o_size, mask=m_size, other=0.0)
        tl.store(p_far_cache + own * stride_far_cache[1] + o_size, b_far_own, mask=m_size)

    o_group = tl.arange(0, ROWS)
    m_group = o_group < GROUP
    o_head = i_head * GROUP + o_group
    b_q = load_rows(p_q + i_batch * stride_q[0], o_head, stride_q[2], m_group, SIZE, BD, True)
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BD], tl.float32)
    for first in range(0, window + 1, BN):
        b_distance = (first + tl.arange(0, BN)).to(tl.int64)
        m_key = (b_distance <= window) & (b_distance <= limit)
        # As in `decode.py`: what was stored above is not loaded, and what the ring has lost makes no plausible number.
        m_cached, m_own = m_key & (b_distance > 0) & (b_distance < rows), (b_distance == 0)[:, None]
        o_row = ring_row(own, b_distance, rows)
        b_k = ring_tile(p_k_cache, o_row, stride_k_cache[1], m_cached, b_k_own, m_own, SIZE, BD)
        b_v = ring_tile(p_v_cache, o_row, stride_v_cache[1], m_cached, b_v_own, m_own, SIZE, BD)
        m_lost = b_distance >= rows
        b_max, b_sum, b_acc = add_keys(b_q, b_k, b_v, m_key, m_lost, scale, b_max, b_sum, b_acc)

    b_q = load_rows(p_far_q + i_batch * stride_far_q[0], o_head, stride_far_q[2], m_group, SIZE, BD, True)
    b_first, b_means, b_share = block_shares(
        *(p_far_cache, stride_far_cache[1], b_q, m_group, scale, own, inside, limit, rows, window, reach),
        *(GROUP, SIZE, BD, BLOCK, ANCHORED),
    )
    o_slot = tl.arange(0, SLOTS)
    b_trust = tl.full([BD], 1.0, tl.float32)
    if p_trust is not None:
        b_trust *= tl.load(p_trust + i_head).to(tl.float32)
    for _ in range(COUNT):
        # Where there is none any more, its keys come out as the query's own and later ones, which are in the window.
        m_best = (o_slot == tl.argmax(b_share, 0, tie_break_left=True)) & (b_share >= 0)
        farthest = tl.sum(tl.where(m_best, b_first, 0), 0)
        b_mean = tl.sum(tl.where(m_best[:, None], b_means.to(tl.float32), 0.0), 0)
        b_mean = (b_mean * b_trust).to(b_q.dtype)
        b_share = tl.where(m_best, -1.0, b_share)
        for part in range(0, BLOCK, BN):
            b_distance = farthest - part - tl.arange(0, BN)
            m_key = b_distance > window
            o_row = ring_row(own, b_distance, rows)
            m_row = m_key & (b_distance < rows)
            b_k = load_rows(p_far_cache, o_row, stride_far_cache[1], m_row, SIZE, BD, True)
            b_v = load_rows(p_v_cache, o_row, stride_v_cache[1], m_row, SIZE, BD, True)
            m_lost = b_distance >= rows
            b_k += b_mean[None, :]
            b_max, b_sum, b_acc = add_keys(b_q, b_k, b_v, m_key, m_lost, scale, b_max, b_sum, b_acc)

    store_rows(p_out + i_batch * stride_o[0], b_acc / b_sum[:, None], o_head, stride_o[2], m_group, SIZE, BD, True)


@triton.jit
def block_shares(
    p_far_cache,
    stride,
    b_q,
    m_group,
    scale,
    own,
    inside,
    limit,
    rows,
    window,
    reach,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """Of the last blocks that may be chosen, rising: how far back each begins [SLOTS], its mean key [SLOTS, BD], and
    the shares that the query heads give it, summed, below 0 where it may not [SLOTS]. Blocks begin with the document.
    """
    nearest = tl.maximum(window, BLOCK - 1)
    o_block = (inside - nearest - 1) // BLOCK - (SLOTS - 1) + tl.arange(0, SLOTS)
    b_first = inside - o_block * BLOCK
    m_block = (o_block >= 0) & (b_first > nearest) & (b_first <= tl.minimum(limit, reach))
    b_means = tl.zeros([SLOTS, BD], tl.float32)
    for i_key in range(BLOCK):
        o_row = ring_row(own, b_first - i_key, rows)
        m_row = m_block & (b_first - i_key < rows)
        b_means += load_rows(p_far_cache, o_row, stride, m_row, SIZE, BD, True).to(tl.float32)
    b_means = (b_means / BLOCK).to(b_q.dtype)
    b_s = tl.dot(b_q, tl.trans(b_means), input_precision="ieee") * (scale * LOG2E)
    b_s = tl.where(m_block[None, :], b_s, -1e30)
    b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    b_share = tl.sum(tl.where(m_group[:, None], b_p / tl.sum(b_p, 1)[:, None], 0.0), 0)
    if ANCHORED:  # more than all shares of all query heads
        b_share += tl.where(b_first == limit, GROUP + 1.0, 0.0)
    return b_first, b_means, tl.where(m_block, b_share, -1.0)


@triton.jit
def add_keys(b_q, b_k, b_v, m_key, m_lost, scale, b_max, b_sum, b_acc):
    """Maximum, sum and weighted values of a running softmax after a tile of keys; NaN where the ring has lost one."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2E)
    b_s = tl.where(m_lost[None, :], float("nan"), b_s)
    b_s = tl.where(m_key[None, :], b_s, -float("inf"))
    b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, False)
    return b_max, b_sum, tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision="ieee")
