"""Attention of a layer to the tokens of a call and, where there is a cache, to those of its ring.

A prompt that begins a sequence is attended to as without a cache, and the ring takes it. A layer that has a
convolution, or reads its far keys otherwise than its near ones, keeps more than a key and a value of a token: in its
ring they lie side by side, in the last dimension. So whatever is done to a ring is done to all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fibattn.attention import attend, attend_cached, attend_chosen, attend_chosen_cached
from fibattn.attention import ring as rings
from fibattn.model.cache import RingLayer
from fibattn.pattern import ChosenPattern, LearnedPattern, Pattern


def attend_with_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | tuple[Pattern, ...] | LearnedPattern | ChosenPattern,
    ring: RingLayer | None,
    cache_positions: Tensor,
    raw: tuple[Tensor, ...] = (),
    **how: Any,
) -> Tensor:
    """`attend` or `attend_chosen`, of a prompt without what is in the `ring`, or of what follows it.

    The ring keeps `raw`, too; `how` is what else either takes.
    """
    chooses = isinstance(pattern, ChosenPattern)
    if ring is not None:
        own = (k, *(how.get("far") or ())[1:])
        keys, values = (*own, *raw[:1]), (v, *raw[1:])
        if ring.is_initialized:
            cached = _take(ring, keys, values, cache_positions, len(own))
            if chooses:
                return attend_chosen_cached(q, cached, k, v, pattern, cache_positions=cache_positions, **how)
            return attend_cached(q, cached[0], cached[1], k, v, pattern, cache_positions=cache_positions, **how)
        ring.begin(_side_by_side(keys), _side_by_side(values), k.shape[1])
    return attend_chosen(q, k, v, pattern, **how)[0] if chooses else attend(q, k, v, pattern, **how)  # pyright: ignore


def _take(
    ring: RingLayer, keys: Sequence[Tensor], values: Sequence[Tensor], cache_positions: Tensor, own: int
) -> tuple[Tensor, ...]:
    """The rings of the first key, the first value, and the other keys up to `own`, which the caller is to write.

    What else is kept of the new tokens, (batch, tokens, KV heads, head size) each, is written here.
    """
    size = keys[0].shape[-1]
    of_keys, of_values = (one.split(size, dim=-1) for one in ring.take(_side_by_side(keys), _side_by_side(values)))
    for parts, new, first in ((of_keys, keys, own), (of_values, values, 1)):
        for part, one in zip(parts[first:], new[first:], strict=True):
            rings.store(part, one, cache_positions)
    return of_keys[0], of_values[0], *of_keys[1:own]


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """What a token keeps, in the last dimension."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=-1)
