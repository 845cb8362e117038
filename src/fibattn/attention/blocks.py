"""Attention to a window and to blocks of keys that each query chooses: what every device does, and what a CPU does.

A block is `pattern.block` keys, counted from the first key of the row. Its score for a query head is that of its mean
key; the query heads of a KV head choose together. In one softmax with the window then are all keys of the chosen blocks
beyond it, and to each of them the mean of its block is added: so the scores that choose have a gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fibattn.attention.reference import document_limit, wide
from fibattn.pattern import ChosenPattern

CHUNK = 128
"""Queries that a CPU takes at a time, with all keys that they may see."""


def block_means(k: Tensor, block: int) -> Tensor:
    """The mean of every whole block of keys, (batch, tokens // block, KV heads, head size), in the dtype of k."""
    whole = k.shape[1] // block
    return k[:, : whole * block].unflatten(1, (whole, block)).mean(dim=2, dtype=wide(k)).to(k.dtype)


def with_means(k: Tensor, means: Tensor, block: int, trust: Tensor | None) -> Tensor:
    """Each key plus its block's mean, times `trust` (KV heads,); keys of a block that is not whole stay as they are."""
    means = means if trust is None else means * trust.to(means.dtype)[:, None]
    added = means.repeat_interleave(block, dim=1)
    return k + pad(added, (0, 0, 0, 0, 0, k.shape[1] - added.shape[1]))


def choose(q: Tensor, means: Tensor, pattern: ChosenPattern, limit: Tensor, own: Tensor, scale: float) -> Tensor:
    """Which blocks each query chooses, bool (batch, KV heads, query tokens, blocks).

    Those with the largest shares, which the query heads of a KV head would each give them, summed. A block can be
    chosen that ends before the query, reaches past the window, and begins within the reach and the query's document.

    Args:
        q: (batch, query tokens, query heads, head size).
        means: (batch, blocks, KV heads, head size).
        limit: how far back each query may look, (batch or 1, query tokens); `own`: where it stands (query tokens,).
    """
    first = own[:, None] - torch.arange(means.shape[1], device=q.device) * pattern.block
    nearest = max(pattern.window, pattern.block - 1)
    open_ = (first > nearest) & (first <= limit[..., None].clamp(max=pattern.reach))  # (batch or 1, tokens, blocks)
    shares = _scores(q, means, scale).masked_fill(~open_[:, None, None], -1e30).softmax(dim=-1).sum(dim=2)
    shares = shares.masked_fill(~open_[:, None], -1.0)
    best = shares.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.blocks]
    return torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, best, True) & open_[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_q: Tensor,
    far_k: Tensor,
    means: Tensor,
    pattern: ChosenPattern,
    scale: float,
    positions: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp (batch, query heads, query tokens), in plain PyTorch, differentiable.

    `far_k` has the means of its blocks added to it, `means` (batch, blocks, KV heads, head size) choose.
    """
    past, block = k.shape[1] - q.shape[1], pattern.block
    limits = document_limit(q, k, positions)
    found = []
    for start in range(0, q.shape[1], chunk):
        mine = slice(start, start + chunk)
        last = min(start + chunk, q.shape[1]) + past
        begin = max(start + past - max(pattern.reach, pattern.window), 0) // block * block
        own = torch.arange(start + past, last, device=q.device) - begin
        seen = slice(begin, last)
        some = means[:, begin // block : last // block].detach()
        chosen = choose(far_q[:, mine].detach(), some, pattern, limits[:, mine], own, scale)
        chosen = pad(chosen.repeat_interleave(block, dim=-1), (0, (last - begin) % block))
        distance = own[:, None] - torch.arange(last - begin, device=q.device)
        near = (distance >= 0) & (distance <= pattern.window) & (distance <= limits[:, mine, None])
        far = chosen & (distance > pattern.window)
        far_scores = _scores(far_q[:, mine], far_k[:, seen], scale)
        scores = _scores(q[:, mine], k[:, seen], scale).masked_fill(~near[:, None, None], -torch.inf)
        scores = torch.where(far[:, :, None], far_scores, scores)
        weights = scores.softmax(dim=-1).to(v.dtype)
        out = torch.einsum("bhgtn,bnhd->bthgd", weights, v[:, seen])
        found.append((out.flatten(2, 3), scores.logsumexp(dim=-1).flatten(1, 2)))
    outs, sums = zip(*found, strict=True)
    return torch.cat(outs, dim=1), torch.cat(sums, dim=2)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(batch, KV heads, query heads of each, query tokens, keys)"""
    return torch.einsum("bthgd,bnhd->bhgtn", q.unflatten(2, (k.shape[2], -1)), k).to(wide(q)) * scale
