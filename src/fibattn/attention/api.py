"""The public operator: check what was given, choose a backend, call it.

An explicit backend is never replaced by another; `auto` takes the linear-time backend of the device and says so once,
at debug level.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Literal, TypedDict, Unpack, get_args, overload

import torch
from torch import Tensor

from fibattn.attention import ops, ring
from fibattn.attention.checks import check_pattern, check_positions, check_rings, check_tensors, under_autocast
from fibattn.attention.documents import readable
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern, reach_of

Backend = Literal["auto", "reference", "cpu", "triton"]
_log = logging.getLogger("fibattn")


class _How(TypedDict, total=False):
    alpha: Tensor | None
    scale: float | None
    positions: Tensor | None
    cu_seqlens: Tensor | None
    backend: Backend


_Distances = Pattern | Sequence[Pattern] | LearnedPattern


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: _Distances, *, return_lse: Literal[False] = False, **how: Unpack[_How]
) -> Tensor: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: _Distances, *, return_lse: Literal[True], **how: Unpack[_How]
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Sequence[Pattern] | LearnedPattern,
    *,
    alpha: Tensor | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of q, k, v (batch, tokens, heads, head size) to the distances of `pattern`.

    The operator of arXiv 2606.28560, section 3. Query heads share KV heads in groups of `query heads / KV heads`. Any
    strides are taken as they are as long as the last dimension is contiguous. With fewer queries than keys, the
    queries are the last tokens. Under autocast q, k and v are cast to its dtype, as PyTorch's attention casts them.

    Gradients are of first order (`torch.func` included), in reverse; others are refused, but by the reference. Values
    must be finite: one that is not may reach tokens that do not attend to it, as in PyTorch's masked attention.

    Args:
        q: (batch, query tokens, query heads, head size).
        k, v: (batch, key tokens, KV heads, head size), of the dtype and device of `q`.
        pattern: the distances: one `Pattern` for all KV heads, or a sequence with one for each, whose windows agree;
            or a `LearnedPattern`, whose rungs are at the real-valued distances `alpha * rung`.
        alpha: with a `LearnedPattern`, a floating-point tensor of one element on the device of `q`, finite and
            above 0; it has a gradient. None with a `Pattern`. On a GPU, where the value is not
            checked, an impossible one gives NaN.
        scale: multiplies the dot products; `head size ** -0.5` when None.
        positions: integer (batch or 1, query tokens), each query's position inside its document; a query
            never looks farther back than that. For packed documents and padding. Values are not checked on
            a GPU, which would stall it.
        cu_seqlens: integer (documents + 1,), where packed documents begin and the last one ends, as an
            alternative to `positions` for a batch of one. Documents may be empty.
        return_lse: also return the natural log-sum-exp of the scaled dot products, float32 (float64 for
            float64 input), (batch, query heads, query tokens). It is differentiable.
        backend: `reference` (any device, quadratic), `cpu`, `triton` (an NVIDIA GPU; on the CPU only in
            Triton's interpreter, for tests), or `auto`.

    Returns:
        (batch, query tokens, query heads, head size), in the dtype of `q`; with `return_lse` a pair.

    Raises:
        InputError: (a ValueError) for shapes, dtypes, devices or values outside the above.
    """
    q, k, v = under_autocast(q, k, v)
    scale = check_tensors(q, k, v, scale)
    patterns = check_pattern(pattern, alpha, q, k.shape[2])
    positions = check_positions(q, k, positions, cu_seqlens)
    out, lse = ops.attend(q, k, v, alpha, positions, scale, patterns, choose(backend, q))
    return (out, lse) if return_lse else out


def attend_cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Sequence[Pattern] | LearnedPattern,
    *,
    cache_positions: Tensor,
    alpha: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`attend` for the next tokens of a sequence whose earlier ones are in a ring, which receives the new ones.

    Token `p` stands in row `p mod rows`. Chunks may have any length; a chunk of one is a single kernel, whose
    time does not depend on how long the sequence is. The rings are written in place, outside of autograd;
    gradients reach q, k, v and alpha of this call. Under autocast q, k and v are cast to the dtype of the rings.

    Args:
        q: (batch, new tokens, query heads, head size).
        k_cache, v_cache: (batch, rows, KV heads, head size), zeros at first; at least `reach + 1` rows, or as
            many as the sequence has tokens after this call. `reach` is the pattern's, the farthest of several. With
            too few a GPU returns NaN.
        k, v: (batch, new tokens, KV heads, head size).
        pattern, alpha, scale, backend: as in `attend`. Where the ring is too short for an alpha above the pattern's
            `largest_alpha`, the CPU refuses it; a GPU returns NaN there, and of several tokens anywhere.
        cache_positions: integer (batch or 1, new tokens), how many tokens came before each new one since the
            ring was new; goes up by one. Values are not checked on a GPU, which would stall it.
        positions: integer (batch or 1, new tokens), each new token's position inside its document, for padding
            on the left; `cache_positions` when None.

    Returns:
        (batch, new tokens, query heads, head size), in the dtype of `q`.

    Raises:
        InputError: (a ValueError) as in `attend`, for a ring of another shape or with too few rows, and for
            positions that do not go up by one.
    """
    q, k, v = under_autocast(q, k, v, k_cache.dtype)
    scale = check_tensors(q, k, v, scale)
    patterns = check_pattern(pattern, alpha, q, k.shape[2])
    positions = check_positions(q, k, positions, None)
    reach = reach_of(patterns, float(alpha) if alpha is not None and readable(alpha) else 0.0)
    check_rings(q, (k_cache, v_cache), k, cache_positions, reach)
    chosen = choose(backend, q)
    if not is_step(chosen, q, k, v, alpha):
        if isinstance(patterns, LearnedPattern) and alpha is not None and not readable(alpha):
            alpha = alpha.masked_fill(alpha > patterns.largest_alpha, torch.nan)
        keys, values, limit = _take((k_cache, v_cache), (k, v), cache_positions, positions, reach)
        limit = check_positions(q, keys, limit, None)
        return ops.attend(q, keys, values, alpha, limit, scale, patterns, chosen)[0]
    rings = (q, k_cache, v_cache, k, v, cache_positions)
    given = (scale, *ops.as_integers(patterns), ops.interpreted(chosen, q))
    return torch.ops.fibattn.attend_step(*rings, alpha, positions, *given)


def is_step(backend: str, q: Tensor, *others: Tensor | None) -> bool:
    """Whether the one-token kernel applies; it knows no gradients."""
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *others))
    return q.shape[1] == 1 and backend != "reference" and not differentiable


def _take(
    rings: Sequence[Tensor], chunk: Sequence[Tensor], cache_positions: Tensor, positions: Tensor | None, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that a chunk may attend to, how far back each query may look; the rings take the chunk."""
    rows = rings[0].shape[1]
    earlier = [ring.before(cache, cache_positions, min(reach, rows)) for cache in rings]
    # A compiler would make a graph for each side of a comparison of lengths, and so one for every reach.
    if not readable(cache_positions) and (torch.compiler.is_compiling() or rows < reach):
        # Too few rows cannot be refused here; they must not give plausible numbers.
        lost = (cache_positions[:, :1].clamp(max=reach) > rows)[..., None, None]
        earlier = [x.masked_fill(lost, torch.nan) for x in earlier]
    keys, values = (torch.cat(pair, dim=1) for pair in zip(earlier, chunk, strict=True))
    return keys, values, ring.write(rings, chunk, cache_positions, positions)


def choose(backend: Backend, q: Tensor) -> str:
    """The backend that a call will take.

    Raises:
        InputError: for an unknown one, or one that does not run on the device of `q`.
    """
    if backend not in get_args(Backend):
        raise InputError(f"unknown backend {backend!r}; the backends are {', '.join(get_args(Backend))}")
    if backend == "reference":
        return backend
    device = q.device.type
    # On the meta device there are shapes and nothing to compute.
    chosen = {"cpu": "cpu", "meta": "cpu", "cuda": "triton"}.get(device) if backend == "auto" else backend
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if chosen == "cpu" and device not in ("cpu", "meta"):
        raise InputError(f"backend 'cpu' runs on the CPU, not on {q.device}; use 'auto' or 'triton'")
    if chosen == "triton" and device != "cuda" and not interpreted:
        raise InputError(
            f"backend 'triton' runs on an NVIDIA GPU, not on {q.device}; use 'auto', "
            "or set TRITON_INTERPRET=1 to test the kernels on the CPU"
        )
    if chosen is None:
        raise InputError(f"no backend for {q.device}; backend='reference' runs anywhere, in quadratic time")
    if not torch.compiler.is_compiling():
        _say(chosen, device)
    return chosen


@cache
def _say(backend: str, device: str) -> None:
    _log.debug("backend %r for %s tensors", backend, device)
