"""A layer of the model: attention to a pattern or to everything, and the feed-forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from fibattn.model import batching
from fibattn.model.attention import attend_with_ring
from fibattn.model.cache import RingLayer, check_full, ring_of
from fibattn.model.configuration import FibAttnConfig
from fibattn.model.convolution import convolved
from fibattn.model.feed_forward import gains_from_padding, padded_gated
from fibattn.model.gate import FibAttnGate
from fibattn.model.layer import LearnedScale, new_theta
from fibattn.model.norm import FibAttnRMSNorm
from fibattn.model.positions import Shard
from fibattn.model.rotary import Rotation, rotate
from fibattn.pattern import ChosenPattern


class FibAttnAttention(LearnedScale):
    """Grouped-query attention of one layer: with a pattern through `fibattn.attend`, full through Transformers."""

    def __init__(self, config: FibAttnConfig, layer: int):
        super().__init__()
        heads, kv_heads, size = (config.num_attention_heads, config.num_key_value_heads or 1, config.head_dim or 1)
        self.config, self.layer_idx, self.head_dim = config, layer, size
        self.num_key_value_groups = heads // kv_heads
        self.scaling, self.attention_dropout, self.is_causal = size**-0.5, 0.0, True
        self.theta = new_theta() if config.learns_alpha(layer) else None
        self.attend_by(config)
        taps = 0 if (config.layer_types or [])[layer] == "full_attention" else config.kv_convolution
        self.trust = nn.Parameter(torch.ones(kv_heads)) if config.chooses(layer) else None
        self.kv_convolution = nn.Parameter(torch.zeros(2, taps, kv_heads * size)) if taps else None
        bias = config.attention_bias or config.qkv_bias
        self.head_gate = FibAttnGate(config.hidden_size, heads) if config.head_gates else None
        embeds = config.embeds_values(layer)
        self.value_gate = FibAttnGate(config.hidden_size, kv_heads) if embeds else None
        self.value_embedding = nn.Embedding(config.vocab_size, kv_heads * size) if embeds else None
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=bias)
        self.o_proj = _residual_output(nn.Linear(heads * size, config.hidden_size, bias=config.attention_bias))
        self.q_norm, self.k_norm = (FibAttnRMSNorm(size, config.rms_norm_eps) if config.qk_norm else None for _ in "qk")

    def attend_by(self, config: FibAttnConfig) -> None:
        """Attend to what `config` says of this layer."""
        layer = self.layer_idx
        self.scales_rope = config.rope_scales_all or (config.layer_types or [])[layer] == "full_attention"
        self.rotated, self.block_rope = bool((config.no_rope_layers or [])[layer]), config.block_rope
        self.pattern = config.layer_pattern(layer)
        self.reach = config.layer_reach(layer)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | PagedAttentionCache | None,
        cache_positions: Tensor,
        shard: Shard | None = None,
        token_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`hidden` (batch, tokens, hidden size) in and out; `positions` as in `attend`, for sparse layers.

        `cache_positions` (1, tokens) count the tokens that went into `cache` before each of these. With a `shard` they
        are a part of each row, and full layers take positions, too. `token_ids`, int64 (batch, tokens), are what value
        embeddings need.
        """
        shape = (*hidden.shape[:2], -1, self.head_dim)
        q, k, v = (project(hidden).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.value_embedding is not None and self.value_gate is not None:
            v = v + self.value_gate(hidden, self.value_embedding(token_ids).view(shape).to(v.dtype))
        ring = None
        if isinstance(cache, Cache) and self.pattern is not None:
            taps = 0 if self.kv_convolution is None else self.kv_convolution.shape[1]
            ring = ring_of(cache, self.layer_idx, self.pattern, max(self.reach or 0, taps - 1))
        raw: tuple[Tensor, ...] = ()
        if self.kv_convolution is not None:
            raw = k, v
            k, v = convolved(raw, self.kv_convolution, ring, positions, cache_positions, shard)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        far = None if self.block_rope else (q, k)
        if self.rotated:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = self.attend(q, k, v, far, raw, ring, attention_mask, positions, cache, cache_positions, shard, **kwargs)
        if self.head_gate is not None:
            out = self.head_gate(hidden, out)
        return self.o_proj(out.reshape(*hidden.shape[:2], -1))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far: tuple[Tensor, Tensor] | None,
        raw: tuple[Tensor, ...],
        ring: RingLayer | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | PagedAttentionCache | None,
        cache_positions: Tensor,
        shard: Shard | None,
        **kwargs: Any,
    ) -> Tensor:
        """Of q (batch, tokens, query heads, head size) to k and v, and to what is in a cache or in other parts.

        `far` are q and k for chosen blocks, where those are others; `raw`, if anything, k and v before the convolution,
        which the `ring` of the cache keeps, too.
        """
        how: dict[str, Any] = {"scale": self.scaling, "positions": positions}
        chooses = isinstance(self.pattern, ChosenPattern)
        how |= {"far": far, "trust": self.trust} if chooses else {"alpha": self.alpha}
        if shard is not None:
            return shard.attend(q, k, v, self.pattern, **how)
        if self.pattern is None:
            return self._attend_fully(q, k, v, attention_mask, cache, **kwargs)
        if isinstance(cache, PagedAttentionCache):
            k, v = batching.update(cache, k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, kwargs)
            pattern: Any = self.pattern  # one that chooses did not come this far
            return batching.attend_batch(q, k, v, pattern, kwargs, alpha=self.alpha, scale=self.scaling)
        return attend_with_ring(q, k, v, self.pattern, ring, cache_positions, raw, **how)

    def _attend_fully(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | PagedAttentionCache | None,
        **kwargs: Any,
    ) -> Tensor:
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), eager_attention_forward
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if isinstance(cache, PagedAttentionCache):
            if batching.LAYERS_UPDATE:
                k, v = batching.update(cache, k, v, self.layer_idx, kwargs)
            else:
                kwargs["cache"] = cache
        elif cache is not None:
            check_full(cache, self.layer_idx, k.shape[2])
            k, v = cache.update(k, v, self.layer_idx)
        return interface(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)[0]


class FibAttnMLP(nn.Module):
    """The feed-forward, with a gate (SwiGLU for `silu`) or without."""

    def __init__(self, config: FibAttnConfig):
        super().__init__()
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(outer, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(outer, inner, bias=bias)
        self.down_proj = _residual_output(nn.Linear(inner, outer, bias=bias))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` (batch, tokens, hidden size) in and out."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden)))
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if gains_from_padding(hidden, projections):
            return padded_gated(hidden, *(one.weight for one in projections), act=self.act_fn)
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def _residual_output(linear: nn.Linear) -> nn.Linear:
    """Mark a projection that writes to the residual stream; its initial weights are scaled down."""
    linear.writes_residual = True  # pyright: ignore
    return linear


class FibAttnDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: FibAttnConfig, layer: int):
        super().__init__()
        self.self_attn = FibAttnAttention(config, layer)
        self.mlp = FibAttnMLP(config)
        self.input_layernorm = FibAttnRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = FibAttnRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.skip = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_skip else None

    def forward(self, hidden: Tensor, embedded: Tensor, **kwargs: Any) -> Tensor:
        """`hidden` (batch, tokens, hidden size) in and out, `embedded` likewise; the rest goes to the attention."""
        if self.skip is not None:
            hidden = self.skip[0] * hidden + self.skip[1] * embedded
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **kwargs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
