"""The public operator: check what was given, choose a backend, call it.

Messages name the value, what is allowed and what to do. An explicit backend is never replaced by another;
`auto` takes the linear-time backend of the device and says so once, at debug level.
"""

import logging
import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from fibattn.attention import ops, reference, ring
from fibattn.errors import InputError, whole_number
from fibattn.pattern import Pattern

Backend = Literal["auto", "reference", "cpu", "triton"]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_log = logging.getLogger("fibattn")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Sequence[Pattern],
    *,
    scale: float | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of every query to the distances of `pattern` (arXiv 2606.28560, section 3).

    Query heads share KV heads in groups of `query heads / KV heads`. Any strides are taken as they are as
    long as the last dimension is contiguous. With fewer queries than keys, the queries are the last tokens.

    Args:
        q: (batch, query tokens, query heads, head size).
        k, v: (batch, key tokens, KV heads, head size), of the dtype and device of `q`.
        pattern: the distances, one pattern for all KV heads or a sequence with one for each; their windows agree.
        scale: multiplies the dot products; `head size ** -0.5` when None.
        positions: integer (batch or 1, query tokens), each query's position inside its document; a query
            never looks farther back than that. For packed documents and padding. Values are not checked on
            a GPU, which would stall it.
        cu_seqlens: integer (documents + 1,), where packed documents begin and the last one ends, as an
            alternative to `positions` for a batch of one.
        return_lse: also return the natural log-sum-exp of the scaled dot products, float32 (float64 for
            float64 input), (batch, query heads, query tokens). It is differentiable.
        backend: `reference` (any device, quadratic), `cpu`, `triton` (an NVIDIA GPU; on the CPU only in
            Triton's interpreter, for tests), or `auto`.

    Returns:
        (batch, query tokens, query heads, head size), in the dtype of `q`; with `return_lse` a pair.

    Raises:
        InputError: (a ValueError) for shapes, dtypes, devices or values outside the above.
    """
    scale = _check_tensors(q, k, v, scale)
    patterns = _check_patterns(pattern, k.shape[2])
    positions = _document_positions(q, k, positions, cu_seqlens)
    chosen = _choose(backend, q)
    if chosen == "reference":
        out, lse = reference.attend(q, k, v, patterns, scale, positions)
    else:
        offsets = [offset for one in patterns for offset in one.offsets]
        sizes = [len(one.offsets) for one in patterns]
        interpret = chosen == "triton" and q.device.type == "cpu"
        out, lse = ops.Attend.apply(q, k, v, positions, scale, patterns[0].window, offsets, sizes, interpret)
    return (out, lse) if return_lse else out


def attend_scaled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    rungs: Sequence[int],
    alpha: Tensor,
    *,
    max_offset: int | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention to a window and to rungs at the real-valued distances `alpha * rung`.

    A rung between two keys reads their linear interpolation, so that `alpha` has a gradient (paper,
    section 3.4); `fibattn.pattern.interpolate` says which rungs are kept. Everything else is as in `attend`.

    Args:
        q, k, v, scale, positions, cu_seqlens, return_lse, backend: as in `attend`.
        window: distances 0 … window are always attended.
        rungs: the base sequence, positive and strictly increasing.
        alpha: a floating-point tensor with one element on the device of `q`; finite and above 0.
        max_offset: rungs whose nearer key is farther than this are dropped; None keeps all.

    Raises:
        InputError: (a ValueError) as in `attend`, and for a bad window, rung or alpha.
    """
    scale = _check_tensors(q, k, v, scale)
    _check_scaled(q, window, rungs, alpha, max_offset)
    positions = _document_positions(q, k, positions, cu_seqlens)
    chosen = _choose(backend, q)
    if chosen == "reference":
        out, lse = reference.attend_scaled(q, k, v, window, rungs, alpha, scale, positions, max_offset)
    else:
        limit = ops.NO_LIMIT if max_offset is None else max_offset
        interpret = chosen == "triton" and q.device.type == "cpu"
        out, lse = ops.AttendScaled.apply(q, k, v, positions, scale, window, alpha, list(rungs), limit, interpret)
    return (out, lse) if return_lse else out


def attend_cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Sequence[Pattern],
    *,
    cache_positions: Tensor,
    positions: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`attend` for the next tokens of a sequence whose earlier ones are in a ring, which receives the new ones.

    Token `p` stands in row `p mod rows`. Chunks may have any length; a chunk of one is a single kernel, whose
    time does not depend on how long the sequence is. The rings are written in place, outside of autograd;
    gradients reach q, k and v of this call.

    Args:
        q: (batch, new tokens, query heads, head size).
        k_cache, v_cache: (batch, rows, KV heads, head size), zeros at first; at least `reach + 1` rows, or as
            many as the sequence has tokens after this call. With too few a GPU returns NaN.
        k, v: (batch, new tokens, KV heads, head size).
        pattern, scale, backend: as in `attend`.
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
    scale = _check_tensors(q, k, v, scale)
    patterns = _check_patterns(pattern, k.shape[2])
    positions = _document_positions(q, k, positions, None)
    reach = max(one.reach for one in patterns)
    _check_rings(q, k_cache, v_cache, k, cache_positions, reach)
    chosen = _choose(backend, q)
    if not _is_step(chosen, q, k, v):
        keys, values, limit = _take(k_cache, v_cache, k, v, cache_positions, positions, reach)
        out = attend(q, keys, values, patterns, scale=scale, positions=limit, backend=backend)
        assert isinstance(out, Tensor)
        return out
    offsets = [offset for one in patterns for offset in one.offsets]
    sizes = [len(one.offsets) for one in patterns]
    interpret = chosen == "triton" and q.device.type == "cpu"
    rings = (q, k_cache, v_cache, k, v, cache_positions, positions)
    return torch.ops.fibattn.attend_step(*rings, scale, patterns[0].window, offsets, sizes, interpret)


def attend_scaled_cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    rungs: Sequence[int],
    alpha: Tensor,
    *,
    reach: int,
    cache_positions: Tensor,
    max_offset: int | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`attend_scaled` from a ring; see `attend_cached`.

    Args:
        window, rungs, alpha, max_offset: as in `attend_scaled`.
        reach: the farthest distance that `alpha` can ask for, of the farther of a rung's two keys; the rings
            have at least one row more (`fibattn.pattern.scaled_reach`). It is for the caller to see that
            alpha keeps to it: the CPU refuses one that does not, a GPU returns NaN.
        q, k_cache, v_cache, k, v, cache_positions, positions, scale, backend: as in `attend_cached`.

    Raises:
        InputError: (a ValueError) as in `attend_scaled` and `attend_cached`.
    """
    scale = _check_tensors(q, k, v, scale)
    positions = _document_positions(q, k, positions, None)
    _check_scaled(q, window, rungs, alpha, max_offset)
    _check_rings(q, k_cache, v_cache, k, cache_positions, reach)
    chosen = _choose(backend, q)
    if not _is_step(chosen, q, k, v, alpha):
        keys, values, limit = _take(k_cache, v_cache, k, v, cache_positions, positions, reach)
        how = {"max_offset": max_offset, "scale": scale, "positions": limit, "backend": backend}
        out = attend_scaled(q, keys, values, window, rungs, alpha, **how)
        assert isinstance(out, Tensor)
        return out
    limit = ops.NO_LIMIT if max_offset is None else max_offset
    interpret = chosen == "triton" and q.device.type == "cpu"
    rings = (q, k_cache, v_cache, k, v, cache_positions, positions)
    return torch.ops.fibattn.attend_scaled_step(*rings, scale, window, alpha, list(rungs), limit, interpret)


def _is_step(backend: str, q: Tensor, *others: Tensor) -> bool:
    """Whether the one-token kernel applies; it knows no gradients."""
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *others))
    return q.shape[1] == 1 and backend != "reference" and not differentiable


def _take(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_positions: Tensor,
    positions: Tensor | None,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that a chunk may attend to, how far back each query may look; the ring takes the chunk."""
    rows = k_cache.shape[1]
    earlier = [ring.before(cache, cache_positions, min(reach, rows)) for cache in (k_cache, v_cache)]
    if rows < reach and not _readable(cache_positions):
        # Too few rows cannot be refused here; they must not give plausible numbers.
        lost = (cache_positions[:, :1] > rows)[..., None, None]
        earlier = [x.masked_fill(lost, torch.nan) for x in earlier]
    keys, values = (torch.cat(pair, dim=1) for pair in zip(earlier, (k, v), strict=True))
    ring.store(k_cache, k, cache_positions)
    ring.store(v_cache, v, cache_positions)
    return keys, values, cache_positions if positions is None else torch.minimum(cache_positions, positions)


def _check_rings(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, cache_positions: Tensor, reach: int) -> None:
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (k.shape[0], *k.shape[2:]):
            raise InputError(
                f"{name} has shape {tuple(x.shape)}; for keys of shape {tuple(k.shape)} expected "
                f"({k.shape[0]}, rows, {k.shape[2]}, {k.shape[3]}): is it the cache of another model?"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise InputError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; make them agree")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise InputError(f"{name} has strides {x.stride()}; the last dimension must be contiguous")
        if x.shape[1] < 1 or x.shape[1] != k_cache.shape[1]:
            raise InputError(f"{name} has {x.shape[1]} rows and k_cache {k_cache.shape[1]}; give as many, at least 1")
    if k.shape[1] != q.shape[1]:
        raise InputError(f"{q.shape[1]} query tokens and {k.shape[1]} new keys; with a cache they are the same tokens")
    if cache_positions.dtype not in (torch.int32, torch.int64) or cache_positions.device != q.device:
        found = f"{cache_positions.dtype} on {cache_positions.device}"
        raise InputError(f"cache_positions are {found}; expected integers on {q.device}")
    if cache_positions.shape not in ((1, q.shape[1]), (q.shape[0], q.shape[1])):
        found = tuple(cache_positions.shape)
        raise InputError(f"cache_positions have shape {found}; expected ({q.shape[0]} or 1, {q.shape[1]})")
    if _readable(cache_positions):
        if int(cache_positions.min()) < 0:
            raise InputError(f"cache_positions go down to {int(cache_positions.min())}; the first token has position 0")
        if bool((cache_positions.diff(dim=1) != 1).any()):
            raise InputError(
                f"cache_positions are {cache_positions.tolist()}; they must go up by one from token to token"
            )
        tokens, rows = int(cache_positions.max()) + 1, k_cache.shape[1]
        if rows < min(reach + 1, tokens):
            needed = f"a reach of {reach} needs {reach + 1}, or one for each of the {tokens} tokens"
            raise InputError(f"the rings have {rows} rows; {needed}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(f"{name} has shape {tuple(x.shape)}; expected (batch, tokens, heads, head size)")
        if x.dtype not in _DTYPES:
            raise InputError(f"{name} is {x.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
        if x.dtype != q.dtype or x.device != q.device:
            raise InputError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; make them agree")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise InputError(f"{name} has strides {x.stride()}; the last dimension must be contiguous, copy it first")
    if k.shape != v.shape:
        raise InputError(f"k is {tuple(k.shape)} and v is {tuple(v.shape)}; their shapes must be equal")
    batch, tokens, heads, size = q.shape
    if k.shape[0] != batch or k.shape[3] != size:
        raise InputError(f"q is {tuple(q.shape)} and k is {tuple(k.shape)}; batch and head size must be equal")
    if batch == 0 or size == 0:
        raise InputError(f"q is {tuple(q.shape)}; batch and head size must be at least 1")
    if heads == 0 or k.shape[2] == 0 or heads % k.shape[2]:
        raise InputError(f"{heads} query heads do not divide into {k.shape[2]} KV heads; use a multiple of them")
    if tokens == 0 or tokens > k.shape[1]:
        raise InputError(
            f"{tokens} query tokens and {k.shape[1]} key tokens; queries are the last of the keys, at least 1"
        )
    # Not math.isfinite: under torch.compile(dynamic=True) a number is a symbol, and only a comparison can be traced.
    if scale is not None and not -math.inf < scale < math.inf:
        raise InputError(f"scale is {scale}; it must be finite, or None for head size ** -0.5")
    return size**-0.5 if scale is None else scale


def _check_scaled(q: Tensor, window: int, rungs: Sequence[int], alpha: Tensor, max_offset: int | None) -> None:
    Pattern.scaled(window, (), max_offset=max_offset)
    if not isinstance(alpha, Tensor):
        raise InputError(f"alpha is {alpha!r}; give a tensor with one floating-point number, on {q.device}")
    if any(whole_number("rung", rung) <= before for before, rung in zip((0, *rungs), rungs, strict=False)):
        raise InputError(f"rungs are {list(rungs)}; they must be positive and strictly increasing")
    if alpha.numel() != 1 or not alpha.is_floating_point() or alpha.device != q.device:
        found = f"{tuple(alpha.shape)} {alpha.dtype} on {alpha.device}"
        raise InputError(f"alpha is {found}; it must be one floating-point number on {q.device}")


def _check_patterns(pattern: Pattern | Sequence[Pattern], kv_heads: int) -> tuple[Pattern, ...]:
    patterns = tuple(pattern) if isinstance(pattern, Sequence) else (pattern,)
    if not all(isinstance(one, Pattern) for one in patterns):
        raise InputError(f"pattern is {pattern!r}; expected a fibattn.Pattern or a sequence of them")
    if len(patterns) not in (1, kv_heads):
        raise InputError(f"{len(patterns)} patterns for {kv_heads} KV heads; give one, or one for each")
    windows = sorted({one.window for one in patterns})
    if len(windows) != 1:
        raise InputError(f"the patterns have windows {windows}; KV heads of one layer must share their window")
    return patterns


def _document_positions(q: Tensor, k: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """`positions` as int32 (batch or 1, query tokens), made from `cu_seqlens` where that was given."""
    if cu_seqlens is not None:
        if positions is not None:
            raise InputError("both positions and cu_seqlens were given; they say the same, give one")
        return _positions_from_boundaries(q, k, cu_seqlens)
    if positions is None:
        return None
    if not isinstance(positions, Tensor):
        raise InputError(f"positions are a {type(positions).__name__}; give a tensor of integers on {q.device}")
    if positions.dtype not in (torch.int32, torch.int64) or positions.device != q.device:
        raise InputError(f"positions are {positions.dtype} on {positions.device}; expected integers on {q.device}")
    if positions.ndim != 2 or positions.shape[0] not in (1, q.shape[0]) or positions.shape[1] != q.shape[1]:
        raise InputError(f"positions have shape {tuple(positions.shape)}; expected ({q.shape[0]} or 1, {q.shape[1]})")
    if _readable(positions) and int(positions.min()) < 0:
        raise InputError(f"positions go down to {int(positions.min())}; a position inside a document is 0 or more")
    return positions.clamp(max=torch.iinfo(torch.int32).max).to(torch.int32)


def _positions_from_boundaries(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    tokens = q.shape[1]
    if q.shape[0] != 1 or k.shape[1] != tokens:
        raise InputError(
            f"cu_seqlens needs a batch of one with as many keys as queries, not {q.shape[0]} × {tokens} queries "
            f"and {k.shape[1]} keys; pack the documents into one row, or give positions"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != q.device:
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise InputError(f"cu_seqlens is {found}; expected integers (documents + 1,) on {q.device}")
    if _readable(cu_seqlens):
        values = cu_seqlens.tolist()
        increasing = all(a < b for a, b in pairwise(values))
        if len(values) < 2 or values[0] != 0 or values[-1] != tokens or not increasing:
            raise InputError(f"cu_seqlens is {values}; it must increase strictly from 0 to the {tokens} tokens")
    index = torch.arange(tokens, device=q.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return (index - cu_seqlens[document]).to(torch.int32)[None]


def _readable(x: Tensor) -> bool:
    """Whether looking at the values is free: not on a GPU, which would stall, nor while compiling."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _choose(backend: Backend, q: Tensor) -> str:
    if backend not in get_args(Backend):
        raise InputError(f"unknown backend {backend!r}; the backends are {', '.join(get_args(Backend))}")
    if backend == "reference":
        return backend
    device = q.device.type
    chosen = {"cpu": "cpu", "cuda": "triton"}.get(device) if backend == "auto" else backend
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if chosen == "cpu" and device != "cpu":
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
