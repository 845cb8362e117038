"""Fixed offsets: their columns put on the device once, the kernels called with them."""

from torch import Tensor

from fibattn.attention.triton.backward import backward
from fibattn.attention.triton.columns import fixed_columns, offset_table
from fibattn.attention.triton.decode import decode
from fibattn.attention.triton.forward import forward

Sets = tuple[tuple[int, ...], ...]
"""The offsets of every KV head, or the one set that all share."""


def fixed_forward(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, scale: float, window: int, sets: Sets
) -> tuple[Tensor, Tensor]:
    """Output like q, and the natural log-sum-exp (B, Hq, Tq)."""
    return forward(q, k, v, positions, scale, fixed_columns(q, k, window, sets))


def fixed_backward(
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
    sets: Sets,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    columns, table = fixed_columns(q, k, window, sets), offset_table(sets, q.device)
    return backward(grad_out, grad_lse, out, lse, q, k, v, positions, scale, columns, table)[:3]


def fixed_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_positions: Tensor,
    positions: Tensor | None,
    scale: float,
    window: int,
    sets: Sets,
) -> Tensor:
    """Output like q; writes k and v into the rings."""
    cached = (q, k_cache, v_cache, k, v, cache_positions, positions)
    return decode(*cached, scale, window, offset_table(sets, q.device))
