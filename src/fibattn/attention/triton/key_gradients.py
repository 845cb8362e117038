"""The gradients of k and v. The transpose of a fixed offset is a fixed offset, so there are no atomics.

The rungs come first: a program walks the queries at `key + offset` of its keys in a fixed order, head by head,
and needs neither keys, values, exponentials nor reductions, only what the query kernel left for it:
`dk[j] += grad[j + d] * q[j + d]` and `dv[j] += weight[j + d] * do[j + d]`, element by element in float32. What
limits it is reading q and do once a rung; the more keys a program has, the more rows neighbouring rungs share.
A rung between two keys gives to its near key and to the one before. Each row is read once for both: a second pair
of sums belongs to the key before, and moves there at the end; so the tile has one key more than the program.
The window is recomputed as dense tiles, which costs no memory in its width; it wants few keys a program and
many registers, so it is a kernel of its own, after the other, and adds to what that left in dk and dv.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.columns import Columns, near_columns, row_stride
from fibattn.attention.triton.rows import block_rows, load_rows, place, query_limit, query_rows, row_starts, store_rows
from fibattn.attention.triton.scores import NO_ROW, row_products, scaled_scores, softmax_weights
from fibattn.attention.triton.shape import Shape


@dataclass(frozen=True)
class RungTiles:
    """Tile sizes of the kernel for the rungs: keys a tile, the part of a row it has, rungs in flight."""

    keys: int
    part: int
    unroll: int
    warps: int


@dataclass(frozen=True)
class WindowTiles:
    """Tile sizes of the kernel for the window: keys a program, rows (query, head) a tile."""

    keys: int
    rows: int
    warps: int
    stages: int


def rung_tiles_for(shape: Shape, learned: bool) -> RungTiles:
    """Tile sizes of the kernel for the rungs: neighbouring rungs share the rows of many keys."""
    part = min(shape.padded_size, 64)
    if shape.exact:
        return RungTiles(keys=32, part=part, unroll=1, warps=4)
    return RungTiles(keys=128 if learned else 256, part=part, unroll=2, warps=16)


def window_tiles_for(shape: Shape, window: int) -> WindowTiles:
    """Tile sizes of the kernel for the window: a wide one wants large tiles, a narrow one programs of one warp."""
    small = shape.padded_size <= 64
    if shape.exact:
        return WindowTiles(keys=16, rows=16, warps=4 if shape.padded_size <= 128 else 8, stages=1)
    if shape.padded_size > 128:
        return WindowTiles(keys=16, rows=16, warps=4, stages=1)
    if not near_columns(window, shape.batch_queries):
        return WindowTiles(keys=64, rows=64 if small else 32, warps=4, stages=1 if small else 3)
    return WindowTiles(keys=32 if small else 16, rows=16, warps=1, stages=3 if small else 4)


def key_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    scale: float,
    columns: Columns,
    weights: Tensor,
    grads: Tensor,
    dk: Tensor,
    dv: Tensor,
    shape: Shape,
    wide: bool,
) -> None:
    """Fill `dk` and `dv`; `weights` and `grads` (B, Hkv, rungs, Tq, group) belong to the rungs."""
    batch, keys, kv_heads, _ = k.shape
    tokens, rungs = q.shape[1], columns.rungs.shape[1] - 1
    sizes = launch.sizes(shape, wide or rungs * tokens * shape.group >= 2**31)
    if rungs:
        rung_tiles = rung_tiles_for(shape, columns.learned)
        parts = shape.padded_size // rung_tiles.part
        own_keys = rung_tiles.keys - columns.learned
        rung_grad_kernel[(launch.blocks(keys, own_keys) * parts * kv_heads, batch)](
            *(q, grad_out, positions, columns.rungs, columns.fractions, weights, grads, dk, dv),
            *(tokens, keys, kv_heads, rungs, row_stride(columns.rungs)),
            *launch.strides(q, grad_out, dk, dv),
            row_stride(positions),
            BN=rung_tiles.keys,
            BP=rung_tiles.part,
            UNROLL=rung_tiles.unroll,
            **sizes,
            num_warps=rung_tiles.warps,
        )
    tiles = window_tiles_for(shape, columns.window)
    window_grad_kernel[(launch.blocks(keys, tiles.keys) * kv_heads, batch)](
        *(q, k, v, grad_out, lse, grad_lse, delta, positions, dk, dv),
        *(scale, tokens, keys, columns.window, kv_heads),
        *launch.strides(q, k, v, grad_out, dk, dv),
        row_stride(positions),
        GP=shape.padded_group,
        BN=tiles.keys,
        BR=max(tiles.rows, shape.padded_group),
        AFTER_RUNGS=rungs > 0,
        **sizes,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@launch.kernel
def rung_grad_kernel(
    p_q,
    p_do,
    p_positions,
    p_rungs,
    p_fractions,
    p_weights,
    p_grads,
    p_dk,
    p_dv,
    tokens,
    keys,
    kv_heads,
    rungs_stored,
    stride_set,
    stride_q,
    stride_do,
    stride_dk,
    stride_dv,
    stride_positions,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    UNROLL: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: what the rungs give to `BP` dimensions of the keys and values of one KV head, before the scale.

    It has `BN` of them, or one less where rungs are interpolated: the tile's last only gives to the one before.
    """
    i_block, i_head, i_batch = place(kv_heads * (BD // BP))
    i_part = i_head % (BD // BP)
    i_head = i_head // (BD // BP)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_do += i_batch * stride_do[0] + i_head * GROUP * stride_do[2]
    p_weights += (i_batch * kv_heads + i_head) * rungs_stored * tokens * GROUP
    p_grads += (i_batch * kv_heads + i_head) * rungs_stored * tokens * GROUP
    p_set = p_rungs + i_head * stride_set
    past = keys - tokens
    o_tile = tl.arange(0, BN)
    o_size = i_part.to(tl.int32) * BP + tl.arange(0, BP)
    m_size = o_size < SIZE
    LEARNED: tl.constexpr = p_fractions is not None
    OWN: tl.constexpr = BN - 1 if LEARNED else BN
    first_query = i_block * OWN - past
    SUMS: tl.constexpr = tl.float64 if EXACT else tl.float32
    b_dk = tl.zeros([BN, BP], SUMS)
    b_dv = tl.zeros([BN, BP], SUMS)
    if LEARNED:
        b_dk_before = tl.zeros([BN, BP], SUMS)
        b_dv_before = tl.zeros([BN, BP], SUMS)
    for i_group in range(GROUP):
        p_head_q = p_q + tl.cast(i_group, tl.int64) * stride_q[2]
        p_head_do = p_do + tl.cast(i_group, tl.int64) * stride_do[2]
        p_head_grads, p_head_weights = p_grads + i_group, p_weights + i_group
        for i_rung in tl.range(0, tl.load(p_set), loop_unroll_factor=UNROLL):
            near = tl.load(p_set + 1 + i_rung)
            first = first_query + near
            m_query = (first + o_tile).to(tl.uint32) < tl.cast(tokens, tl.uint32)
            o_entry = (tl.cast(i_rung, tl.int64 if WIDE else tl.int32) * tokens + first + o_tile) * GROUP
            b_ds = tl.load(p_head_grads + o_entry, mask=m_query, other=0.0).to(tl.float32)
            b_p = tl.load(p_head_weights + o_entry, mask=m_query, other=0.0).to(tl.float32)
            # Where there is no query another one's row is read, for its weight is 0: no mask is faster than one.
            o_query = tl.minimum(tl.maximum(first + o_tile, 0), tokens - 1)
            p_q_tile = p_head_q + (row_starts(o_query, stride_q[1], WIDE)[:, None] + o_size[None, :])
            p_do_tile = p_head_do + (row_starts(o_query, stride_do[1], WIDE)[:, None] + o_size[None, :])
            if SIZE == BD:
                b_q = tl.load(p_q_tile).to(tl.float32)
                b_do = tl.load(p_do_tile).to(tl.float32)
            else:
                b_q = tl.load(p_q_tile, mask=m_size[None, :], other=0.0).to(tl.float32)
                b_do = tl.load(p_do_tile, mask=m_size[None, :], other=0.0).to(tl.float32)
            if LEARNED:
                b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_query)
                # A document's first key has none before it.
                b_f = tl.where(b_limit == near, 0.0, tl.load(p_fractions + i_rung))
                b_dk_before += ((b_ds * b_f)[:, None] * b_q).to(SUMS)
                b_dv_before += ((b_p * b_f)[:, None] * b_do).to(SUMS)
                b_ds *= 1.0 - b_f
                b_p *= 1.0 - b_f
            b_dk += (b_ds[:, None] * b_q).to(SUMS)
            b_dv += (b_p[:, None] * b_do).to(SUMS)

    if LEARNED:
        o_next = tl.broadcast_to(tl.minimum(o_tile + 1, BN - 1)[:, None], [BN, BP])
        b_dk += tl.gather(b_dk_before, o_next, 0)
        b_dv += tl.gather(b_dv_before, o_next, 0)
    o_key = i_block * OWN + o_tile
    m_tile = ((o_key < keys) & (o_tile < OWN))[:, None] & m_size[None, :]
    p_dk += i_batch * stride_dk[0] + i_head * stride_dk[2]
    p_dv += i_batch * stride_dv[0] + i_head * stride_dv[2]
    p_dk_tile = p_dk + (row_starts(o_key, stride_dk[1], WIDE)[:, None] + o_size[None, :])
    p_dv_tile = p_dv + (row_starts(o_key, stride_dv[1], WIDE)[:, None] + o_size[None, :])
    tl.store(p_dk_tile, b_dk.to(p_dk.dtype.element_ty), mask=m_tile)
    tl.store(p_dv_tile, b_dv.to(p_dv.dtype.element_ty), mask=m_tile)


@launch.kernel
def window_grad_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse,
    p_grad_lse,
    p_delta,
    p_positions,
    p_dk,
    p_dv,
    scale,
    tokens,
    keys,
    window,
    kv_heads,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
    stride_positions,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    AFTER_RUNGS: tl.constexpr,
):
    """One program: the gradients of `BN` keys and values of one KV head, from the window and what the rungs left."""
    BM: tl.constexpr = BR // GP
    i_block, i_head, i_batch = place(kv_heads)
    p_q += i_batch * stride_q[0] + i_head * GROUP * stride_q[2]
    p_do += i_batch * stride_do[0] + i_head * GROUP * stride_do[2]
    p_k += i_batch * stride_k[0] + i_head * stride_k[2]
    p_v += i_batch * stride_v[0] + i_head * stride_v[2]
    p_lse += (i_batch * kv_heads + i_head) * GROUP * tokens
    p_delta += (i_batch * kv_heads + i_head) * GROUP * tokens
    if p_grad_lse is not None:
        p_grad_lse += (i_batch * kv_heads + i_head) * GROUP * tokens
    past = keys - tokens
    o_key = i_block * BN + tl.arange(0, BN)
    m_key = o_key < keys
    b_k = load_rows(p_k, o_key, stride_k[1], m_key, SIZE, BD, WIDE)
    b_v = load_rows(p_v, o_key, stride_v[1], m_key, SIZE, BD, WIDE)
    SUMS: tl.constexpr = tl.float64 if EXACT else tl.float32
    b_dk = tl.zeros([BN, BD], SUMS)
    b_dv = tl.zeros([BN, BD], SUMS)

    begin = tl.maximum(i_block * BN - past, 0)
    end = tl.minimum(i_block * BN - past + BN + tl.minimum(window, keys), tokens)
    for start in range(begin, end, BM):
        o_query, o_group, m_row = block_rows(start, tokens, BR, GP, GROUP)
        b_q = query_rows(p_q, o_query, o_group, stride_q, m_row, SIZE, BD, WIDE)
        b_do = query_rows(p_do, o_query, o_group, stride_do, m_row, SIZE, BD, WIDE)
        o_lse = row_starts(o_group, tokens, WIDE) + o_query
        b_limit = query_limit(p_positions, stride_positions, i_batch, o_query, past, m_row)
        b_distance = (o_query + past)[None, :] - o_key[:, None]
        m_entry = (b_distance >= 0) & (b_distance <= window) & (b_distance <= b_limit[None, :])
        b_dk, b_dv = add_rows(
            *(b_dk, b_dv, b_k, b_v, b_q, b_do, p_lse, p_delta, o_lse, m_row, m_entry, scale, EXACT, p_grad_lse)
        )

    b_dk *= scale
    p_dk += i_batch * stride_dk[0] + i_head * stride_dk[2]
    p_dv += i_batch * stride_dv[0] + i_head * stride_dv[2]
    if AFTER_RUNGS:
        b_dk += scale * load_rows(p_dk, o_key, stride_dk[1], m_key, SIZE, BD, WIDE).to(SUMS)
        b_dv += load_rows(p_dv, o_key, stride_dv[1], m_key, SIZE, BD, WIDE).to(SUMS)
    store_rows(p_dk, b_dk, o_key, stride_dk[1], m_key, SIZE, BD, WIDE)
    store_rows(p_dv, b_dv, o_key, stride_dv[1], m_key, SIZE, BD, WIDE)


@triton.jit
def add_rows(
    b_dk, b_dv, b_k, b_v, b_q, b_do, p_lse, p_delta, o_lse, m_row, m_entry, scale, EXACT: tl.constexpr, p_grad_lse=None
):
    """The gradients of keys, before the scale, and of values, [BN, BD] each, with those from a tile of rows added."""
    b_lse = tl.load(p_lse + o_lse, mask=m_row, other=NO_ROW)
    b_delta = tl.load(p_delta + o_lse, mask=m_row, other=0.0)
    b_s = scaled_scores(row_products(b_k, b_q, EXACT), scale, EXACT)
    b_p = tl.where(m_entry, softmax_weights(b_s, b_lse[None, :], EXACT), 0.0)
    b_dv = add_product(b_dv, b_p.to(b_do.dtype), b_do)
    b_dp = row_products(b_v, b_do, EXACT)
    b_dp -= b_delta[None, :]
    if p_grad_lse is not None:
        b_dp += tl.load(p_grad_lse + o_lse, mask=m_row, other=0.0).to(tl.float32)[None, :]
    return add_product(b_dk, (b_p * b_dp).to(b_q.dtype), b_q), b_dv


@triton.jit
def add_product(b_sum, b_left, b_right):
    """`b_sum + b_left @ b_right`, in the precision of the sum."""
    if b_sum.dtype == tl.float32:
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision="ieee")
    else:
        b_sum += tl.dot(b_left, b_right, input_precision="ieee").to(b_sum.dtype)
    return b_sum
