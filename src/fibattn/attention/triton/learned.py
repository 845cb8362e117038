"""A learned alpha: its rungs resolved on the device, and how kernels read rungs that lie between two keys.

Alpha never comes to the host. One small program resolves every rung in float64 exactly as `LearnedPattern.at` does,
drops what is dropped there, and writes the near offsets and the fractions that the kernels read.

In a kernel such rungs are in no table of columns: their `BQ` columns follow from the near offset, and each stands for
two keys, the near one and the one before it. The logit is linear in the two dot products, so a tile of rungs is two
products, of which the fraction makes one.
"""

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import launch, shape
from fibattn.attention.triton.columns import Columns, fixed_columns, kept_on_device, offset_table, rows_of
from fibattn.attention.triton.rows import load_rows, query_limit
from fibattn.attention.triton.scores import row_products
from fibattn.errors import InputError

UNREACHABLE = tl.constexpr(shape.UNREACHABLE)
_EXACT = 2**53

MOST_RUNGS = 16
"""No tile has more rungs than this: so far past the last one tiles may read."""


def columns_of(
    q: Tensor, k: Tensor, alpha: Tensor | None, window: int, sets: tuple[tuple[int, ...], ...], max_offset: int
) -> Columns:
    """The columns of a call; with an alpha those of the window, and beside them the rungs."""
    if alpha is None:
        return fixed_columns(q, k, window, sets)
    rungs, fractions, factors = resolve(alpha, sets[0], window, max_offset)
    return replace(fixed_columns(q, k, window, ((),)), rungs=rungs, fractions=fractions, factors=factors)


def rungs_of(
    q: Tensor, alpha: Tensor | None, window: int, sets: tuple[tuple[int, ...], ...], max_offset: int
) -> tuple[Tensor, Tensor | None]:
    """The rungs of a call and, with an alpha, their fractions, as `Columns` has them."""
    return (offset_table(sets, q.device), None) if alpha is None else resolve(alpha, sets[0], window, max_offset)[:2]


@cache
def _base_rungs(rungs: tuple[int, ...], device: torch.device) -> Tensor:
    return kept_on_device(rungs, torch.float64, device)


def resolve(alpha: Tensor, rungs: tuple[int, ...], window: int, max_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kept rungs, as `LearnedPattern.at` gives them, without a word to the host.

    Their number and near offsets, their fractions, and the base rungs themselves, as `Columns` has them.
    """
    if rungs and rungs[-1] >= _EXACT:
        raise InputError(f"the last rung is {rungs[-1]}; rungs must be below {_EXACT}")
    base = _base_rungs(rungs, alpha.device)
    # The kernels' tiles read past the last rung.
    size = triton.next_power_of_2(len(rungs) + MOST_RUNGS)
    table = torch.empty(1, 1 + size, dtype=torch.int32, device=alpha.device)
    fractions, factors = torch.empty(2, size, dtype=torch.float32, device=alpha.device)
    resolve_kernel[(1,)](
        *(alpha, base, table, fractions, factors, len(rungs), window, max_offset),
        SIZE=size,
        # A fraction is that of the rounded product, as on the host.
        enable_fp_fusion=False,
        num_warps=4,
    )
    return table[:, : 1 + len(rungs)], fractions, factors


@launch.kernel
def resolve_kernel(p_alpha, p_base, p_table, p_fractions, p_factors, rungs, window, max_offset, SIZE: tl.constexpr):
    """`LearnedPattern.at` in one program: near offsets, fractions and rungs, those kept before the others."""
    o_rung = tl.arange(0, SIZE)
    m_rung = o_rung < rungs
    alpha = tl.load(p_alpha).to(tl.float64)
    good = (alpha > 0) & (alpha < float("inf"))
    b_base = tl.load(p_base + o_rung, mask=m_rung, other=0.0)
    b_distance = tl.where(good, alpha, 1.0) * b_base
    b_distance = tl.minimum(b_distance, 1 << 30)
    b_near = tl.floor(b_distance)
    b_fraction = b_distance - b_near
    # Half to even: up where the fraction is beyond a half, or a half and the floor odd.
    b_odd = b_near.to(tl.int64) % 2 == 1
    b_up = (b_fraction > 0.5) | ((b_fraction == 0.5) & b_odd)
    b_round = b_near + tl.where(b_up, 1.0, 0.0)
    m_keep = m_rung & (b_round > window) & (b_near <= max_offset)
    # Of several rungs between the same two keys the first is kept.
    m_before = o_rung[None, :] < o_rung[:, None]
    m_same = (b_near[:, None] == b_near[None, :]) & m_before & m_keep[None, :]
    m_keep = m_keep & (tl.sum(m_same.to(tl.int32), 1) == 0)
    b_kept_before = tl.sum((m_before & m_keep[None, :]).to(tl.int32), 1)
    count = tl.sum(m_keep.to(tl.int32), 0)
    o_place = tl.where(m_keep, b_kept_before, count + o_rung - b_kept_before)
    # An alpha that is no finite number above 0 cannot be refused here; it must not give plausible numbers.
    b_fraction = tl.where(good, b_fraction, float("nan"))
    tl.store(p_table, count)
    tl.store(p_table + 1 + o_place, tl.where(m_keep, b_near, UNREACHABLE).to(tl.int32))
    tl.store(p_fractions + o_place, tl.where(m_keep, b_fraction, 0.0).to(tl.float32))
    tl.store(p_factors + o_place, b_base.to(tl.float32))


@triton.jit
def column_limit(
    p_positions, stride, i_batch, i_block, tokens, past, NB: tl.constexpr, BQ: tl.constexpr, C: tl.constexpr
):
    """Key index of the query of each column of a tile of rungs for each batch, and how far back it may look. [NB, C]"""
    o_query = (i_block * NB + tl.arange(0, NB)[:, None]) * BQ + (tl.arange(0, C) % BQ)[None, :]
    m_query = o_query < tokens
    b_limit = query_limit(p_positions, stride, i_batch, o_query, past, m_query)
    return o_query + past, tl.where(m_query, b_limit, -1)


@triton.jit
def rung_tile(
    p_k,
    p_v,
    stride_kt,
    stride_vt,
    p_rungs,
    p_fractions,
    first,
    o_own,
    b_reach,
    BQ: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of rungs: which columns have a key [NB, C], the fractions [1, 1, C], keys and values, near then far.

    [NB, C, BD] each of the four.
    """
    b_distance = rung_values(p_rungs + 1, first, o_own.shape[1], BQ)[None, :]
    m_key = b_distance <= b_reach
    o_near = o_own - b_distance
    # The first key of a document has none before it: it is interpolated with itself.
    o_far = tl.where(b_distance < b_reach, o_near - 1, o_near)
    b_k = load_rows(p_k, o_near, stride_kt, m_key, SIZE, BD, WIDE)
    b_v = load_rows(p_v, o_near, stride_vt, m_key, SIZE, BD, WIDE)
    b_k_far = load_rows(p_k, o_far, stride_kt, m_key, SIZE, BD, WIDE)
    b_v_far = load_rows(p_v, o_far, stride_vt, m_key, SIZE, BD, WIDE)
    return m_key, rung_values(p_fractions, first, o_own.shape[1], BQ)[None, None, :], b_k, b_v, b_k_far, b_v_far


@triton.jit
def rung_mask(m_key, ROWS: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr):
    """Which entries of a tile of rungs count. [NB, ROWS, C]"""
    o_slot = tl.arange(0, m_key.shape[1]) % BQ
    return rows_of(tl.where(m_key, 1 << o_slot[None, :], 0), ROWS, GP)


@triton.jit
def rung_values(p_x, first, C: tl.constexpr, BQ: tl.constexpr):
    """What a table of rungs has for each column of a tile of them. [C]"""
    return tl.load(p_x + first + tl.arange(0, C) // BQ)


@triton.jit
def rung_products(b_x, b_near, b_far, b_fraction, EXACT: tl.constexpr):
    """Products of rows [NB, R, BD] with what lies between near and far, and their slopes. [NB, R, C] each"""
    b_products = row_products(b_x, b_near, EXACT)
    b_slope = row_products(b_x, b_far, EXACT) - b_products
    return b_products + b_fraction * b_slope, b_slope


@triton.jit
def add_rungs(b_sum, b_weight, b_near, b_far, b_fraction):
    """The sum and what lies between near and far [NB, C, BD], weighted [NB, R, C]. [NB, R, BD]"""
    b_weight_far = b_weight * b_fraction
    b_sum = tl.dot((b_weight - b_weight_far).to(b_near.dtype), b_near, b_sum, input_precision="ieee")
    return tl.dot(b_weight_far.to(b_far.dtype), b_far, b_sum, input_precision="ieee")
