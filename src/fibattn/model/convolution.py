"""A short causal convolution over keys and values, so that they carry their neighbourhood."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fibattn.model.cache import RingLayer
from fibattn.model.positions import Shard


def convolved(
    raw: tuple[Tensor, Tensor],
    weight: Tensor,
    ring: RingLayer | None,
    positions: Tensor | None,
    cache_positions: Tensor,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, tokens, KV heads, head size), to each channel a sum over its last tokens added.

    Nothing from before a document: `positions` are each token's in its own, `cache_positions` in the sequence.

    Args:
        raw: as the projections give them.
        weight: (2, taps, KV heads · head size), of keys and of values, the token's own first.
        ring: where the tokens before these are, the last in the last dimension; None where there are none.
        shard: what has them where these are a part of each row.
    """
    taps, size, limit = weight.shape[1], raw[0].shape[-1], cache_positions if positions is None else positions
    earlier: Sequence[Tensor | None] = (None, None)
    if ring is not None and ring.is_initialized:
        earlier = [one[..., -size:] for one in ring.before(cache_positions, taps - 1)]
        limit = torch.minimum(limit, cache_positions)
    elif shard is not None:
        earlier = shard.before(raw, taps - 1)
        limit = torch.full_like(cache_positions, taps) if positions is None else positions
    found = []
    for x, mine, before in zip(raw, weight.to(raw[0].dtype), earlier, strict=True):
        joined = x if before is None else torch.cat([before, x], dim=1)
        padded = functional.pad(joined, (0, 0, 0, 0, taps - 1 + x.shape[1] - joined.shape[1], 0))
        total = x
        for back, factor in enumerate(mine.unflatten(1, x.shape[2:])):
            shifted = padded[:, taps - 1 - back :][:, : x.shape[1]]
            total = total + torch.where((limit >= back)[..., None, None], shifted, 0.0) * factor
        found.append(total)
    return found[0], found[1]
