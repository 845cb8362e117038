"""The specification of the operator: a mask in float64, on any device, quadratic in length.

Every backend is tested against this file; it is written to be read, not to be fast. Gradients come from
autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fibattn.pattern import LearnedPattern, Pattern

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
    heads = [_allowed(q, k, pattern.distances, positions) for pattern in patterns]
    mask = torch.stack(heads, dim=1).repeat_interleave(q.shape[2] // len(heads), dim=1)
    scores = _scores(q, k, scale).masked_fill(~mask, -torch.inf)
    values = _by_query_head(v, q)
    return _result(scores, torch.softmax(scores, dim=-1) @ values, q)


def _attend_interpolated(
    q: Tensor, k: Tensor, v: Tensor, pattern: LearnedPattern, alpha: Tensor, scale: float, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Beside the window, one interpolated key and value for every rung."""
    limit = document_limit(q, k, positions)
    near_mask = _allowed(q, k, range(pattern.window + 1), positions)[:, None]
    columns, values = [_scores(q, k, scale).masked_fill(~near_mask, -torch.inf)], []
    keys, own = _by_query_head(k, q), torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    all_values = _by_query_head(v, q)
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


def document_limit(q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor:
    """The farthest distance each query may look back, (batch or 1, query tokens), int64.

    Queries are the last tokens of the keys; a query may not look before its document or the first key.
    """
    own = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    return own[None] if positions is None else torch.minimum(own, positions.long())


def _allowed(q: Tensor, k: Tensor, distances: Sequence[int], positions: Tensor | None) -> Tensor:
    own = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    distance = own[:, None] - torch.arange(k.shape[1], device=q.device)
    attended = torch.isin(distance, torch.tensor(list(distances), device=q.device))
    return attended & (distance <= document_limit(q, k, positions)[..., None])


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
