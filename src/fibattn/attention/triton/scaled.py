"""A learned scale: its rungs resolved on the device, its gradient gathered, the kernels called with both.

The scale never comes to the host. One small program resolves every rung in float64 exactly as
`fibattn.pattern.interpolate` does, drops what is dropped there, and writes the table of near offsets and the
fractions that the kernels read; rungs between two keys are pairs of neighbouring far rows, and the logit
is linear in their two dot products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import common
from fibattn.attention.triton.backward import backward
from fibattn.attention.triton.common import Columns
from fibattn.attention.triton.decode import decode
from fibattn.attention.triton.forward import forward
from fibattn.errors import InputError

UNREACHABLE = tl.constexpr(common.UNREACHABLE)
_EXACT = 2**53


@dataclass(frozen=True)
class Resolved:
    """The kept rungs of a scale, on the device: for the row kernels, for the key kernel, and the rungs (R,)."""

    columns: Columns
    table: Tensor
    fractions: Tensor
    kept: Tensor


def scaled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    scale: float,
    window: int,
    alpha: Tensor,
    rungs: Sequence[int],
    max_offset: int,
) -> tuple[Tensor, Tensor]:
    """Output like q, and the natural log-sum-exp (B, Hq, Tq)."""
    found = resolve(alpha, tuple(rungs), window, max_offset, common.shape_of(q, k).batch_queries)
    return forward(q, k, v, positions, scale, found.columns)


def scaled_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    scale: float,
    window: int,
    alpha: Tensor,
    rungs: Sequence[int],
    max_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and alpha."""
    found = resolve(alpha, tuple(rungs), window, max_offset, common.shape_of(q, k).batch_queries)
    inputs = (grad_out, grad_lse, out, lse, q, k, v, positions, scale, found.columns, found.table, found.fractions)
    dq, dk, dv, partial = backward(*inputs)
    assert partial is not None
    grad_alpha = torch.empty_like(alpha, memory_format=torch.contiguous_format)
    programs = partial.shape[1]
    alpha_grad_kernel[(1,)](partial, found.kept, found.table, grad_alpha, programs, BLOCK=1024, num_warps=8)
    return dq, dk, dv, grad_alpha


def scaled_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_positions: Tensor,
    positions: Tensor | None,
    scale: float,
    window: int,
    alpha: Tensor,
    rungs: Sequence[int],
    max_offset: int,
) -> Tensor:
    """Output like q; writes k and v into the rings."""
    found = resolve(alpha, tuple(rungs), window, max_offset, common.shape_of(q, k).batch_queries)
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions)
    return decode(*cached, scale, window, found.table, found.fractions)


@cache
def _rung_table(rungs: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rungs, dtype=torch.float64).to(device)


def resolve(alpha: Tensor, rungs: tuple[int, ...], window: int, max_offset: int, batch_queries: int) -> Resolved:
    """The kept rungs of a scale, as `fibattn.pattern.interpolate` gives them, without a word to the host."""
    if rungs and rungs[-1] >= _EXACT:
        raise InputError(f"the last rung is {rungs[-1]}; rungs must be below {_EXACT}")
    base = _rung_table(rungs, alpha.device)
    rung = common.interpolated_columns(batch_queries)
    # No tile may have columns of both kinds.
    near = common.near_columns(window, batch_queries, max(16, rung))
    width = common.columns_width(near + len(rungs) * rung)
    integers = torch.empty(2 + len(rungs) + 2 * width, dtype=torch.int32, device=alpha.device)
    reals = torch.empty(len(rungs) + width, dtype=torch.float32, device=alpha.device)
    kept = torch.empty_like(base)
    table, columns = integers[None, : 1 + len(rungs)], integers[None, 1 + len(rungs) :]
    fractions, column_fractions = reals[: len(rungs)], reals[len(rungs) :]
    resolve_kernel[(1,)](
        *(alpha, base, table, columns, fractions, column_fractions, kept),
        *(len(rungs), window, max_offset, near),
        BQ=batch_queries,
        RB=rung,
        WIDTH=width,
        WIDTH2=triton.next_power_of_2(width),
        SIZE=max(16, triton.next_power_of_2(len(rungs))),
        num_warps=8,
    )
    return Resolved(Columns(columns, column_fractions, window, near, rung), table, fractions, kept)


@triton.jit(do_not_specialize=["rungs", "window", "max_offset", "near"])
def resolve_kernel(
    p_alpha,
    p_base,
    p_table,
    p_columns,
    p_fractions,
    p_column_fractions,
    p_kept,
    rungs,
    window,
    max_offset,
    near,
    BQ: tl.constexpr,
    RB: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH2: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`fibattn.pattern.interpolate` and the table of columns in one program."""
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
    m_same = (b_near[:, None] == b_near[None, :]) & (o_rung[None, :] < o_rung[:, None]) & m_keep[None, :]
    m_keep = m_keep & (tl.sum(m_same.to(tl.int32), 1) == 0)
    o_place = tl.sum((m_keep[None, :] & (o_rung[None, :] < o_rung[:, None])).to(tl.int32), 1)
    count = tl.sum(m_keep.to(tl.int32), 0)
    # A scale that is no finite number above 0 cannot be refused here; it must not give plausible numbers.
    b_fraction = tl.where(good, b_fraction, float("nan")).to(tl.float32)
    b_near = b_near.to(tl.int32)
    tl.store(p_table, count)
    tl.store(p_table + 1 + o_place, b_near, mask=m_keep)
    tl.store(p_fractions + o_place, b_fraction, mask=m_keep)
    tl.store(p_kept + o_place, b_base, mask=m_keep)

    o_column = tl.arange(0, WIDTH2)
    m_far = o_column >= near
    o_slot = (o_column - near) % RB
    m_pick = m_keep[None, :] & (o_place[None, :] == ((o_column - near) // RB)[:, None]) & m_far[:, None]
    m_used = (tl.sum(m_pick.to(tl.int32), 1) > 0) & (o_slot <= BQ)
    b_shift = tl.where(m_far, tl.sum(tl.where(m_pick, b_near[None, :], 0), 1) + 1 - o_slot, o_column - (BQ - 1))
    # A column of the window counts for the queries from which its distance is within the window.
    o_query = tl.arange(0, BQ)
    b_near_distance = (o_column - (BQ - 1))[:, None] + o_query[None, :]
    m_near = (b_near_distance >= 0) & (b_near_distance <= window)
    b_near_bits = tl.sum(tl.where(m_near, 1 << o_query[None, :], 0), 1)
    b_bits = tl.where(m_far, 0, b_near_bits)
    b_shift = tl.where(m_far & (m_used == 0), UNREACHABLE, b_shift)
    b_column_fraction = tl.sum(tl.where(m_pick, b_fraction[None, :], 0.0), 1)
    m_column = o_column < WIDTH
    tl.store(p_columns, near + count * RB)
    tl.store(p_columns + 1 + o_column, b_shift, mask=m_column)
    tl.store(p_columns + 1 + WIDTH + o_column, b_bits, mask=m_column)
    tl.store(p_column_fractions + o_column, b_column_fraction, mask=m_column)


@triton.jit(do_not_specialize=["programs"])
def alpha_grad_kernel(p_partial, p_kept, p_table, p_grad, programs, BLOCK: tl.constexpr):
    """The gradient of alpha: every rung's partial sums, added in a fixed order, times the rung."""
    total = tl.zeros([BLOCK], tl.float64)
    for i_rung in range(tl.load(p_table)):
        b_sum = tl.zeros([BLOCK], tl.float64)
        for start in range(0, programs, BLOCK):
            o_program = start + tl.arange(0, BLOCK)
            o_entry = tl.cast(i_rung, tl.int64) * programs + o_program
            b_sum += tl.load(p_partial + o_entry, mask=o_program < programs, other=0.0)
        total += b_sum * tl.load(p_kept + i_rung)
    tl.store(p_grad, tl.sum(total, 0).to(p_grad.dtype.element_ty))
