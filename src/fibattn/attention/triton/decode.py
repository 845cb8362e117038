"""The decode kernel: one new token of every sequence against its ring, written and attended in one launch.

A program has one sequence and one KV head. The query heads of the group are the rows of its products, the
query's distances (window, then rungs) the columns, `BN` at a time: a layer of the paper's takes one pass,
at any length of context. Only a wide window, such as a bounded full layer's, is split over programs, for one would
go through it in a row, and a second launch adds up what they found. Positions are read from the device, and nothing
else changes from token to token, so that a captured CUDA graph goes on for ever.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.columns import row_stride
from fibattn.attention.triton.rows import load_rows, store_rows
from fibattn.attention.triton.scores import LOG2E, NO_SCORE, softmax_step
from fibattn.attention.triton.shape import Shape, shape_of

_WIDE, _PART, _MOST_PARTS, _MOST_PROGRAMS = 256, 128, 64, 128


def tiles_for(shape: Shape, window: int) -> tuple[int, int]:
    """Columns of a pass, and passes in flight: at most 99 KB of shared memory, also with rungs between two keys."""
    row = shape.padded_size * shape.dtype.itemsize
    columns = 32 if window < 32 else 64
    while columns > 16 and columns * row > 2**13:
        columns //= 2
    return columns, 3 if columns * row <= 2**13 else 1


def splits_for(window: int, programs: int) -> int:
    """Over how many programs each of so many shares out its columns, a power of two.

    One, where the window is not wide, or there are already as many programs as a large GPU runs side by side.
    """
    if window < _WIDE:
        return 1
    # Not by Triton's own functions, which take the host ten times as long: every token of every layer asks.
    parts, programs = (1 << (count - 1).bit_length() for count in (launch.blocks(window + 1, _PART), programs))
    return max(1, min(parts, _MOST_PARTS, _MOST_PROGRAMS // programs))


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_positions: Tensor,
    positions: Tensor | None,
    scale: float,
    window: int,
    rungs: Tensor,
    fractions: Tensor | None = None,
) -> Tensor:
    """Output like q (B, 1, Hq, D); writes k and v (B, 1, Hkv, D) into the rings (B, rows, Hkv, D)."""
    shape = shape_of(q, k)
    batch, kv_heads = k.shape[0], k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    columns, stages = tiles_for(shape, window)
    splits, part = splits_for(window, batch * kv_heads), None
    if splits > 1:
        part = q.new_empty((batch, q.shape[2], splits, shape.padded_size + 2), dtype=torch.float32)
    with launch.Explained(shape):
        decode_kernel[(batch * kv_heads, splits)](
            *(q, k_cache, v_cache, k, v, out, part, cache_positions, positions, rungs, fractions),
            *(scale, k_cache.shape[1], window, kv_heads, row_stride(rungs)),
            *(row_stride(cache_positions), row_stride(positions)),
            *launch.strides(k_cache, v_cache, q, k, v, out),
            ROWS=shape.rows,
            BN=columns,
            SPLITS=splits,
            **launch.of_shape(shape),
            num_warps=4,
            num_stages=stages,
        )
        if splits > 1:
            sizes = {"SIZE": shape.size, "BD": shape.padded_size, "SPLITS": splits}
            join_kernel[(batch * q.shape[2],)](part, out, **sizes, num_warps=4)
    return out


@launch.kernel
def decode_kernel(
    p_q,
    p_k_cache,
    p_v_cache,
    p_k,
    p_v,
    p_out,
    p_part,
    p_cache_positions,
    p_positions,
    p_rungs,
    p_fractions,
    scale,
    rows,
    window,
    kv_heads,
    stride_set,
    stride_cache_positions,
    stride_positions,
    stride_k_cache,
    stride_v_cache,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: one sequence, one KV head, and of the columns one of so many parts."""
    i_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    p_k_cache += i_batch * stride_k_cache[0] + i_head * stride_k_cache[2]
    p_v_cache += i_batch * stride_v_cache[0] + i_head * stride_v_cache[2]
    p_set = p_rungs + i_head * stride_set
    position, inside = token_place(p_cache_positions, stride_cache_positions, p_positions, stride_positions, i_batch)
    limit, own = tl.minimum(position, inside), position % rows

    o_size = tl.arange(0, BD)
    m_size = o_size < SIZE
    b_k_own = tl.load(p_k + i_batch * stride_k[0] + i_head * stride_k[2] + o_size, mask=m_size, other=0.0)
    b_v_own = tl.load(p_v + i_batch * stride_v[0] + i_head * stride_v[2] + o_size, mask=m_size, other=0.0)
    m_store = o_size < tl.where(tl.program_id(1) == 0, SIZE, 0)
    tl.store(p_k_cache + own * stride_k_cache[1] + o_size, b_k_own, mask=m_store)
    tl.store(p_v_cache + own * stride_v_cache[1] + o_size, b_v_own, mask=m_store)

    o_group = tl.arange(0, ROWS)
    m_group = o_group < GROUP
    b_q = load_rows(p_q + i_batch * stride_q[0], i_head * GROUP + o_group, stride_q[2], m_group, SIZE, BD, True)
    b_max = tl.full([ROWS], NO_SCORE, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BD], tl.float32)
    count = window + 1 + tl.load(p_set)
    span = tl.cdiv(tl.cdiv(count, BN), SPLITS) * BN
    begin = tl.program_id(1) * span
    for first in range(begin, tl.minimum(count, begin + span), BN):
        o_column = first + tl.arange(0, BN)
        o_rung = o_column - window - 1
        m_rung = (o_rung >= 0) & (o_column < count)
        b_offset = tl.load(p_set + 1 + o_rung, mask=m_rung, other=0)
        b_distance = tl.where(m_rung, b_offset, o_column).to(tl.int64)
        m_column = (o_column < count) & (b_distance <= limit)
        # What was stored above may not be visible yet to the threads that would load it: distance 0 stays here.
        m_cached, m_own = m_column & (b_distance > 0) & (b_distance < rows), (b_distance == 0)[:, None]
        o_row = ring_row(own, b_distance, rows)
        b_k = ring_tile(p_k_cache, o_row, stride_k_cache[1], m_cached, b_k_own, m_own, SIZE, BD)
        b_v = ring_tile(p_v_cache, o_row, stride_v_cache[1], m_cached, b_v_own, m_own, SIZE, BD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if p_fractions is not None:
            # The first key of a document has none before it to interpolate with.
            m_between = m_rung & (b_distance < limit)
            m_far = m_between & (b_distance + 1 < rows)
            o_row = ring_row(own, b_distance + 1, rows)
            b_k_far = load_rows(p_k_cache, o_row, stride_k_cache[1], m_far, SIZE, BD, True)
            b_v_far = load_rows(p_v_cache, o_row, stride_v_cache[1], m_far, SIZE, BD, True)
            b_f = tl.load(p_fractions + o_rung, mask=m_far, other=0.0)
            # A rung beyond the ring cannot be refused here; it must not give plausible numbers.
            b_f = tl.where(m_between & ~m_far, float("nan"), b_f)[None, :]
            b_s_far = tl.dot(b_q, tl.trans(b_k_far), input_precision="ieee")
            b_s = b_s + b_f * (b_s_far - b_s)
        b_s = tl.where(m_column[None, :], b_s * (scale * LOG2E), -float("inf"))
        # Nor must a token that the ring has overwritten.
        b_s = tl.where((m_column & (b_distance >= rows))[None, :], float("nan"), b_s)
        b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, False)
        b_acc = b_acc * b_shrink[:, None]
        if p_fractions is not None:
            b_p_far = b_p * b_f
            b_acc = tl.dot(b_p_far.to(b_v_far.dtype), b_v_far, b_acc, input_precision="ieee")
            b_p = b_p - b_p_far
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")

    o_head = i_head * GROUP + o_group
    if SPLITS == 1:
        store_rows(p_out + i_batch * stride_o[0], b_acc / b_sum[:, None], o_head, stride_o[2], m_group, SIZE, BD, True)
    else:
        o_part = (i_batch * kv_heads * GROUP + o_head) * SPLITS + tl.program_id(1)
        store_rows(p_part, b_acc, o_part, BD + 2, m_group, BD, BD, True)
        tl.store(p_part + o_part * (BD + 2) + BD, b_max, mask=m_group)
        tl.store(p_part + o_part * (BD + 2) + BD + 1, b_sum, mask=m_group)


@triton.jit
def join_kernel(p_part, p_out, SIZE: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr):
    """One program: the parts of one sequence and query head."""
    i_row = tl.program_id(0).to(tl.int64)
    o_part = tl.arange(0, SPLITS)
    p_part += i_row * SPLITS * (BD + 2)
    b_acc = load_rows(p_part, o_part, BD + 2, o_part >= 0, BD, BD, True)
    b_max = tl.load(p_part + o_part * (BD + 2) + BD)
    b_sum = tl.load(p_part + o_part * (BD + 2) + BD + 1)
    b_share = tl.exp2(b_max - tl.max(b_max, 0))
    b_out = tl.sum(b_acc * b_share[:, None], 0) / tl.sum(b_sum * b_share, 0)
    o_size = tl.arange(0, BD)
    tl.store(p_out + i_row * SIZE + o_size, b_out.to(p_out.dtype.element_ty), mask=o_size < SIZE)


@triton.jit
def token_place(p_cache_positions, stride_cache_positions, p_positions, stride_positions, i_batch):
    """Where the new token is in its sequence, and in its document."""
    position = tl.load(p_cache_positions + i_batch * stride_cache_positions).to(tl.int64)
    inside = position
    if p_positions is not None:
        inside = tl.load(p_positions + i_batch * stride_positions).to(tl.int64)
    return position, inside


@triton.jit
def ring_tile(p_cache, o_row, stride, m_cached, b_own, m_own, SIZE: tl.constexpr, BD: tl.constexpr):
    """Rows of a ring, and the new token's own where they say so. [BN, BD]"""
    return tl.where(m_own, b_own[None, :], load_rows(p_cache, o_row, stride, m_cached, SIZE, BD, True))


@triton.jit
def ring_row(own, b_distance, rows):
    """The row of the token so far before the one in row `own`; at most one turn back."""
    b_row = own - b_distance
    return tl.where(b_row < 0, b_row + rows, b_row)
