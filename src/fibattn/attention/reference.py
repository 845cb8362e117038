"""The specification of the operator: a mask in float64, on any device, quadratic in length.

Every backend is tested against this file; it is written to be read, not to be fast. Gradients come from
autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fibattn.pattern import ChosenPattern, LearnedPattern, Pattern

Patterns = tuple[Pattern, ...] | LearnedPattern
"""One pattern, or one for every KV head, or one whose rungs a learned alpha moves."""


def wide(x: Tensor) -> torch.dtype:
    """The dtype that sums over values of `x` are taken in, and in which callers get a log-sum-exp."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Patterns,
    scale: float,
    positions: Tensor | None,
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fibattn.attend`."""
    if isinstance(patterns, LearnedPattern):
        assert alpha is not None
        return _attend_interpolated(q, k, v, patterns, alpha, scale, positions)
    heads = [allowed(q, k, pattern.window, pattern.offsets, positions) for pattern in patterns]
    mask = torch.stack(heads, dim=1).repeat_interleave(q.shape[2] // len(heads), dim=1)
    scores = _scores(q, k, scale).masked_fill(~mask, -torch.inf)
    values = _by_query_head(v, q)
    return _result(scores, torch.softmax(scores, dim=-1) @ values, q)


def _attend_interpolated(
    q: Tensor, k: Tensor, v: Tensor, pattern: LearnedPattern, alpha: Tensor, scale: float, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Beside the window, one interpolated key and value for every rung."""
    limit = document_limit(q, k, positions)
    near_mask = allowed(q, k, pattern.window, (), positions)[:, None]
    columns, values = [_scores(q, k, scale).masked_fill(~near_mask, -torch.inf)], []
    keys, all_values, own = _by_query_head(k, q), _by_query_head(v, q), _own(q, k)
    for rung in pattern.at(float(alpha.detach())):
        fraction = alpha.double() * pattern.rungs[rung.index] - rung.near
        near = (own - rung.near).clamp(min=0).expand_as(limit)
        far = (own - torch.minimum(limit, torch.tensor(rung.near + 1, device=q.device))).clamp(min=0)
        key = _interpolated(keys, near, far, fraction)
        values.append(_interpolated(all_values, near, far, fraction))
        logit = (q.double().transpose(1, 2) * key).sum(-1) * scale
        columns.append(logit.masked_fill((limit < rung.near)[:, None], -torch.inf)[..., None])
    weights = torch.softmax(torch.cat(columns, dim=-1), dim=-1)
    out = weights[..., : k.shape[1]] @ all_values
    for index, value in enumerate(values):
        out = out + weights[..., k.shape[1] + index, None] * value
    # Where no rung is kept, alpha still has a gradient: 0.
    return _result(torch.cat(columns, dim=-1), out + 0 * alpha.double().sum(), q)


def attend_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_q: Tensor,
    far_k: Tensor,
    trust: Tensor | None,
    pattern: ChosenPattern,
    scale: float,
    positions: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `fibattn.attend_chosen`; `first` is its `blocks_from`."""
    limit, own, at = document_limit(q, k, positions), _own(q, k), torch.arange(k.shape[1], device=q.device)
    if first is None:  # of the longest document, which may begin before the keys
        place = own[None] if positions is None else positions.long()
        first = (own - place).gather(1, place.argmax(dim=1, keepdim=True))
    number = (at - first).div(pattern.block, rounding_mode="floor")  # of each key's block
    numbers = number[:, :1] + torch.arange(k.shape[1] // pattern.block + 2, device=q.device)
    inside = (number[..., None] == numbers[:, None]).double()
    means = torch.einsum("bnc,bnhd->bchd", inside, far_k.double()) / pattern.block
    chosen = _chosen(_scores(far_q, means, scale), first + pattern.block * numbers, own, limit, k.shape[2], pattern)
    back = own[:, None] - at
    near = allowed(q, k, pattern.window, (), positions)[:, None]
    distant = (chosen.double() @ inside[:, None].mT > 0) & (back > pattern.window)
    own_mean = torch.einsum("bnc,bchd->bnhd", inside, means)
    raised = far_k + own_mean * (1 if trust is None else trust.double()[:, None])
    columns = [
        _scores(q, k, scale).masked_fill(~near, -torch.inf),
        _scores(far_q, raised, scale).masked_fill(~distant, -torch.inf),
    ]
    scores, values = torch.cat(columns, dim=-1), _by_query_head(v, q)
    return _result(scores, torch.softmax(scores, dim=-1) @ torch.cat([values, values], dim=2), q)


def _chosen(
    scores: Tensor, begins: Tensor, own: Tensor, limit: Tensor, kv_heads: int, pattern: ChosenPattern
) -> Tensor:
    """Which blocks each query reads, (batch, query heads, query tokens, blocks): the best by the sum of their shares.

    `scores` are those of the blocks' means, shaped alike; `begins`, (batch or 1, blocks), their first keys.
    """
    distance = own[:, None] - begins[:, None]
    can = (begins[:, None] >= 0) & (distance >= pattern.block) & (distance > pattern.window)
    can = (can & (distance <= pattern.reach) & (distance <= limit[..., None]))[:, None]
    shares = scores.masked_fill(~can, -torch.inf).softmax(dim=-1).nan_to_num()  # none where nothing can be chosen
    shares = shares.unflatten(1, (kv_heads, -1)).sum(dim=2)
    if pattern.anchored:
        shares = shares.masked_fill((distance == limit[..., None])[:, None], torch.inf)
    ordered = shares.masked_fill(~can, -1).sort(dim=-1, descending=True, stable=True).indices
    chosen = can & (ordered.argsort(dim=-1) < pattern.blocks)
    return chosen.repeat_interleave(scores.shape[1] // kv_heads, dim=1)


def document_limit(q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor:
    """The farthest distance each query may look back, (batch or 1, query tokens), int64.

    Queries are the last tokens of the keys; a query may not look before its document or the first key.
    """
    own = _own(q, k)
    return own[None] if positions is None else torch.minimum(own, positions.long())


def _own(q: Tensor, k: Tensor) -> Tensor:
    """Which key is each query's own."""
    return torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)


def allowed(q: Tensor, k: Tensor, window: int, offsets: Sequence[int], positions: Tensor | None) -> Tensor:
    """Which keys each query may attend to, (batch or 1, query tokens, keys), bool."""
    distance = _own(q, k)[:, None] - torch.arange(k.shape[1], device=q.device)
    near = (distance >= 0) & (distance <= window)
    far = torch.isin(distance, torch.tensor(list(offsets), dtype=torch.int64, device=q.device))
    return (near | far) & (distance <= document_limit(q, k, positions)[..., None])


def _by_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.double().transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], dim=1)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q.double().transpose(1, 2) @ _by_query_head(k, q).transpose(-1, -2) * scale


def _interpolated(x: Tensor, near: Tensor, far: Tensor, fraction: Tensor) -> Tensor:
    """Rows `(1 - fraction) x[near] + fraction x[far]` of x (B, H, T, D); near and far are (B or 1, Tq)."""
    batch, heads, _, size = x.shape
    near, far = (i[:, None, :, None].expand(batch, heads, -1, size) for i in (near, far))
    return (1 - fraction) * x.gather(2, near) + fraction * x.gather(2, far)


def _result(scores: Tensor, out: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return out.transpose(1, 2).to(q.dtype), torch.logsumexp(scores, dim=-1).to(wide(q))
