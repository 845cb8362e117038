"""Attention from a ring: a cache that holds as many tokens as a layer can look back, and no more.

Token `p` of a sequence stands in row `p mod rows` of a ring (batch, rows, KV heads, head size). A layer of
reach `r` needs the `r` tokens before a new one, so `r + 1` rows do at any length, and fewer as long as each
token has a row of its own. Here is what every device does with a chunk of tokens, and the one-token step on
the CPU, which reads no more rows than the query has distances.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from fibattn.attention.reference import wide
from fibattn.errors import InputError

_UNREACHABLE = torch.iinfo(torch.int64).max


def before(ring: Tensor, cache_positions: Tensor, count: int) -> Tensor:
    """The `count` tokens before a chunk, oldest first, (batch, count, KV heads, head size).

    Where the sequence is younger than that the rows hold anything; a query's limit keeps it from them.
    """
    rows = (cache_positions[:, :1] - torch.arange(count, 0, -1, device=ring.device)) % ring.shape[1]
    return ring[_batch(ring), rows]


def store(ring: Tensor, new: Tensor, cache_positions: Tensor) -> None:
    """Write a chunk (batch, tokens, KV heads, head size) into the ring; of one longer than the ring, its end."""
    kept = min(new.shape[1], ring.shape[1])
    rows = cache_positions[:, -kept:] % ring.shape[1]
    ring[_batch(ring), rows] = new[:, -kept:].detach()


def write(
    rings: Sequence[Tensor], chunk: Sequence[Tensor], cache_positions: Tensor, positions: Tensor | None
) -> Tensor:
    """Store a chunk, of which each ring receives its tensor; how far back its tokens may look, (batch or 1, tokens)."""
    for ring, new in zip(rings, chunk, strict=True):
        store(ring, new, cache_positions)
    return cache_positions if positions is None else torch.minimum(cache_positions, positions)


def lacking(rows: int, tokens: int, reach: int) -> int:
    """How many rows to add for a sequence of so many tokens; they at least double, so that all growing copies little.

    As long as there are fewer than `reach + 1`, none was used twice: each token stays where it is.
    """
    return 0 if rows >= min(reach + 1, tokens) else min(reach + 1, max(tokens, 2 * rows)) - rows


def _batch(ring: Tensor) -> Tensor:
    return torch.arange(ring.shape[0], device=ring.device)[:, None]


@torch.autocast("cpu", enabled=False)
def step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_positions: Tensor,
    positions: Tensor | None,
    scale: float,
    window: int,
    sets: Sequence[tuple[int, ...]],
    fractions: Sequence[float] | None = None,
) -> Tensor:
    """Write one token into the ring and return its output (batch, 1, query heads, head size).

    With `fractions` the one set of rungs lies between two keys, each so far beyond its offset.
    """
    oldest = int(cache_positions.max())
    if fractions is not None:
        _check_farther_keys(sets[0], k_cache.shape[1], oldest)
    limit = write((k_cache, v_cache), (k, v), cache_positions, positions)[:, :, None]

    def read(distances: Tensor) -> tuple[Tensor, Tensor]:
        rows = (cache_positions[:, :, None] - distances) % k_cache.shape[1]
        return _rows(k_cache, rows), _rows(v_cache, rows)

    return attend_at(q, read, limit, oldest, scale, window, sets, fractions)


def attend_at(
    q: Tensor,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    limit: Tensor,
    oldest: int,
    scale: float,
    window: int,
    sets: Sequence[tuple[int, ...]],
    fractions: Sequence[float] | None = None,
) -> Tensor:
    """The output of one token of each sequence (batch, 1, query heads, head size), wherever its keys lie.

    `read` gives the keys and values (batch, KV heads, count, head size) at distances (1 or KV heads, count); beyond
    `limit` (batch, 1, 1) they may be anything. `oldest` is the largest limit.
    """
    # Less than the window where no sequence is old enough for it; in powers of two, so that there are few tables.
    held = min(window, (1 << oldest.bit_length()) - 1)
    distances = _distances(held, tuple(sets))
    keys, values = read(distances)
    if fractions is not None:
        parts = torch.tensor([0.0] * (held + 1) + list(fractions), dtype=keys.dtype)
        # The first key of a document has none before it to interpolate with.
        parts = (parts * (distances != limit))[..., None]
        farther = read(distances + 1)
        keys, values = keys.lerp(farther[0], parts), values.lerp(farther[1], parts)
    return _attend(q, keys, values, distances > limit, scale)


def _check_farther_keys(nearer: tuple[int, ...], rows: int, oldest: int) -> None:
    """Where rungs lie between two keys, the farther of both must still be in the ring."""
    farthest = max((near + 1 for near in nearer), default=0)
    if min(farthest, oldest) >= rows:
        raise InputError(
            f"alpha puts a rung between {farthest - 1} and {farthest}; the cache has {rows} rows, not {farthest + 1}"
        )


@cache
def _distances(window: int, sets: tuple[tuple[int, ...], ...]) -> Tensor:
    """The distances of every KV head, (1 or KV heads, window + 1 + most rungs); unreachable ones fill up."""
    most = max(map(len, sets))
    table = [[*range(window + 1), *one, *[_UNREACHABLE] * (most - len(one))] for one in sets]
    return torch.tensor(table, dtype=torch.int64, device="cpu")


def _rows(ring: Tensor, rows: Tensor) -> Tensor:
    """Rows (batch or 1, KV heads or 1, count) of every head: (batch, KV heads, count, head size)."""
    heads = torch.arange(ring.shape[2], device=ring.device)[:, None]
    return ring[_batch(ring)[..., None], rows, heads].to(wide(ring))


def _attend(q: Tensor, keys: Tensor, values: Tensor, missing: Tensor, scale: float) -> Tensor:
    batch, kv_heads, _, size = keys.shape
    queries = q.reshape(batch, kv_heads, -1, size).to(keys.dtype) * scale
    scores = (queries @ keys.transpose(-1, -2)).masked_fill_(missing[:, :, None], -torch.inf)
    return (torch.softmax(scores, dim=-1) @ values).to(q.dtype).view(batch, 1, -1, size)
