"""Attention as a layer of any PyTorch model: projections, rotary positions, the operator, a cache."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fibattn.attention.api import attend
from fibattn.attention.cache import AttentionCache
from fibattn.attention.checks import patterns_of
from fibattn.errors import InputError
from fibattn.model.rotary import cosines_and_sines, plain_frequencies, rotate
from fibattn.pattern import LearnedPattern, Pattern


class LearnedScale(nn.Module):
    """What attention layers share that may learn how far their rungs are: `theta`, None where they do not."""

    theta: nn.Parameter | None

    @property
    def alpha(self) -> Tensor | None:
        """The learned scale of the rungs, `0.5 + sigmoid(theta)` (paper, section 3.4), float32 (1,)."""
        return None if self.theta is None else 0.5 + torch.sigmoid(self.theta.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As any module's, but no cast reaches theta: in 16 bits a far rung would be off by half a token."""

        def uncast(tensor: Tensor) -> Tensor:
            done = fn(tensor)
            own = self.theta is not None and (tensor is self.theta or tensor is self.theta.grad)
            return tensor.to(done.device) if own and done.dtype != tensor.dtype else done

        return super()._apply(uncast, recurse)


def new_theta() -> nn.Parameter:
    """A theta whose alpha is 1; float32 whatever PyTorch's default is."""
    return nn.Parameter(torch.zeros(1, dtype=torch.float32))


class FibAttention(LearnedScale):
    """Causal self-attention to the distances of a pattern, (batch, tokens, hidden size) in and out.

    Args:
        hidden_size: size of a token's vector.
        heads: query heads; `kv_heads`: heads of keys and values, as many when None.
        pattern: as in `attend`. With a `LearnedPattern` the layer learns its alpha, `0.5 + sigmoid(theta)`, from 1 on.
        head_size: `hidden_size / heads` when None.
        rope_theta: base of the rotary positions; None for none.

    Raises:
        InputError: (a ValueError) for sizes that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        pattern: Pattern | Sequence[Pattern] | LearnedPattern,
        *,
        kv_heads: int | None = None,
        head_size: int | None = None,
        rope_theta: float | None = 10_000.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise InputError(f"{heads} query heads do not divide into {kv_heads} KV heads; use a multiple of them")
        if head_size is None and hidden_size % heads:
            raise InputError(f"a hidden size of {hidden_size} does not divide into {heads} heads; give head_size")
        self.pattern, self.rope_theta = pattern, rope_theta
        self.head_size = hidden_size // heads if head_size is None else head_size
        if rope_theta is not None and self.head_size % 2:
            raise InputError(f"the head size is {self.head_size}; RoPE needs an even one, or rope_theta=None")
        if rope_theta is not None and not 0 < rope_theta < math.inf:
            raise InputError(f"rope_theta is {rope_theta}; it must be a finite number above 0, or None")
        self.q_proj = nn.Linear(hidden_size, heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(heads * self.head_size, hidden_size, bias=False)
        self.theta = new_theta() if isinstance(pattern, LearnedPattern) else None

    def forward(
        self, hidden: Tensor, *, positions: Tensor | None = None, cache: AttentionCache | None = None
    ) -> Tensor:
        """`positions` as in `attend`, also the rotary ones; `cache`, an `AttentionCache(layer.pattern)`, for a sequence
        that comes in parts, each of which has gradients of its own alone.

        Raises:
            InputError: (a ValueError) as `attend` and `attend_cached`.
        """
        if hidden.ndim != 3 or 0 in hidden.shape:
            raise InputError(f"hidden has shape {tuple(hidden.shape)}; expected (batch, tokens, hidden size), none 0")
        # The compiler knows no `!=` where a pattern's numbers are symbols.
        if cache is not None and not patterns_of(cache.pattern) == patterns_of(self.pattern):
            raise InputError(f"the cache is for {cache.pattern}, the layer has {self.pattern}; give it one for that")
        shape = (*hidden.shape[:2], -1, self.head_size)
        q, k, v = (project(hidden).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            first = 0 if cache is None else cache.length
            index = torch.arange(first, first + hidden.shape[1], device=hidden.device)[None]
            frequencies = plain_frequencies(self.rope_theta, self.head_size, hidden.device)
            rotation = cosines_and_sines(index if positions is None else positions, frequencies, 1.0, q.dtype)
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is None:
            out = attend(q, k, v, self.pattern, alpha=self.alpha, positions=positions)
        else:
            out = cache.attend(q, k, v, alpha=self.alpha, positions=positions)
        return self.o_proj(out.flatten(2))
