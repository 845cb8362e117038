"""The model of a candidate: the recipe's, its sparse layers reading otherwise."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fibattn.attention import attend_chosen
from fibattn.model import FibAttnForCausalLM
from fibattn.model.layers import FibAttnAttention
from fibattn.model.rotary import Rotation, rotate
from fibattn.pattern import ChosenPattern, Pattern
from study.far.candidates import TAPS, Candidate, spans
from study.far.reading import Bands, Choice, Part, at_distances, best_blocks, merged, near, span_means


class Convolution(nn.Module):
    """Adds to each channel a weighted sum of its last four tokens; nothing at first. (batch, tokens, channels)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, TAPS))  # three dimensions: no matrix for Muon

    def forward(self, x: Tensor) -> Tensor:
        """In and out alike."""
        weight = self.weight.to(x.dtype)
        return x + sum(_later(x, back) * weight[:, 0, back] for back in range(TAPS))


class Shift(nn.Module):
    """Takes the slower half of each head's rotary pairs from the token before. (batch, tokens, channels)."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """In and out alike."""
        slow = torch.arange(x.shape[-1], device=x.device) % (self.size // 2) >= self.size // 4
        return torch.where(slow, _later(x, 1), x)


class FarAttention(FibAttnAttention):
    """A sparse layer that reads a window and what its candidate says. Without a cache: for trials."""

    def __init__(self, like: FibAttnAttention, candidate: Candidate, reach: int):
        super().__init__(like.config, like.layer_idx)
        self.load_state_dict(like.state_dict())
        self.candidate, self.farthest = candidate, reach
        heads, kv_heads = like.config.num_attention_heads, like.k_proj.out_features // like.head_dim

        def per_head(wanted: bool, value: float, heads: int = heads) -> nn.Parameter | None:
            return nn.Parameter(torch.full((heads,), value)) if wanted else None

        self.trust = per_head(candidate.far == "best", 1.0, kv_heads)
        self.bias = per_head(candidate.far == "means", 0.0)
        self.sink = per_head(candidate.sink, 0.0)

    def forward(self, hidden: Tensor, rotation: Rotation, **_: Any) -> Tensor:  # pyright: ignore
        """`hidden` (batch, tokens, hidden size) in and out; a row is one document."""
        tokens, small = hidden.shape[1], self.candidate
        shape = (*hidden.shape[:2], -1, self.head_dim)
        q, k, v = (project(hidden).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        near_q, near_k = rotate(q, rotation), rotate(k, rotation)
        far_q, far_k = (near_q, near_k) if small.rotated else (q, k)
        if small.in_operator:
            return self.o_proj(self._chosen((near_q, near_k, v), (far_q, far_k)).flatten(2))
        narrow, wide = self._bands(tokens)

        def whole(x: Tensor) -> Tensor:
            return functional.pad(x, (0, 0, 0, 0, 0, wide.tokens - tokens))

        window = self._window(hidden.device)
        parts = [near(whole(near_q), whole(near_k), whole(v), window, narrow, self.scaling)]
        parts += self._far(whole(far_q), whole(far_k), whole(v), wide)
        out = merged(parts, self.sink)[:, :tokens].to(v.dtype)
        return self.o_proj(out.reshape(*hidden.shape[:2], -1))

    def _chosen(self, near: tuple[Tensor, Tensor, Tensor], far: tuple[Tensor, Tensor]) -> Tensor:
        """The operator's output, (batch, tokens, heads, size)."""
        small = self.candidate
        pattern = ChosenPattern(small.window, small.blocks, small.block, self.farthest)
        out, lse = attend_chosen(*near, pattern, far=far, trust=self.trust, scale=self.scaling)
        if self.sink is None:
            return out
        kept = torch.sigmoid(lse.transpose(1, 2) - self.sink)
        return (out * kept[..., None]).to(out.dtype)

    def _far(self, q: Tensor, k: Tensor, v: Tensor, bands: Bands) -> list[Part]:
        small, reach = self.candidate, self.farthest
        if small.far == "rungs":
            assert isinstance(self.pattern, tuple)
            rungs = tuple(d for d in self.pattern[0].distances if d > small.window)
            return [at_distances(q, k, v, rungs, bands, self.scaling)]
        if small.far == "means":
            return [span_means(q, k, v, spans(small.window, reach), self.bias, self.scaling)]
        if small.far == "best":
            assert self.trust is not None
            cut = spans(small.window, reach, small.blocks) if small.spans else None
            choice = Choice(small.window, reach, small.block, small.blocks, cut)
            return [best_blocks(q, k, v, choice, self.trust, bands, self.scaling)]
        return []

    def _window(self, device: torch.device) -> int | Tensor:
        widest = self.candidate.window
        if not (self.candidate.random_window and self.training):
            return widest
        return torch.randint(widest // 4, widest + 1, (), device=device)

    def _bands(self, tokens: int) -> tuple[Bands, Bands]:
        """Of the window and of what is far; a power of two, so that blocks and one band fit into the other."""
        small = 1 << (max(self.candidate.window, self.candidate.block) - 1).bit_length()
        large = max(1 << self.farthest.bit_length(), small)
        large = large if tokens > large else -(-tokens // small) * small
        whole = -(-tokens // large) * large
        return Bands(whole, small), Bands(whole, large)

    @staticmethod
    def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
        return x if norm is None else norm(x).to(x.dtype)


def use(candidate: Candidate, model: FibAttnForCausalLM, reach: int) -> None:
    """Let the sparse layers of a fresh model of the candidate's recipe read as it says, `reach` back at most."""
    if candidate.configured:
        return
    for number, layer in enumerate(model.model.layers):
        full = number in candidate.full
        attention: FibAttnAttention = layer.self_attn  # pyright: ignore
        if not (full or candidate.plain):
            attention = FarAttention(attention, candidate, reach)
            layer.self_attn = attention
        if candidate.half and not full:
            attention.pattern = _in_half(attention)
        if candidate.carry != "nothing" and not full:
            _carry(attention, candidate)


def _in_half(attention: FibAttnAttention) -> tuple[Pattern, ...]:
    """The layer's pattern for every second KV head, its window for the others."""
    assert isinstance(attention.pattern, tuple)
    heads = attention.k_proj.out_features // attention.head_dim
    patterns = attention.pattern * (heads // len(attention.pattern))
    return tuple(Pattern(one.window) if head % 2 else one for head, one in enumerate(patterns))


def _carry(attention: FibAttnAttention, candidate: Candidate) -> None:
    channels = attention.k_proj.out_features
    if candidate.carry == "shift":
        attention.k_proj = nn.Sequential(attention.k_proj, Shift(attention.head_dim))  # pyright: ignore
        return
    attention.k_proj = nn.Sequential(attention.k_proj, Convolution(channels))  # pyright: ignore
    attention.v_proj = nn.Sequential(attention.v_proj, Convolution(channels))  # pyright: ignore


def _later(x: Tensor, back: int) -> Tensor:
    """(batch, tokens, channels), each token's `back` tokens before; zeros before the first."""
    return functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
