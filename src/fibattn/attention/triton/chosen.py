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
from fibattn.attention.triton.rows import block_rows, load_rows, place, query_limit, query_rows
from fibattn.attention.triton.scores import row_products, scaled_scores, softmax_step
from fibattn.attention.triton.shape import shape_of

TILE = tl.constexpr(16)
"""Queries of a program."""
SLOTS = tl.constexpr(64)
"""The bits of a word."""


class Choice(NamedTuple):
    """What the queries chose. A list begins with how many entries it has; what is behind these may be anything."""

    bits: Tensor
    """(batch, KV heads, query tokens), int64."""
    blocks: Tensor
    """The blocks that any query of a tile chose, rising; (batch, KV heads, tiles, 1 + 64), int32."""
    tiles: Tensor
    """The tiles with a query that chose a block, rising; (batch, KV heads, blocks, 1 + 4 · block), int32."""


def tiles_of(tokens: int, keys: int, shift: Tensor | None, block: int) -> tuple[int, int]:
    """The first tile with a query, and how many there are."""
    first = (keys - tokens) // TILE.value
    return first, launch.blocks(keys + (0 if shift is None else block - 1), TILE.value) - first


def choose(
    q: Tensor,
    means: Tensor,
    keys: int,
    positions: Tensor | None,
    shift: Tensor | None,
    scale: float,
    window: int,
    reach: int,
    block: int,
    count: int,
) -> Choice:
    """What the queries (batch, tokens, query heads, size), the last of `keys`, choose.

    By the mean keys of the blocks, (batch, blocks, KV heads, size): those with the largest shares, which
    the query heads of a KV head would each give them, summed.
    """
    shape = shape_of(q, means)
    batch, tokens = q.shape[:2]
    kv_heads, blocks = means.shape[2], means.shape[1]
    first_tile, tiles = tiles_of(tokens, keys, shift, block)
    bits = q.new_empty(batch, kv_heads, tokens, dtype=torch.int64)
    words = q.new_empty(batch, kv_heads, tiles, dtype=torch.int64)
    lists = q.new_empty(batch, kv_heads, tiles, 1 + SLOTS.value, dtype=torch.int32)
    most = SLOTS.value * block // TILE.value
    inverse = q.new_empty(batch, kv_heads, blocks, 1 + most, dtype=torch.int32)
    choose_kernel[(tiles * kv_heads, batch)](
        *(q, means, positions, shift, bits, words, lists),
        *(scale, tokens, keys, window, reach, kv_heads, tiles, first_tile),
        *launch.strides(q, means),
        *(row_stride(positions), row_stride(shift)),
        GROUP=shape.group,
        GP=shape.padded_group,
        SIZE=shape.size,
        BD=shape.padded_size,
        BLOCK=block,
        COUNT=count,
        EXACT=shape.exact,
        WIDE=launch.wide(q, means),
        **launch.FUSED,
        num_warps=4,
    )
    if blocks:
        invert_kernel[(blocks * kv_heads, batch)](
            *(words, inverse, blocks, kv_heads, tiles, first_tile), BLOCK=block, MOST=most, num_warps=1
        )
    return Choice(bits, lists, inverse)


_UNSPECIALIZED = [*("tokens", "keys", "window", "reach", "kv_heads", "tiles", "first_tile", "blocks")]


@triton.jit(do_not_specialize=[*_UNSPECIALIZED[:-1], "stride_positions", "stride_shift"])
def choose_kernel(
    p_q,
    p_means,
    p_positions,
    p_shift,
    p_bits,
    p_words,
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
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the bits of a tile's queries for one KV head, all of them together, and the list of its blocks."""
    BR: tl.constexpr = TILE * GP
    i_tile, i_head, i_batch = place(kv_heads)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_means += i_batch * stride_m[0] + i_head * stride_m[2]
    i_list = (i_batch * kv_heads + i_head) * tiles + i_tile
    past = keys - tokens
    shift = row_shift(p_shift, stride_shift, i_batch)
    first_query = (first_tile + i_tile) * TILE - shift - past
    o_query, o_group, m_row = tile_rows(first_query, tokens, BR, GP, GROUP)
    # From the oldest: the block before the tile's own is the newest that can end before a query.
    o_block = (first_tile + i_tile) * TILE // BLOCK - SLOTS + tl.arange(0, SLOTS)
    b_means = load_rows(p_means, o_block, stride_m[1], o_block >= 0, SIZE, BD, WIDE)
    b_q = query_rows(p_q, o_query, o_group, stride_q[1], stride_q[2], m_row, SIZE, BD, WIDE)

    o_token = first_query + tl.arange(0, TILE)
    m_token = (o_token >= 0) & (o_token < tokens)
    b_limit = tl.minimum(query_limit(p_positions, stride_positions, i_batch, o_token, past, m_token), reach)
    b_first = (o_token + past)[:, None] - (o_block * BLOCK - shift)[None, :]
    m_block = (b_first > tl.maximum(window, BLOCK - 1)) & (b_first <= b_limit[:, None])
    m_block = m_block & (o_block >= 0)[None, :] & m_token[:, None]

    b_s = scaled_scores(row_products(b_q, b_means, EXACT), scale, EXACT)
    m_entry = tl.reshape(tl.broadcast_to(m_block[:, None, :], [TILE, GP, SLOTS]), [BR, SLOTS])
    b_s = tl.where(m_entry, b_s, -1e30)
    b_zero = tl.zeros([BR], tl.float32)
    b_p, _, _, b_sum = softmax_step(b_s, b_zero.to(b_s.dtype) - 1e30, b_zero, EXACT)
    b_p = tl.where(m_row[:, None], b_p / b_sum[:, None], 0.0)
    b_share = tl.where(m_block, tl.sum(tl.reshape(b_p, [TILE, GP, SLOTS]), 1), -1.0)

    b_chosen = tl.zeros([TILE, SLOTS], tl.int32)
    for _ in tl.static_range(COUNT):
        i_best = tl.argmax(b_share, 1, tie_break_left=True)
        m_best = (tl.arange(0, SLOTS)[None, :] == i_best[:, None]) & (b_share >= 0)
        b_chosen = tl.where(m_best, 1, b_chosen)
        b_share = tl.where(m_best, -1.0, b_share)

    o_bit = (o_block & (SLOTS - 1)).to(tl.int64)
    b_bits = tl.sum(b_chosen.to(tl.int64) << o_bit[None, :], 1)
    tl.store(p_bits + (i_batch * kv_heads + i_head) * tokens + o_token, b_bits, mask=m_token)
    b_any = tl.max(b_chosen, 0)
    tl.store(p_words + i_list, tl.sum(b_any.to(tl.int64) << o_bit, 0))
    store_list(p_lists + i_list * (1 + SLOTS), o_block, b_any)


@triton.jit(do_not_specialize=["blocks", "kv_heads", "tiles", "first_tile"])
def invert_kernel(p_words, p_inverse, blocks, kv_heads, tiles, first_tile, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """One program: the list of the tiles that chose a block, counted from the first tile with a query."""
    i_block, i_head, i_batch = place(kv_heads)
    i_head += i_batch * kv_heads
    o_tile = (i_block + 1) * (BLOCK // TILE) - first_tile + tl.arange(0, MOST)
    b_word = tl.load(p_words + i_head * tiles + o_tile, mask=(o_tile >= 0) & (o_tile < tiles), other=0)
    b_any = ((b_word >> (i_block & (SLOTS - 1)).to(tl.int64)) & 1).to(tl.int32)
    store_list(p_inverse + (i_head * blocks + i_block) * (1 + MOST), o_tile, b_any)


@triton.jit
def store_list(p_list, o_entry, b_any):
    """Write how many entries are wanted, and these."""
    tl.store(p_list, tl.sum(b_any, 0))
    tl.store(p_list + tl.cumsum(b_any, 0), o_entry, mask=b_any != 0)


@triton.jit
def row_shift(p_shift, stride, i_batch):
    """How many keys before a row's first its first block begins."""
    shift = 0
    if p_shift is not None:
        shift = tl.load(p_shift + i_batch * stride)
    return shift


@triton.jit
def tile_rows(first_query, tokens, BR: tl.constexpr, GP: tl.constexpr, GROUP: tl.constexpr):
    """Query and head of the group of each row of a tile, and whether it exists. [BR] each"""
    o_query, o_group, m_row = block_rows(first_query, tokens, BR, GP, GROUP)
    return o_query, o_group, m_row & (o_query >= 0)
