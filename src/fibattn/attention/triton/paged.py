"""The kernel for pages: the newest tokens of several sequences, a step or a chunk of each, against a common cache.

A program has a KV head and up to `BQ` tokens of one sequence that follow each other; its rows are those of `rows.py`.
Its columns are the keys from the newest back to the end of the first token's window, or the first key, then for each
rung one key a token, `BN` at a time. Where tokens begin, how long sequences are and where pages lie is read from the
device, and the grid depends on shapes alone, so that a captured CUDA graph serves any mix of as many tokens and
sequences.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch
from fibattn.attention.triton.columns import row_stride
from fibattn.attention.triton.decode import tiles_for
from fibattn.attention.triton.rows import load_rows
from fibattn.attention.triton.scores import LOG2E, NO_SCORE, softmax_step
from fibattn.attention.triton.shape import Shape, shape_of


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    first: Tensor | None,
    longest: int,
    out: Tensor,
    scale: float,
    window: int,
    rungs: Tensor,
    fractions: Tensor | None = None,
) -> Tensor:
    """Fill `out`, like q (T, Hq, D); pages (P, rows, Hkv, D); the rest as in `paged.Batch`, rungs as in `Columns`."""
    shape = shape_of(q[None], k_pages)
    sequences, kv_heads, rows = lengths.shape[0], k_pages.shape[2], k_pages.shape[1]
    options = options_for(shape, window, longest, rungs.shape[1] > 1, table is not None)
    blocks = sequences if longest == 1 else q.shape[0] // options["BQ"] + sequences
    with launch.Explained(shape):
        paged_kernel[(blocks * kv_heads,)](
            *(q, k_pages, v_pages, out, starts, lengths, table, first, rungs, fractions),
            *(scale, window, sequences, rows, kv_heads, row_stride(rungs), 0 if table is None else table.stride(0)),
            *(q.stride(), k_pages.stride()[:3], v_pages.stride()[:3], out.stride()),
            **options,
        )
    return out


def options_for(shape: Shape, window: int, longest: int, has_rungs: bool, has_table: bool) -> dict[str, Any]:
    """What the kernel is compiled for; a wide window's keys serve more rows."""
    columns, stages = tiles_for(shape, window)
    # Triton shares the stages among loads that wait for each other, and a key waits for its page.
    stages += (stages - 1) * (has_table and not has_rungs)
    tokens = 1 if longest == 1 else max(1, (64 if window >= 64 else 16) // shape.padded_group)
    sizes = {"BQ": tokens, "GP": shape.padded_group, "ROWS": max(16, tokens * shape.padded_group)}
    sizes |= {"BN": max(columns, tokens), "STEPS": longest == 1, "RUNGS": has_rungs}
    return {**launch.of_shape(shape), **sizes, "num_warps": 4, "num_stages": stages}


@launch.kernel
def paged_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_starts,
    p_lengths,
    p_table,
    p_first,
    p_rungs,
    p_fractions,
    scale,
    window,
    sequences,
    rows,
    kv_heads,
    stride_set,
    stride_table,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    RUNGS: tl.constexpr,
):
    """One program: one KV head, `BQ` tokens of one sequence."""
    i_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    i_block = tl.program_id(0) // kv_heads
    if STEPS:
        i_sequence, start, before, new = i_block, i_block, 0, 1
    else:
        i_sequence = sequence_of(p_starts, i_block, sequences, BQ)
        start = tl.load(p_starts + i_sequence)
        before = (i_block - i_sequence - start // BQ) * BQ
        new = tl.load(p_starts + i_sequence + 1) - start
    length = tl.load(p_lengths + i_sequence)
    if (before >= new) | (length == 0):
        return
    # The position of the program's first token, and of its row's.
    position = length - new + before
    o_row = tl.arange(0, ROWS)
    o_token = o_row // GP
    m_row = (o_token < tl.minimum(BQ, new - before)) & (o_row % GP < GROUP)
    o_head = i_head * GROUP + o_row % GP
    p_k += i_head * stride_k[2]
    p_v += i_head * stride_v[2]
    p_set = p_rungs + i_head * stride_set
    if p_table is not None:
        p_table += i_sequence.to(tl.int64) * stride_table
        first = 0
    else:
        first = tl.load(p_first + i_sequence)

    o_query = (start + before + o_token).to(tl.int64) * stride_q[0] + o_head * stride_q[1]
    b_q = load_rows(p_q, o_query, 1, m_row, SIZE, BD, True)
    b_max = tl.full([ROWS], NO_SCORE, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BD], tl.float32)
    near = tl.minimum(window, position) + BQ
    count = near + BQ * tl.load(p_set)
    for column in range(0, count, BN):
        o_column = column + tl.arange(0, BN)
        m_rung = RUNGS & (o_column >= near) & (o_column < count)
        o_rung, o_slot = (o_column - near) // BQ, (o_column - near) % BQ
        b_offset = tl.load(p_set + 1 + o_rung, mask=m_rung, other=0)
        o_key = position + tl.where(m_rung, o_slot - b_offset, BQ - 1 - o_column)
        m_key = (o_key >= 0) & (o_key < length) & (o_column < count)
        b_distance = position + o_token[:, None] - o_key[None, :]
        m_near = (b_distance >= 0) & (b_distance <= window) & ~m_rung[None, :]
        m_entry = m_key[None, :] & (m_near | (m_rung[None, :] & (o_slot[None, :] == o_token[:, None])))
        b_k = key_rows(p_k, p_table, first, o_key, rows, stride_k, m_key, SIZE, BD)
        b_v = key_rows(p_v, p_table, first, o_key, rows, stride_v, m_key, SIZE, BD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if p_fractions is not None:
            # The first key of a sequence has none before it to interpolate with.
            m_far = m_key & m_rung & (o_key > 0)
            b_k_far = key_rows(p_k, p_table, first, o_key - 1, rows, stride_k, m_far, SIZE, BD)
            b_v_far = key_rows(p_v, p_table, first, o_key - 1, rows, stride_v, m_far, SIZE, BD)
            b_f = tl.load(p_fractions + o_rung, mask=m_far, other=0.0)[None, :]
            b_s_far = tl.dot(b_q, tl.trans(b_k_far), input_precision="ieee")
            b_s = b_s + b_f * (b_s_far - b_s)
        b_s = tl.where(m_entry, b_s * (scale * LOG2E), -float("inf"))
        b_p, b_shrink, b_max, b_sum = softmax_step(b_s, b_max, b_sum, False)
        b_acc = b_acc * b_shrink[:, None]
        if p_fractions is not None:
            b_p_far = b_p * b_f
            b_acc = tl.dot(b_p_far.to(b_v_far.dtype), b_v_far, b_acc, input_precision="ieee")
            b_p = b_p - b_p_far
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")

    o_size = tl.arange(0, BD)
    o_out = (start + before + o_token).to(tl.int64) * stride_o[0] + o_head * stride_o[1]
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_out[:, None] + o_size[None, :], b_out, mask=m_row[:, None] & (o_size < SIZE)[None, :])


@triton.jit
def sequence_of(p_starts, i_block, sequences, BQ: tl.constexpr):
    """The sequence that a block of tokens belongs to, when each may leave a block unfinished and one unused."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(p_starts + middle) // BQ + middle <= i_block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def key_rows(p_x, p_table, first, o_key, rows, stride, m_key, SIZE: tl.constexpr, BD: tl.constexpr):
    """The rows of keys, wherever their pages lie. [BN, BD]"""
    if p_table is not None:
        b_page = tl.load(p_table + o_key // rows, mask=m_key, other=0).to(tl.int64)
        o_start = b_page * stride[0] + (o_key % rows).to(tl.int64) * stride[1]
    else:
        o_start = (first + o_key).to(tl.int64) * stride[1]
    return load_rows(p_x, o_start, 1, m_key, SIZE, BD, True)


def store(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write k and v (T, Hkv, D) into pages (P, rows, Hkv, D), at page * rows + row; those below 0 nowhere."""
    tokens, heads, size = k.shape
    store_kernel[(tokens * heads,)](
        *(k, v, k_pages, v_pages, slots, heads, k_pages.shape[1]),
        *(k.stride()[:2], v.stride()[:2], k_pages.stride()[:3], v_pages.stride()[:3]),
        SIZE=size,
        BD=triton.next_power_of_2(size),
        num_warps=1,
    )


@launch.kernel
def store_kernel(
    p_k,
    p_v,
    p_k_pages,
    p_v_pages,
    p_slots,
    heads,
    rows,
    stride_k,
    stride_v,
    stride_k_pages,
    stride_v_pages,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
):
    """One program: one token, one KV head."""
    i_token, i_head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.load(p_slots + i_token).to(tl.int64)
    if slot < 0:
        return
    page, row = slot // rows, slot % rows
    o_size = tl.arange(0, BD)
    m_size = o_size < SIZE
    b_k = tl.load(p_k + i_token * stride_k[0] + i_head * stride_k[1] + o_size, mask=m_size)
    b_v = tl.load(p_v + i_token * stride_v[0] + i_head * stride_v[1] + o_size, mask=m_size)
    p_k_row = p_k_pages + page * stride_k_pages[0] + row * stride_k_pages[1] + i_head * stride_k_pages[2]
    p_v_row = p_v_pages + page * stride_v_pages[0] + row * stride_v_pages[1] + i_head * stride_v_pages[2]
    tl.store(p_k_row + o_size, b_k, mask=m_size)
    tl.store(p_v_row + o_size, b_v, mask=m_size)
