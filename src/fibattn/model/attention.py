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
        begun = ring.is_initialized
        taken = take(ring, (k, *raw[:1]), (v, *raw[1:]), cache_positions, written=int(begun))
        if begun:
            keys, values = (one[0] for one in taken)
            return attend_cached(q, keys, values, k, v, pattern, cache_positions=cache_positions, **how)
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
    held = ring.take(*(x[0] if len(x) == 1 else torch.cat(tuple(x), dim=-1) for x in (keys, values)))
    parts = tuple(one.split(size, dim=-1) for one in held)
    pairs = [*zip(parts[0], keys, strict=True)][written:] + [*zip(parts[1], values, strict=True)][written > 0 :]
    for part, new in pairs:
        rings.store(part, new, cache_positions)
    return parts[0], parts[1]
