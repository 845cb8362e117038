"""Which blocks of keys the queries choose: bits a query, and lists both ways, so that nothing else is read.

A program has the 16 queries of a tile, which lies in one block of keys: all of them choose among the same 64 blocks.
Block `b` is bit `b mod 64` of a query's word; no two blocks in reach share one. Tiles begin at every 16th key. Where a
row's longest document does not begin with a block, all are counted from `shift` keys before the first, a number a row,
(batch or 1,).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.columns import row_stride
from fibattn.attention.triton.rows import load_rows, place, query_limit
from fibattn.attention.triton.scores import power, row_products, scaled_scores
from fibattn.attention.triton.shape import Shape, shape_of

TILE = tl.constexpr(16)
"""Queries of a program."""
SLOTS = tl.constexpr(64)
"""The bits of a word."""


class Numbers(NamedTuple):
    """A `ChosenPattern` and the scale, as the schemas have them."""

    scale: float
    window: int
    reach: int
    block: int
    blocks: int
    anchored: bool


def tiles_of(tokens: int, keys: int, shift: Tensor | None, block: int) -> tuple[int, int]:
    """The first tile with a query, and how many there are."""
    first = (keys - tokens) // TILE.value
    return first, launch.blocks(keys + (0 if shift is None else block - 1), TILE.value) - first


def warps_for(shape: Shape) -> int:
    """Warps of the kernel that chooses."""
    return 4 if shape.exact else 1


def choose(
    q: Tensor, means: Tensor, keys: int, positions: Tensor | None, shift: Tensor | None, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """What the queries (batch, tokens, query heads, size), the last of `keys`, choose, as `blocks.choose` says it.

    `means` are the mean keys of the blocks, (batch, blocks, KV heads, size).

    Returns:
        The bits, (batch, KV heads, query tokens), int64; and how many blocks the queries of a tile chose, and which,
        rising, (batch, KV heads, tiles, 1 + 64), int32.
    """
    scale, window, reach, block, count, anchored = numbers
    shape = shape_of(q, means)
    batch, tokens = q.shape[:2]
    kv_heads = means.shape[2]
    first_tile, tiles = tiles_of(tokens, keys, shift, block)
    bits = q.new_empty(batch, kv_heads, tokens, dtype=torch.int64)
    lists = q.new_empty(batch, kv_heads, tiles, 1 + SLOTS.value, dtype=torch.int32)
    choose_kernel[(tiles * kv_heads, batch)](
        *(q, means, positions, shift, bits, lists),
        *(scale, tokens, keys, window, reach, kv_heads, tiles, first_tile),
        *launch.strides(q, means),
        *(row_stride(positions), row_stride(shift)),
        **launch.sizes(shape, launch.wide(q, means)),
        BLOCK=block,
        COUNT=count,
        ANCHORED=anchored,
        num_warps=warps_for(shape),
        num_stages=1,
    )
    return bits, lists


def choosers(bits: Tensor, keys: int, shift: Tensor | None, block: int) -> Tensor:
    """How many queries chose each block, and which, rising; (batch, KV heads, blocks, 1 + 64 · block), int32.

    What is behind the last may be anything.
    """
    batch, kv_heads, tokens = bits.shape
    blocks, most = launch.blocks(keys, block), SLOTS.value * block
    lists = bits.new_empty(batch, kv_heads, blocks, 1 + most, dtype=torch.int32)
    choosers_kernel[(blocks * kv_heads, batch)](
        *(bits, shift, lists, tokens, keys, kv_heads, blocks, row_stride(shift)), BLOCK=block, MOST=most, num_warps=1
    )
    return lists


@launch.kernel
def choose_kernel(
    p_q,
    p_means,
    p_positions,
    p_shift,
    p_bits,
    p_lists,
    scale,
    tokens,
    keys,
    window,
    reach,
    kv_heads,
    tiles,
    first_tile,
    stride_q,
    stride_m,
    stride_positions,
    stride_shift,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    ANCHORED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the bits of a tile's queries for one KV head, and the list of their blocks."""
    i_tile, i_head, i_batch = place(kv_heads)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_means += i_batch * stride_m[0] + i_head * stride_m[2]
    past = keys - tokens
    shift = row_shift(p_shift, stride_shift, i_batch)
    o_query = (first_tile + i_tile) * TILE - shift - past + tl.arange(0, TILE)
    m_query = (o_query >= 0) & (o_query < tokens)
    # From the oldest: the block before the tile's own is the newest that can end before a query.
    first_block = (first_tile + i_tile) * TILE // BLOCK - SLOTS
    o_block = first_block + tl.arange(0, SLOTS)
    b_means = load_rows(p_means, o_block, stride_m[1], o_block >= 0, SIZE, BD, WIDE)
    b_place = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_query)
    b_limit = tl.minimum(b_place, reach)
    b_first = (o_query + past)[:, None] - (o_block * BLOCK - shift)[None, :]
    m_block = (b_first > tl.maximum(window, BLOCK - 1)) & (b_first <= b_limit[:, None])
    m_block = m_block & (o_block >= 0)[None, :] & m_query[:, None]

    b_share = tl.zeros([TILE, SLOTS], tl.float32)
    for i_group in range(GROUP):
        p_head = p_q + tl.cast(i_group, tl.int64) * stride_q[2]
        b_q = load_rows(p_head, o_query, stride_q[1], m_query, SIZE, BD, WIDE)
        b_s = scaled_scores(row_products(b_q, b_means, EXACT), scale, EXACT)
        b_s = tl.where(m_block, b_s, -1e30)
        b_p = power(b_s - tl.max(b_s, 1)[:, None], EXACT)
        b_share += b_p / tl.sum(b_p, 1)[:, None]
    if ANCHORED:  # more than all shares of all query heads
        b_share += tl.where(b_first == b_place[:, None], GROUP + 1.0, 0.0)
    b_share = tl.where(m_block, b_share, -1.0)

    b_bits = tl.zeros([TILE], tl.int64)
    for _ in range(COUNT):
        b_best, i_best = tl.max(b_share, 1, return_indices=True, return_indices_tie_break_left=True)
        b_bits |= tl.where(b_best >= 0, 1, 0).to(tl.int64) << ((first_block + i_best) & (SLOTS - 1)).to(tl.int64)
        b_share = tl.where(tl.arange(0, SLOTS)[None, :] == i_best[:, None], -1.0, b_share)
    tl.store(p_bits + (i_batch * kv_heads + i_head) * tokens + o_query, b_bits, mask=m_query)
    b_any = tl.max((m_block & (b_share < 0)).to(tl.int32), 0)
    p_list = p_lists + ((i_batch * kv_heads + i_head) * tiles + i_tile) * (1 + SLOTS)
    tl.store(p_list, tl.sum(b_any, 0))
    tl.store(p_list + tl.cumsum(b_any, 0), o_block, mask=b_any != 0)


@launch.kernel
def choosers_kernel(
    p_bits, p_shift, p_lists, tokens, keys, kv_heads, blocks, stride_shift, BLOCK: tl.constexpr, MOST: tl.constexpr
):
    """One program: the list of a block."""
    i_block, i_head, i_batch = place(kv_heads)
    p_bits += (i_batch * kv_heads + i_head) * tokens
    p_list = p_lists + ((i_batch * kv_heads + i_head) * blocks + i_block) * (1 + MOST)
    first = (i_block + 1) * BLOCK - row_shift(p_shift, stride_shift, i_batch) - (keys - tokens)
    o_bit = (i_block & (SLOTS - 1)).to(tl.int64)
    listed = 0
    for start in range(0, MOST - BLOCK, 256):
        o_query = first + start + tl.arange(0, 256)
        m_query = (o_query >= 0) & (o_query < tokens) & (start + tl.arange(0, 256) < MOST - BLOCK)
        b_any = ((tl.load(p_bits + o_query, mask=m_query, other=0) >> o_bit) & 1).to(tl.int32)
        tl.store(p_list + listed + tl.cumsum(b_any, 0), o_query, mask=b_any != 0)
        listed += tl.sum(b_any, 0)
    tl.store(p_list, listed)


@triton.jit
def row_shift(p_shift, stride, i_batch):
    """How many keys before a row's first its first block begins."""
    shift = 0
    if p_shift is not None:
        shift = tl.load(p_shift + i_batch * stride)
    return shift
