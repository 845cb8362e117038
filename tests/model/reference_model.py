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


def by_choice(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], v: Tensor, layer, scale: float) -> Tensor:
    """A layer whose queries choose, one query at a time: the window's keys, then those of the best blocks."""
    config, (q, k), (far_q, far_k), out = layer.config, near, far, torch.zeros_like(near[0])
    group, size = q.shape[0] // k.shape[0], config.block_size
    for i in range(q.shape[1]):
        starts = [s for s in range(0, i - size + 1, size) if config.window < i - s <= config.block_reach]
        for kv in range(k.shape[0]):
            heads = slice(kv * group, (kv + 1) * group)
            means = [far_k[kv, s : s + size].mean(dim=0) for s in starts]
            taken: list[int] = []
            if starts:
                shares = (far_q[heads, i] @ torch.stack(means).T * scale).softmax(dim=-1).sum(dim=0)
                taken = shares.topk(min(config.blocks, len(starts))).indices.tolist()
            if config.block_anchor and 0 in starts and 0 not in taken:
                taken = [0, *taken[: config.blocks - 1]]
            window = range(max(i - config.window, 0), i + 1)
            scores, read = [q[heads, i] @ k[kv, list(window)].T], list(window)
            for number in taken:
                own = [j for j in range(starts[number], starts[number] + size) if i - j > config.window]
                trusted = float(layer.trust[kv].detach()) * means[number]
                scores.append(far_q[heads, i] @ (far_k[kv, own] + trusted).T)
                read += own
            out[heads, i] = (torch.cat(scores, dim=1) * scale).softmax(dim=-1) @ v[kv, read]
    return out


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """To each channel of x (heads, tokens, size) a sum over its last tokens, `weight` (taps, heads · size), added."""
    total = x.clone()
    for back, factor in enumerate(weight.unflatten(1, (x.shape[0], x.shape[2]))):
        total[:, back:] += x[:, : x.shape[1] - back] * factor[:, None]
    return total


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
        if config.value_embeddings and number % 2 != config.num_hidden_layers % 2:
            gate = 2 * (h @ weights[f"model.{at}.self_attn.value_gate.weight"].T).sigmoid()
            own = weights[f"model.{at}.self_attn.value_embedding.weight"][ids].view(length, -1, size)
            v = v + (gate[..., None] * own).transpose(0, 1)
        if config.kv_convolution and kind != "full_attention":
            of_keys, of_values = weights[f"model.{at}.self_attn.kv_convolution"]
            k, v = convolved(k, of_keys), convolved(v, of_values)
        if config.qk_norm:
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        far = q, k
        if config.no_rope_layers[number]:
            plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
            rope = config.rope_parameters if kind == "full_attention" else plain
            q, k = rotate(q, rope), rotate(k, rope)
        near, values = (q, k), v
        far = near if config.block_rope else far
        k, v = (one.repeat_interleave(q.shape[0] // one.shape[0], dim=0) for one in (k, v))
        if config.learns_alpha(number):
            out = interpolated(q, k, v, layer.self_attn, scale)
        elif kind == "chosen_attention":
            out = by_choice(near, far, values, layer.self_attn, scale)
        else:
            patterns = config.layer_patterns(number)
            window = config.window
            if kind == "full_attention":
                window = length if config.full_reach is None else config.full_reach
            distances = (*range(window + 1), *(patterns[0].offsets if patterns else ()))
            out = weights_over_keys(distances, q @ k.transpose(1, 2) * scale) @ v
        if config.head_gates:
            out = out * 2 * (h @ weights[f"model.{at}.self_attn.head_gate.weight"].T).sigmoid().T[..., None]
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
