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


def attend_by_distance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | tuple[Pattern, ...] | LearnedPattern,
    ring: RingLayer | None,
    cache_positions: Tensor,
    raw: tuple[Tensor, ...] = (),
    **how: Any,
) -> Tensor:
    """`attend`, of a prompt without what is in the `ring`, or of what follows it; `raw` is kept there, too."""
    if ring is not None:
        given = (k, *raw[:1]), (v, *raw[1:])
        if ring.is_initialized:
            keys, values = (one[0] for one in take(ring, *given, cache_positions, written=1))
            return attend_cached(q, keys, values, k, v, pattern, cache_positions=cache_positions, **how)
        begin(ring, *given)
    return attend(q, k, v, pattern, **how)  # pyright: ignore[reportReturnType]


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
        own = (k, *(how.get("far") or ())[1:])
        given = (*own, *raw[:1]), (v, *raw[1:])
        if ring.is_initialized:
            keys, (values, *_) = take(ring, *given, cache_positions, written=len(own))
            cached = keys[0], values, *keys[1 : len(own)]
            return attend_chosen_cached(q, cached, k, v, pattern, cache_positions=cache_positions, **how)
        begin(ring, *given)
    return attend_chosen(q, k, v, pattern, **how)[0]


def begin(ring: RingLayer, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let the ring hold a sequence's first tokens, of which several tensors, shaped as in `take`, are kept."""
    ring.begin(side_by_side(keys), side_by_side(values), keys[0].shape[1])


def take(
    ring: RingLayer, keys: Sequence[Tensor], values: Sequence[Tensor], cache_positions: Tensor, written: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The rings of several tensors (batch, tokens, KV heads, head size) of new tokens, which the ring counts.

    The first `written` of the keys, and the first value, are left for the caller to write.
    """
    size = keys[0].shape[-1]
    parts = tuple(one.split(size, dim=-1) for one in ring.take(side_by_side(keys), side_by_side(values)))
    pairs = [*zip(parts[0], keys, strict=True)][written:] + [*zip(parts[1], values, strict=True)][1:]
    for part, new in pairs:
        rings.store(part, new, cache_positions)
    return parts[0], parts[1]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """What a token keeps, in the last dimension."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=-1)
