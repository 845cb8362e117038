"""What the operator refuses. Messages name the value, what is allowed and what to do."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fibattn.attention.documents import packed_positions, readable
from fibattn.attention.reference import Patterns
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern

_MOST_HEADS = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def under_autocast(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of autocast, or in `dtype`, where it is on, as for PyTorch's attention; float64 stays."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is a {type(x).__name__}; give a tensor (batch, tokens, heads, head size)")
    device = q.device.type
    # Not `is_autocast_available`, which older versions of the compiler cannot trace.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device) if dtype is None else dtype
    q, k, v = (x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in (q, k, v))
    return q, k, v


def check_tensors(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """Shapes, dtypes and devices of a call; returns the scale of its dot products."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(f"{name} has shape {tuple(x.shape)}; expected (batch, tokens, heads, head size)")
        if x.dtype not in _DTYPES:
            raise InputError(f"{name} is {x.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
        _check_like(q, name, x)
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
            f"{tokens} query tokens and {k.shape[1]} key tokens; queries are the last of the keys, at least 1. "
            "The layout is (batch, tokens, heads, head size)"
        )
    if heads > _MOST_HEADS and heads > tokens:
        raise InputError(
            f"q is {tuple(q.shape)}, {tokens} tokens with {heads} heads; the layout is (batch, tokens, heads, head "
            "size), not (batch, heads, tokens, head size) as in scaled_dot_product_attention: call transpose(1, 2)"
        )
    if isinstance(scale, Tensor | str):
        raise InputError(f"scale is a {type(scale).__name__}; give a number, which has no gradient, or scale q")
    # Not math.isfinite: under torch.compile(dynamic=True) a number is a symbol, and only a comparison can be traced.
    if scale is not None and not -math.inf < scale < math.inf:
        raise InputError(f"scale is {scale}; it must be finite, or None for head size ** -0.5")
    return size**-0.5 if scale is None else scale


def _check_like(q: Tensor, name: str, x: Tensor) -> None:
    if x.dtype != q.dtype or x.device != q.device:
        raise InputError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; make them agree")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise InputError(f"{name} has strides {x.stride()}; the last dimension must be contiguous, copy it first")


def patterns_of(pattern: Pattern | Sequence[Pattern] | LearnedPattern) -> Patterns:
    """The pattern, or those of the KV heads, a single one alike whether it comes alone or in a sequence."""
    if isinstance(pattern, LearnedPattern):
        return pattern
    patterns = tuple(pattern) if isinstance(pattern, Sequence) else (pattern,)
    if not all(isinstance(one, Pattern) for one in patterns):
        raise InputError(f"pattern is {pattern!r}; expected a fibattn.Pattern, a sequence of them or a LearnedPattern")
    return patterns


def check_pattern(
    pattern: Pattern | Sequence[Pattern] | LearnedPattern, alpha: Tensor | None, q: Tensor, kv_heads: int
) -> Patterns:
    """The pattern, or one for every KV head; with an alpha where it learns one, and without where it does not."""
    patterns = patterns_of(pattern)
    if isinstance(patterns, LearnedPattern):
        if not isinstance(alpha, Tensor):
            wanted = f"give a tensor with one floating-point number, on {q.device}"
            raise InputError(f"alpha is {alpha!r}; a LearnedPattern reads at alpha times its rungs: {wanted}")
        if alpha.numel() != 1 or not alpha.is_floating_point() or alpha.device != q.device:
            found = f"{tuple(alpha.shape)} {alpha.dtype} on {alpha.device}"
            raise InputError(f"alpha is {found}; it must be one floating-point number on {q.device}")
        return patterns
    if alpha is not None:
        raise InputError("alpha was given, but a Pattern's offsets are fixed; give a LearnedPattern, or leave it out")
    if len(patterns) != 1 and len(patterns) != kv_heads:  # not `not in`: sizes may be a compiler's symbols
        raise InputError(f"{len(patterns)} patterns for {kv_heads} KV heads; give one, or one for each")
    windows = sorted({one.window for one in patterns})
    if len(windows) != 1:
        raise InputError(f"the patterns have windows {windows}; KV heads of one layer must share their window")
    return patterns


def check_positions(q: Tensor, k: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """`positions` as int32 (batch or 1, query tokens), made from `cu_seqlens` where that was given."""
    if cu_seqlens is not None:
        if positions is not None:
            raise InputError("both positions and cu_seqlens were given; they say the same, give one")
        if q.shape[0] != 1 or k.shape[1] != q.shape[1]:
            raise InputError(
                f"cu_seqlens needs a batch of one with as many keys as queries, not {q.shape[0]} × {q.shape[1]} "
                f"queries and {k.shape[1]} keys; pack the documents into one row, or give positions"
            )
        _check_tensor(q, "cu_seqlens", cu_seqlens)
        if cu_seqlens.device != q.device:
            raise InputError(f"cu_seqlens is on {cu_seqlens.device}; expected integers on {q.device}")
        return packed_positions(cu_seqlens, q.shape[1])
    if positions is None:
        return None
    _check_integers(q, "positions", positions, "a position inside a document is 0 or more")
    return positions.clamp(max=torch.iinfo(torch.int32).max).to(torch.int32)


def check_for_tokens(name: str, x: Tensor, batch: int, tokens: int) -> None:
    """Refuse what has not one number for each token, of each row of the batch or for all alike."""
    if x.ndim != 2 or (x.shape[0] != 1 and x.shape[0] != batch) or x.shape[1] != tokens:
        raise InputError(f"{name} have shape {tuple(x.shape)}; expected ({batch} or 1, {tokens})")


def _check_tensor(q: Tensor, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} are a {type(x).__name__}; give a tensor of integers on {q.device}")


def _check_integers(q: Tensor, name: str, x: Tensor, least: str) -> None:
    """One number of 0 or more for each query token, of each row of the batch or for all alike."""
    _check_tensor(q, name, x)
    if x.dtype not in (torch.int32, torch.int64) or x.device != q.device:
        raise InputError(f"{name} are {x.dtype} on {x.device}; expected integers on {q.device}")
    check_for_tokens(name, x, *q.shape[:2])
    if readable(x) and int(x.min()) < 0:
        raise InputError(f"{name} go down to {int(x.min())}; {least}")


def check_rings(q: Tensor, rings: Sequence[Tensor], k: Tensor, cache_positions: Tensor, reach: int) -> None:
    """The rings of a call, of keys, values and perhaps far keys, and the places of its tokens in them."""
    k_cache = rings[0]
    for name, x in zip(("k_cache", "v_cache", "far_cache"), rings, strict=False):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (k.shape[0], *k.shape[2:]):
            raise InputError(
                f"{name} has shape {tuple(x.shape)}; for keys of shape {tuple(k.shape)} expected "
                f"({k.shape[0]}, rows, {k.shape[2]}, {k.shape[3]}): is it the cache of another model?"
            )
        _check_like(q, name, x)
        if x.shape[1] < 1 or x.shape[1] != k_cache.shape[1]:
            raise InputError(f"{name} has {x.shape[1]} rows and k_cache {k_cache.shape[1]}; give as many, at least 1")
    if k.shape[1] != q.shape[1]:
        raise InputError(f"{q.shape[1]} query tokens and {k.shape[1]} new keys; with a cache they are the same tokens")
    _check_integers(q, "cache_positions", cache_positions, "the first token has position 0")
    if not readable(cache_positions):
        return
    if bool((cache_positions.diff(dim=1) != 1).any()):
        raise InputError(f"cache_positions are {cache_positions.tolist()}; they must go up by one from token to token")
    rows, tokens = k_cache.shape[1], int(cache_positions.max()) + 1
    if rows < min(reach + 1, tokens):
        needed = f"a reach of {reach} needs {reach + 1}, or one for each of the {tokens} tokens"
        raise InputError(f"the rings have {rows} rows; {needed}")
