"""Attention to a window and to blocks of keys that each query chooses: what every device does, and what a CPU does.

A block is `pattern.block` keys, counted from the first key of a row's longest document: padding changes nothing.
Its score for a query head is that of its mean key; the query heads of a KV head choose together. In one softmax with
the window then are all keys of the chosen blocks beyond it, and to each of them the mean of its block is added: so the
scores that choose have a gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fibattn.attention.reference import document_limit, wide
from fibattn.pattern import ChosenPattern

CHUNK = 128
"""Queries that a CPU takes at a time, with all keys that they may see; the largest block divides it."""


def block_means(k: Tensor, block: int) -> Tensor:
    """The mean of every whole block of keys, (batch, tokens // block, KV heads, head size), in the dtype of k."""
    whole = k.shape[1] // block
    return k[:, : whole * block].unflatten(1, (whole, block)).mean(dim=2, dtype=wide(k)).to(k.dtype)


def with_means(k: Tensor, means: Tensor, block: int, trust: Tensor | None) -> Tensor:
    """Each key plus its block's mean, times `trust` (KV heads,); keys of a block that is not whole stay as they are."""
    means = means if trust is None else means * trust.to(means.dtype)[:, None]
    whole = means.shape[1] * block
    with_own = (k[:, :whole].unflatten(1, (-1, block)) + means[:, :, None]).flatten(1, 2)
    return with_own if whole == k.shape[1] else torch.cat([with_own, k[:, whole:]], dim=1)


def choose(q: Tensor, means: Tensor, pattern: ChosenPattern, limit: Tensor, own: Tensor, scale: float) -> Tensor:
    """Which blocks each query chooses, bool (batch, KV heads, query tokens, blocks).

    Those with the largest shares, which the query heads of a KV head would each give them, summed; where `anchored`,
    before these the first block of the document. A block can be chosen that ends before the query, reaches past the
    window, and begins within the reach and the query's document.

    Args:
        q: (batch, query tokens, query heads, head size).
        means: (batch, blocks, KV heads, head size).
        limit: how far back each query may look, (batch or 1, query tokens); `own`: which key is its own, likewise.
    """
    first = own[..., None] - torch.arange(means.shape[1], device=q.device) * pattern.block
    nearest = max(pattern.window, pattern.block - 1)
    can = ((first > nearest) & (first <= limit[..., None].clamp(max=pattern.reach)))[:, None]
    shares = _scores(q, means, scale).masked_fill(~can[:, :, None], -1e30).softmax(dim=-1).sum(dim=2)
    if pattern.anchored:  # more than all shares of all query heads
        shares = shares + (first == limit[..., None])[:, None] * (q.shape[2] + 1)
    best = shares.masked_fill(~can, -1.0).sort(dim=-1, descending=True, stable=True).indices[..., : pattern.blocks]
    return torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, best, True) & can


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_q: Tensor,
    far_k: Tensor,
    trust: Tensor | None,
    pattern: ChosenPattern,
    scale: float,
    positions: Tensor | None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp (batch, query heads, query tokens), in plain PyTorch, differentiable."""
    places = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[None]
    at, own = needed(places, positions, pattern, first)
    rows, limit = at.clamp(0, k.shape[1] - 1), document_limit(q, k, positions)
    k, v, far_k = (rows_at(x, rows) for x in (k, v, far_k))
    return attend_from(q, k, v, far_q, far_k, trust, pattern, scale, own, limit)


def needed(
    places: Tensor, positions: Tensor | None, pattern: ChosenPattern, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which keys queries may need, from where the first of these blocks begins, and which of them is each query's own.

    Args:
        places: which key of the sequence is each query's own, (batch or 1, tokens), rising by one.
        positions: where in its document it is, likewise; `places` when None.
        first: from which key blocks are counted, (batch or 1, 1); the longest document's first when None.

    Returns:
        (batch or 1, reach + block + tokens), where those before the first key are below 0, and (batch or 1, tokens).
    """
    if first is None:
        first = torch.zeros_like(places[:, :1]) if positions is None else first_key(places, positions)
    begin = (places[:, :1] - first - pattern.reach).div(pattern.block, rounding_mode="floor") * pattern.block + first
    length = pattern.reach + pattern.block + places.shape[1]
    return begin + torch.arange(length, device=places.device), places - begin


def first_key(places: Tensor, positions: Tensor) -> Tensor:
    """Where the longest document of each row begins, from where blocks are counted; (batch or 1, 1), int64."""
    places, positions = torch.broadcast_tensors(places, positions)
    longest = positions.max(dim=1, keepdim=True)
    return places.gather(1, longest.indices) - longest.values


def rows_at(x: Tensor, rows: Tensor) -> Tensor:
    """The tokens `rows` (batch or 1, tokens) of x (batch, …)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def attend_from(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_q: Tensor,
    far_k: Tensor,
    trust: Tensor | None,
    pattern: ChosenPattern,
    scale: float,
    own: Tensor,
    limit: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same for keys that begin with the first block that the first query may need.

    Args:
        own: which key is each query's own, (batch or 1, query tokens), rising by one.
        limit: how far back it may look, likewise; what is farther, or behind `own`, may be anything finite.
    """
    means = block_means(far_k, pattern.block)
    far_k = with_means(far_k, means, pattern.block, trust)
    found, reach, block = [], pattern.reach, pattern.block
    for start in range(0, q.shape[1], CHUNK):
        mine, stop = slice(start, start + CHUNK), start + reach + block + CHUNK
        close, seen = slice(start + reach - pattern.window, stop), slice(start, stop)
        back, scores = limit[:, mine], []
        distance = _distances(own[:, mine] - close.start, k[:, close])
        allowed = (distance >= 0) & (distance <= pattern.window) & (distance <= back[..., None])
        scores.append(_scores(q[:, mine], k[:, close], scale).masked_fill(~allowed[:, None, None], -torch.inf))
        some = means[:, start // block : stop // block].detach()
        chosen = choose(far_q[:, mine].detach(), some, pattern, back, own[:, mine] - start, scale)
        chosen = chosen.repeat_interleave(block, dim=-1)
        chosen = pad(chosen, (0, far_k[:, seen].shape[1] - chosen.shape[-1]))
        far = chosen & (_distances(own[:, mine] - start, far_k[:, seen]) > pattern.window)[:, None]
        scores.append(_scores(far_q[:, mine], far_k[:, seen], scale).masked_fill(~far[:, :, None], -torch.inf))
        both = torch.cat(scores, dim=-1)
        near, distant = both.softmax(dim=-1).to(v.dtype).split([one.shape[-1] for one in scores], dim=-1)
        out = _weighed(near, v[:, close]) + _weighed(distant, v[:, seen])
        found.append((out, both.logsumexp(dim=-1).flatten(1, 2)))
    outs, sums = zip(*found, strict=True)
    return torch.cat(outs, dim=1), torch.cat(sums, dim=2)


def _distances(own: Tensor, keys: Tensor) -> Tensor:
    """Of each key (batch, keys, …) from each query at `own` (batch or 1, tokens): (batch or 1, tokens, keys)."""
    return own[..., None] - torch.arange(keys.shape[1], device=own.device)


def _weighed(weights: Tensor, v: Tensor) -> Tensor:
    """(batch, query tokens, query heads, head size)"""
    return torch.einsum("bhgtn,bnhd->bthgd", weights, v).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(batch, KV heads, query heads of each, query tokens, keys)"""
    return torch.einsum("bthgd,bnhd->bhgtn", q.unflatten(2, (k.shape[2], -1)), k).to(wide(q)) * scale
