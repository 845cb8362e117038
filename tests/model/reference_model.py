"""The model once more, in plain formulas and float64, to compare with. One row of tokens, no cache."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fibattn import FibAttnForCausalLM


def llama_config(config, **changes) -> LlamaConfig:
    """The Llama of the same shape."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    return LlamaConfig(**{name: getattr(config, name) for name in names}, **changes)


def weights_over_keys(distances, scores: Tensor) -> Tensor:
    """Softmax of scores (heads, tokens, tokens) over the keys at `distances` before each query."""
    index = torch.arange(scores.shape[1])
    distance = index[:, None] - index
    mask = torch.zeros_like(distance, dtype=torch.bool)
    for one in distances:
        mask |= distance == one
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)


def interpolated(q: Tensor, k: Tensor, v: Tensor, layer, scale: float) -> Tensor:
    """A learned layer, query by query: the window's keys, then one mixed key and value for every rung."""
    config, alpha, out = layer.config, float(layer.alpha.detach()), torch.zeros_like(q)
    for i in range(q.shape[1]):
        keys = [k[:, i - d] for d in range(min(config.window, i) + 1)]
        values = [v[:, i - d] for d in range(min(config.window, i) + 1)]
        for rung in config.learned_pattern.at(alpha):
            if i >= rung.near:
                part, near, far = alpha * config.base_rungs[rung.index] - rung.near, i - rung.near, i - rung.near - 1
                keys.append((1 - part) * k[:, near] + part * k[:, max(far, 0)])
                values.append((1 - part) * v[:, near] + part * v[:, max(far, 0)])
        scores = torch.einsum("hd,khd->hk", q[:, i], torch.stack(keys)) * scale
        out[:, i] = torch.einsum("hk,khd->hd", scores.softmax(dim=-1), torch.stack(values))
    return out


def logits(model: FibAttnForCausalLM, ids: Tensor) -> Tensor:
    """Logits of one row of tokens: (tokens,) in, (tokens, vocabulary) out."""
    config, weights = model.config, {name: value.detach().double() for name, value in model.state_dict().items()}
    length, size, scale = len(ids), config.head_dim, config.head_dim**-0.5

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[f"model.{name}.weight"]

    def rotate(x: Tensor, rope: dict) -> Tensor:
        embedding = LlamaRotaryEmbedding(llama_config(config, rope_parameters=rope))
        embedding(torch.zeros(1), torch.arange(length)[None])  # dynamic scaling sees the length
        angles = torch.arange(length)[:, None] * embedding.inv_freq.double().repeat(2)
        cosine, sine = (wave(angles) * embedding.attention_scaling for wave in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    x = weights["model.embed_tokens.weight"][ids]
    if config.embedding_skip:
        x = norm(x, "embed_norm")
    embedded = x
    for number, layer in enumerate(model.model.layers):
        kind, at = config.layer_types[number], f"layers.{number}"
        if config.embedding_skip:
            of_stream, of_embedding = weights[f"model.{at}.skip"]
            x = of_stream * x + of_embedding * embedded
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (h @ weights[f"model.{at}.self_attn.{name}_proj.weight"].T).view(length, -1, size).transpose(0, 1)
            for name in "qkv"
        )
        if config.qk_norm:
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        if config.no_rope_layers[number]:
            plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
            rope = config.rope_parameters if kind == "full_attention" else plain
            q, k = rotate(q, rope), rotate(k, rope)
        k, v = (one.repeat_interleave(q.shape[0] // one.shape[0], dim=0) for one in (k, v))
        if config.learns_alpha(number):
            out = interpolated(q, k, v, layer.self_attn, scale)
        else:
            patterns = config.layer_patterns(number)
            window = config.window
            if kind == "full_attention":
                window = length if config.full_reach is None else config.full_reach
            distances = (*range(window + 1), *(patterns[0].offsets if patterns else ()))
            out = weights_over_keys(distances, q @ k.transpose(1, 2) * scale) @ v
        x = x + out.transpose(0, 1).reshape(length, -1) @ weights[f"model.{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        up, down = (weights[f"model.{at}.mlp.{name}_proj.weight"] for name in ("up", "down"))
        if config.gated_mlp:
            assert config.hidden_act == "silu"
            inner = functional.silu(h @ weights[f"model.{at}.mlp.gate_proj.weight"].T) * (h @ up.T)
        else:
            assert config.hidden_act == "relu2"
            inner = (h @ up.T).relu() ** 2
        x = x + inner @ down.T
    return norm(x, "norm") @ weights["lm_head.weight"].T
