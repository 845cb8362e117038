"""A learned scale: its rungs resolved on the device, its gradient gathered, the kernels called with both.

The scale never comes to the host. One small program resolves every rung in float64 exactly as
`fibattn.pattern.interpolate` does, drops what is dropped there, and writes the near offsets and the fractions that
the kernels read; rungs between two keys are pairs of neighbouring far rows, and the logit is linear in their two
dot products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fibattn.attention.triton import shape
from fibattn.attention.triton.backward import backward
from fibattn.attention.triton.columns import MOST_RUNGS, Columns, fixed_columns, kept_on_device
from fibattn.attention.triton.decode import decode
from fibattn.attention.triton.forward import forward
from fibattn.errors import InputError

UNREACHABLE = tl.constexpr(shape.UNREACHABLE)
_EXACT = 2**53


@dataclass(frozen=True)
class Resolved:
    """The kept rungs of a scale, on the device: their number and near offsets, fractions, and the rungs themselves."""

    table: Tensor
    fractions: Tensor
    factors: Tensor


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
    columns = interpolated_columns(q, k, window, resolve(alpha, tuple(rungs), window, max_offset))
    return forward(q, k, v, positions, scale, columns)


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
    found = resolve(alpha, tuple(rungs), window, max_offset)
    columns = interpolated_columns(q, k, window, found)
    inputs = (grad_out, grad_lse, out, lse, q, k, v, positions, scale, columns, found.table)
    dq, dk, dv, partial = backward(*inputs)
    assert partial is not None
    return dq, dk, dv, partial.sum(dtype=torch.float64).to(alpha.dtype).reshape(alpha.shape)


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
    found = resolve(alpha, tuple(rungs), window, max_offset)
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions)
    return decode(*cached, scale, window, found.table, found.fractions)


def interpolated_columns(q: Tensor, k: Tensor, window: int, found: Resolved) -> Columns:
    """The window's columns, and beside them the rungs."""
    near = fixed_columns(q, k, window, ((),))
    return replace(near, rungs=found.table, fractions=found.fractions, factors=found.factors)


@cache
def _rung_table(rungs: tuple[int, ...], device: torch.device) -> Tensor:
    return kept_on_device(rungs, torch.float64, device)


def resolve(alpha: Tensor, rungs: tuple[int, ...], window: int, max_offset: int) -> Resolved:
    """The kept rungs of a scale, as `fibattn.pattern.interpolate` gives them, without a word to the host."""
    if rungs and rungs[-1] >= _EXACT:
        raise InputError(f"the last rung is {rungs[-1]}; rungs must be below {_EXACT}")
    base = _rung_table(rungs, alpha.device)
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
    return Resolved(table[:, : 1 + len(rungs)], fractions, factors)


@triton.jit(do_not_specialize=["rungs", "window", "max_offset"])
def resolve_kernel(p_alpha, p_base, p_table, p_fractions, p_factors, rungs, window, max_offset, SIZE: tl.constexpr):
    """`fibattn.pattern.interpolate` in one program: near offsets, fractions and rungs, those kept before the others."""
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
    # A scale that is no finite number above 0 cannot be refused here; it must not give plausible numbers.
    b_fraction = tl.where(good, b_fraction, float("nan"))
    tl.store(p_table, count)
    tl.store(p_table + 1 + o_place, tl.where(m_keep, b_near, UNREACHABLE).to(tl.int32))
    tl.store(p_fractions + o_place, tl.where(m_keep, b_fraction, 0.0).to(tl.float32))
    tl.store(p_factors + o_place, b_base.to(tl.float32))
