"""What the operators call: a pattern's columns and rungs put on the device, the kernels called with them."""

import torch
from torch import Tensor

from fibattn.attention.triton.backward import backward
from fibattn.attention.triton.columns import Columns, fixed_columns, offset_table
from fibattn.attention.triton.decode import decode
from fibattn.attention.triton.forward import forward
from fibattn.attention.triton.learned import learned_columns, resolve

Sets = tuple[tuple[int, ...], ...]
"""The offsets of every KV head, or the one set that all share; with an alpha the base rungs."""


def attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int,
    sets: Sets,
    max_offset: int,
) -> tuple[Tensor, Tensor]:
    """Output like q, and the natural log-sum-exp (B, Hq, Tq)."""
    return forward(q, k, v, positions, scale, columns_of(q, k, alpha, window, sets, max_offset))


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int,
    sets: Sets,
    max_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and alpha."""
    columns = columns_of(q, k, alpha, window, sets, max_offset)
    dq, dk, dv, partial = backward(grad_out, grad_lse, out, lse, q, k, v, positions, scale, columns)
    if alpha is None or partial is None:
        return dq, dk, dv, None
    return dq, dk, dv, partial.sum(dtype=torch.float64).to(alpha.dtype).reshape(alpha.shape)


def attend_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_positions: Tensor,
    alpha: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int,
    sets: Sets,
    max_offset: int,
) -> Tensor:
    """Output like q; writes k and v into the rings."""
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions, scale, window)
    if alpha is None:
        return decode(*cached, offset_table(sets, q.device))
    found = resolve(alpha, sets[0], window, max_offset)
    return decode(*cached, found.rungs, found.fractions)


def columns_of(q: Tensor, k: Tensor, alpha: Tensor | None, window: int, sets: Sets, max_offset: int) -> Columns:
    """The columns of a call and its rungs."""
    if alpha is None:
        return fixed_columns(q, k, window, sets)
    return learned_columns(q, k, window, resolve(alpha, sets[0], window, max_offset))
