"""A short causal convolution over keys and values, so that they carry their neighbourhood; and rings with more in them.

A layer that has one, or that reads its far keys otherwise than its near ones, keeps more than a key and a value of a
token: in its ring they lie side by side, in the last dimension. So whatever is done to a ring is done to all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fibattn.attention import attend_chosen, attend_chosen_cached
from fibattn.attention import ring as rings
from fibattn.model.cache import RingLayer
from fibattn.pattern import ChosenPattern


def convolved(
    raw: tuple[Tensor, Tensor],
    weight: Tensor,
    ring: RingLayer | None,
    positions: Tensor | None,
    cache_positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, tokens, KV heads, head size), to each channel a sum over its last tokens added.

    Nothing from before a document: `positions` are each token's in its own, `cache_positions` in the sequence.

    Args:
        raw: as the projections give them.
        weight: (2, taps, KV heads · head size), of keys and of values, the token's own first.
        ring: where the tokens before these are, the last in the last dimension; None where there are none.
    """
    taps, limit = weight.shape[1], cache_positions if positions is None else positions
    earlier: Sequence[Tensor | None] = (None, None)
    if ring is not None and ring.is_initialized:
        earlier = [one[..., -raw[0].shape[-1] :] for one in ring.before(cache_positions, taps - 1)]
        limit = torch.minimum(limit, cache_positions)
    found = []
    for x, mine, before in zip(raw, weight.to(raw[0].dtype), earlier, strict=True):
        padded = functional.pad(x, (0, 0, 0, 0, taps - 1, 0)) if before is None else torch.cat([before, x], dim=1)
        total = x
        for back, factor in enumerate(mine.unflatten(1, x.shape[2:])):
            shifted = padded[:, taps - 1 - back :][:, : x.shape[1]]
            total = total + torch.where((limit >= back)[..., None, None], shifted, 0.0) * factor
        found.append(total)
    return found[0], found[1]


def attend_by_choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: ChosenPattern,
    ring: RingLayer | None,
    cache_positions: Tensor,
    raw: tuple[Tensor, ...] = (),
    **how: Any,
) -> Tensor:
    """`attend_chosen`, of a prompt without what is in the `ring`, or of what follows it; `raw` is kept there, too."""
    if ring is not None:
        begun, own = ring.is_initialized, (k, *(how.get("far") or ())[1:])
        written = len(own) if begun else 0
        keys, (values, *_) = take(ring, (*own, *raw[:1]), (v, *raw[1:]), cache_positions, written=written)
        if begun:
            cached = keys[0], values, *keys[1 : len(own)]
            return attend_chosen_cached(q, cached, k, v, pattern, cache_positions=cache_positions, **how)
    return attend_chosen(q, k, v, pattern, **how)[0]


def take(
    ring: RingLayer, keys: Sequence[Tensor], values: Sequence[Tensor], cache_positions: Tensor, written: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The rings of several tensors (batch, tokens, KV heads, head size) of new tokens, which the ring counts.

    The first `written` of the keys, and the first value where that is not 0, are left for the caller to write.
    """
    size = keys[0].shape[-1]
    held = ring.take(torch.cat(tuple(keys), dim=-1), torch.cat(tuple(values), dim=-1))
    parts = tuple(one.split(size, dim=-1) for one in held)
    pairs = [*zip(parts[0], keys, strict=True)][written:] + [*zip(parts[1], values, strict=True)][written > 0 :]
    for part, new in pairs:
        rings.store(part, new, cache_positions)
    return parts[0], parts[1]
