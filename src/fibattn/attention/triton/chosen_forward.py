"""Attention to a window and to the blocks that were chosen, in one softmax: the forward kernel.

A program has the rows of a tile (`chosen.py`). Its window comes first, dense, so that every row has seen its own key;
then the blocks on the tile's list, in tiles of keys that may come from several blocks. Of a block that another query of
the tile chose, a row's bits hide the keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.chosen import SLOTS, TILE, Numbers, row_shift, tiles_of
from fibattn.attention.triton.columns import row_stride
from fibattn.attention.triton.dense_window import near_mask, window_keys, window_tiles
from fibattn.attention.triton.rows import block_rows, load_rows, place, query_limit, query_rows, row_starts, store_rows
from fibattn.attention.triton.scores import LN2, row_products, scaled_scores, softmax_step
from fibattn.attention.triton.shape import Shape, shape_of


@dataclass(frozen=True)
class Tiles:
    """Tile sizes: keys a tile, warps, stages."""

    keys: int
    warps: int
    stages: int


def tiles_for(shape: Shape) -> Tiles:
    """Tile sizes of the kernels that have a tile of queries. Small tiles of keys: two blocks leave little over."""
    return Tiles(32, 4, 1 if shape.exact or shape.padded_size > 128 else 2)


def options(shape: Shape, tiles: Tiles, block: int, wide: bool) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        **launch.sizes(shape, wide),
        "GP": min(shape.padded_group, (2 if shape.exact else 8) // (1 if shape.padded_size <= 64 else 2)),
        "BLOCK": block,
        "BN": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, and the queries and keys by which blocks are read."""


def forward(
    given: Given, positions: Tensor | None, shift: Tensor | None, bits: Tensor, lists: Tensor, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """Output like q, and the natural log-sum-exp (B, Hq, Tq)."""
    q, k = given[:2]
    shape = shape_of(q, k)
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    first_tile, tiles = tiles_of(tokens, keys, shift, numbers.block)
    how = options(shape, tiles_for(shape), numbers.block, launch.wide(*given))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float64 if shape.exact else torch.float32)
    with launch.Explained(shape):
        chosen_forward_kernel[(tiles * parts_of(how) * kv_heads, batch)](
            *(*given, bits, lists, out, lse, positions, shift),
            *(numbers.scale, tokens, keys, numbers.window, kv_heads, tiles, first_tile),
            *launch.strides(*given, out),
            *(row_stride(positions), row_stride(shift)),
            **how,
        )
    return out, lse


def parts_of(how: dict[str, Any]) -> int:
    """Programs for the query heads of a KV head, each of which has some."""
    return launch.blocks(how["GROUP"], how["GP"])


@launch.kernel
def chosen_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_far_q,
    p_far_k,
    p_bits,
    p_lists,
    p_out,
    p_lse,
    p_positions,
    p_shift,
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
    """One program: a tile of queries, `GP` query heads of one KV head."""
    BR: tl.constexpr = TILE * GP
    i_tile, i_head, i_batch = place(kv_heads)
    i_part = i_tile % tl.cdiv(GROUP, GP)
    i_tile = i_tile // tl.cdiv(GROUP, GP)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_far_q += i_batch * stride_fq[0] + i_head * GROUP * stride_fq[2]
    p_k += i_batch * stride_k[0] + i_head * stride_k[2]
    p_far_k += i_batch * stride_fk[0] + i_head * stride_fk[2]
    p_v += i_batch * stride_v[0] + i_head * stride_v[2]
    p_list = p_lists + ((i_batch * kv_heads + i_head) * tiles + i_tile) * (1 + SLOTS)
    past = keys - tokens
    shift = row_shift(p_shift, stride_shift, i_batch)
    first_own = (first_tile + i_tile) * TILE - shift
    o_query, o_group, m_row = tile_rows(first_own - past, i_part, tokens, BR, GP, GROUP)
    o_own = o_query + past
    b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
    b_bits = tl.load(p_bits + (i_batch * kv_heads + i_head) * tokens + o_query, mask=m_row, other=0)
    b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)

    b_max = tl.full([BR], -float("inf"), tl.float64 if EXACT else tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    b_acc = tl.zeros([BR, BD], tl.float32)
    for i_near in range(window_tiles(window, tl.maximum(first_own, 0), TILE, BN)):
        o_key, m_key = window_keys(i_near, first_own, keys, TILE, BN)
        b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = scaled_scores(row_products(b_q, b_k, EXACT), scale, EXACT)
        b_s = tl.where(near_mask(o_own, b_limit, o_key, window), b_s, -float("inf"))
        b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, EXACT)
        b_acc = b_acc * b_shrink[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")

    b_q = query_rows(p_far_q, o_query, o_group, stride_fq, m_row, SIZE, BD, WIDE)
    listed = tl.load(p_list) * BLOCK
    for first in range(0, listed, BN):
        o_block, o_key, m_key = listed_keys(p_list, first, listed, shift, BLOCK, BN)
        b_k = load_rows(p_far_k, o_key, stride_fk[1], m_key, SIZE, BD, WIDE)
        b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
        b_s = scaled_scores(row_products(b_q, b_k, EXACT), scale, EXACT)
        b_s = tl.where(far_mask(b_bits, o_own, o_block, o_key, m_key, window), b_s, -float("inf"))
        b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, EXACT)
        b_acc = b_acc * b_shrink[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")

    p_out += i_batch * stride_o[0] + i_head * GROUP * stride_o[2]
    o_row = row_starts(o_query, stride_o[1], WIDE) + row_starts(o_group, stride_o[2], WIDE)
    store_rows(p_out, b_acc * (1.0 / b_sum)[:, None], o_row, 1, m_row, SIZE, BD, WIDE)
    p_lse += (i_batch * kv_heads + i_head) * GROUP * tokens
    kept: tl.constexpr = p_lse.dtype.element_ty
    b_lse = tl.log2(b_sum.to(kept)) * LN2 + b_max.to(kept) * (1.0 if EXACT else LN2)
    tl.store(p_lse + row_starts(o_group, tokens, WIDE) + o_query, b_lse, mask=m_row)


@triton.jit
def tile_rows(first_query, i_part, tokens, BR: tl.constexpr, GP: tl.constexpr, GROUP: tl.constexpr):
    """Query and head of the group of each row of a tile, and whether it exists. [BR] each"""
    o_query, o_group, _ = block_rows(first_query, tokens, BR, GP, GROUP)
    o_group += i_part * GP
    return o_query, o_group, (o_query >= 0) & (o_query < tokens) & (o_group < GROUP)


@triton.jit
def listed_keys(p_list, first, listed, shift, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Block and place of the next keys of the blocks on a list, and whether they exist. [BN] each"""
    o_entry = first + tl.arange(0, BN)
    m_key = o_entry < listed
    o_block = tl.load(p_list + 1 + o_entry // BLOCK, mask=m_key, other=0)
    return o_block, o_block * BLOCK - shift + o_entry % BLOCK, m_key


@triton.jit
def far_mask(b_bits, o_own, o_block, o_key, m_key, window):
    """Which keys of blocks each row has chosen, less those in its window. [BR, BN]"""
    o_bit = (o_block & (SLOTS - 1)).to(tl.int64)
    m_chosen = ((b_bits[:, None] >> o_bit[None, :]) & 1) != 0
    return m_chosen & (o_own[:, None] - o_key[None, :] > window) & m_key[None, :]
