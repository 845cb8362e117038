"""The cache of one attention layer, for models that are none of Transformers': a ring that keeps its own count."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fibattn.attention import ring
from fibattn.attention.api import attend_cached
from fibattn.attention.checks import patterns_of
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern, reach_of


class AttentionCache:
    """Keys and values of the tokens that a layer can still look back to, and no more, at any length; without gradients.

    Args:
        pattern: what the layer attends to, as in `attend`.

    Raises:
        InputError: (a ValueError) for anything else.

    Example:
        ```python
        cache = AttentionCache(pattern)
        out = cache.attend(q, k, v)  # the prompt, then token after token
        ```
    """

    def __init__(self, pattern: Pattern | Sequence[Pattern] | LearnedPattern):
        if not patterns_of(pattern):
            raise InputError(f"pattern is {pattern!r}; expected a fibattn.Pattern, or one for each KV head")
        self.pattern = pattern
        self.length = 0
        """How many tokens the sequence has had."""
        self._rings: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        """`attend_cached` for the next tokens, which the cache receives; `how`: alpha, scale, positions, backend.

        Raises:
            InputError: (a ValueError) as `attend_cached`.
        """
        if k.ndim != 4:
            raise InputError(f"k has shape {tuple(k.shape)}; expected (batch, tokens, heads, head size)")
        rings = self._rings_for(k)
        at = torch.arange(self.length, self.length + k.shape[1], device=k.device)[None]
        out = attend_cached(q, *rings, k, v, self.pattern, cache_positions=at, **how)
        self._rings, self.length = rings, self.length + k.shape[1]
        return out

    def _rings_for(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """The rings, with room for the tokens of k."""
        with torch.inference_mode(False):  # what is made inside can be written to in any mode
            rings = self._rings or (k.new_zeros(k.shape[0], 0, *k.shape[2:]),) * 2
            more = ring.lacking(rings[0].shape[1], self.length + k.shape[1], reach_of(self.pattern))
            keys, values = (functional.pad(x, (0, 0, 0, 0, 0, more)) if more else x for x in rings)
        return keys, values
