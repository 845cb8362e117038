"""Attention to several groups of columns at once, in plain PyTorch: a window, chosen keys, means of spans.

Each group gives its own softmax, `out` (batch, tokens, KV heads, query heads of each, size), and the log of its sum,
`lse` (the same without size); `merged` makes one softmax of them. Queries are cut into bands, whose columns are the
band's own tokens and those of the band before, so longer texts cost as much a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Part = tuple[Tensor, Tensor]
MASKED = -1e9


@dataclass(frozen=True)
class Bands:
    """How a text of `tokens` is cut: `size` tokens a band, a divisor."""

    tokens: int
    size: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.tokens // self.size

    @property
    def columns(self) -> int:
        """Tokens that the queries of a band may see: with one band there is none before it."""
        return self.size if self.count == 1 else 2 * self.size

    def queries(self, q: Tensor, kv_heads: int) -> Tensor:
        """(batch, tokens, heads, size) as (batch, KV heads, bands, heads of each · band, size)."""
        split = q.unflatten(2, (kv_heads, -1)).unflatten(1, (self.count, self.size))
        return split.permute(0, 3, 1, 4, 2, 5).flatten(3, 4)

    def keys(self, x: Tensor) -> Tensor:
        """(batch, tokens, KV heads, size) as (batch, KV heads, bands, columns, size); before the first are zeros."""
        own = x.unflatten(1, (self.count, self.size)).permute(0, 3, 1, 2, 4)
        if self.count == 1:
            return own
        before = functional.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.cat([before, own], dim=3)

    def distances(self, device: torch.device) -> Tensor:
        """Of each column from each query (bands, 1, band, columns), int64; -1 where there is no token."""
        row = torch.arange(self.size, device=device)[:, None] + self.columns - self.size
        distances = (row - torch.arange(self.columns, device=device))[None, None]
        band = torch.arange(self.count, device=device)[:, None, None, None]
        exists = (band > 0) | (torch.arange(self.columns, device=device) >= self.columns - self.size)
        return torch.where(exists, distances, -1)

    def tokens_first(self, x: Tensor) -> Tensor:
        """(batch, KV heads, bands, heads of each, band, …) as (batch, tokens, KV heads, heads of each, …)."""
        return x.movedim((2, 4), (1, 2)).flatten(1, 2)


def weighed(scores: Tensor, allowed: Tensor, values: Tensor, bands: Bands) -> Part:
    """The softmax over the last dimension of `scores` (batch, KV heads, bands, heads, band, columns) where `allowed`.

    `values` (batch, KV heads, bands, columns, size).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = torch.where(allowed, scores, MASKED)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=-1)
    out = (weights.to(values.dtype).flatten(3, 4) @ values).unflatten(3, weights.shape[3:5])
    out, lse = out / total[..., None], highest[..., 0] + total.log()
    return bands.tokens_first(out), bands.tokens_first(lse)


def scored(q: Tensor, keys: Tensor, heads: int, scale: float) -> Tensor:
    """Scores (batch, KV heads, bands, heads, band, columns) of what `Bands.queries` and `Bands.keys` gave."""
    return (q @ keys.mT).unflatten(3, (heads, -1)) * scale


def near(q: Tensor, k: Tensor, v: Tensor, window: int | Tensor, bands: Bands, scale: float) -> Part:
    """The keys at distances 0 … `window`; a band is at least as long."""
    kv, distances = k.shape[2], bands.distances(q.device)
    scores = scored(bands.queries(q, kv), bands.keys(k), q.shape[2] // kv, scale)
    return weighed(scores, (distances >= 0) & (distances <= window), bands.keys(v), bands)


def at_distances(q: Tensor, k: Tensor, v: Tensor, rungs: tuple[int, ...], bands: Bands, scale: float) -> Part:
    """The keys at the distances `rungs`, at the cost of all."""
    kv, distances = k.shape[2], bands.distances(q.device)
    allowed = torch.zeros_like(distances, dtype=torch.bool)
    for rung in rungs:
        allowed = allowed | (distances == rung)
    scores = scored(bands.queries(q, kv), bands.keys(k), q.shape[2] // kv, scale)
    return weighed(scores, allowed, bands.keys(v), bands)


def span_means(
    q: Tensor, k: Tensor, v: Tensor, spans: tuple[tuple[int, int], ...], bias: Tensor | None, scale: float
) -> Part:
    """For each span (a, b) the mean key and value of the distances a + 1 … b, one column; `bias` (heads,) on all.

    From prefix sums: two reads a span.
    """
    kv, tokens = k.shape[2], k.shape[1]
    at = torch.arange(tokens, device=q.device)
    counts = torch.stack([(at - a).clamp(min=0) - (at - b).clamp(min=0) for a, b in spans], dim=1)

    def means(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = functional.pad(wide.cumsum(dim=1), (0, 0, 0, 0, 1, 0))  # of the tokens before each
        ends = [[functional.pad(sums, (0, 0, 0, 0, d, 0))[:, :tokens] for d in span] for span in spans]
        sums = torch.stack([later - earlier for later, earlier in ends], dim=3)
        return (sums / counts.clamp(min=1)[:, None, :, None]).to(x.dtype)  # (batch, tokens, KV heads, spans, size)

    grouped = q.unflatten(2, (kv, -1))
    scores = (grouped[..., None, :] * means(k)[:, :, :, None]).sum(dim=-1) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias.view(kv, -1, 1)
    scores = torch.where((counts > 0)[:, None, None], scores, MASKED)
    weights = scores.softmax(dim=-1)
    out = (weights[..., None] * means(v)[:, :, :, None]).sum(dim=-2)
    return out, scores.logsumexp(dim=-1)


@dataclass(frozen=True)
class Choice:
    """How queries choose blocks of keys."""

    window: int
    """Keys so near are read anyhow; a block may lie partly among them."""
    reach: int
    """The first key of a block is no farther back."""
    block: int
    blocks: int
    spans: tuple[tuple[int, int], ...] | None = None
    """Take the best block whose first key is in each of these, rather than the `blocks` best."""

    def eligible(self, bands: Bands, device: torch.device) -> Tensor:
        """(bands, 1, band, blocks): those that end before the query and reach past the window."""
        first = bands.distances(device)[..., :: self.block]
        return (first > max(self.window, self.block - 1)) & (first <= self.reach)

    def taken(self, scores: Tensor, bands: Bands) -> Tensor:
        """Which blocks each query takes (batch, KV heads, bands, 1, band, blocks), the same for its group of heads.

        From their scores (…, heads, band, blocks): the shares that the heads would give them, summed.
        """
        eligible, first = self.eligible(bands, scores.device), bands.distances(scores.device)[..., :: self.block]
        wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
        shares = torch.where(eligible, wide, MASKED).softmax(dim=-1).sum(dim=3, keepdim=True)
        groups = [eligible] if self.spans is None else [eligible & (first > a) & (first <= b) for a, b in self.spans]
        count = self.blocks if self.spans is None else 1
        found = torch.zeros_like(shares, dtype=torch.bool)
        for group in groups:
            best = torch.where(group, shares, -1.0).topk(min(count, shares.shape[-1])).indices
            found = found | (torch.zeros_like(found).scatter(-1, best, True) & group)
        return found


def best_blocks(q: Tensor, k: Tensor, v: Tensor, choice: Choice, trust: Tensor, bands: Bands, scale: float) -> Part:
    """The keys of the blocks that suit each query best by their mean key, less those in the window.

    A block's own score, times `trust` (KV heads,), is added to those of its keys.
    """
    kv = k.shape[2]
    heads = q.shape[2] // kv
    rows, keys, values = bands.queries(q, kv), bands.keys(k), bands.keys(v)
    of_blocks = scored(rows, keys.unflatten(3, (-1, choice.block)).mean(dim=4), heads, scale)
    of_keys = scored(rows, keys, heads, scale).unflatten(-1, (-1, choice.block))
    of_keys = of_keys + (trust.view(kv, 1, 1, 1, 1) * of_blocks)[..., None]
    distances = bands.distances(q.device).unflatten(-1, (-1, choice.block))
    allowed = choice.taken(of_blocks, bands)[..., None] & (distances > choice.window)
    return weighed(of_keys.flatten(-2), allowed.flatten(-2), values, bands)


def merged(parts: list[Part], sink: Tensor | None) -> Tensor:
    """One softmax over all parts: (batch, tokens, heads, size). `sink` (heads,) is a score that has no value."""
    outs, sums = [out for out, _ in parts], [lse for _, lse in parts]
    if sink is not None:
        sums.append(sink.view(1, 1, *sums[0].shape[2:]).to(sums[0].dtype).expand_as(sums[0]))
    shares = torch.stack(sums, dim=-1).softmax(dim=-1).unbind(dim=-1)
    return sum(out * share[..., None] for out, share in zip(outs, shares, strict=False)).flatten(2, 3)  # pyright: ignore
