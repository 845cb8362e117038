"""The decoder in vLLM's layers: Llama's there, with projections and attention of our own kind.

Weights, quantisation, adapters, tensor and pipeline parallelism are vLLM's, as for any Llama.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.sequence import IntermediateTensors

from fibattn.errors import InputError
from fibattn.model.batching import memory_of_a_request
from fibattn.model.rotary import FibAttnRotaryEmbedding, Rotation, rotate
from fibattn.serving.backend import FibAttnBackend
from fibattn.serving.plan import windows

_log = init_logger(f"vllm.{__name__}")


def planned(vllm_config: VllmConfig) -> list[int | None]:
    """How many tokens of every layer are kept."""
    block, chunk = vllm_config.cache_config.block_size, vllm_config.scheduler_config.max_num_batched_tokens
    return windows(vllm_config.model_config.hf_config, block, chunk, vllm_config.model_config.max_model_len)


class FibAttnAttention(nn.Module):
    """The attention of one layer, on each rank that of some heads."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quantised = vllm_config.model_config.hf_config, vllm_config.quant_config
        index, ranks = extract_layer_index(prefix), get_tensor_model_parallel_world_size()
        size, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.heads, self.kv_heads = size, heads // ranks, max(1, kv_heads // ranks)
        self.rotated = bool(config.no_rope_layers[index])
        self.scales_rope = config.rope_scales_all or config.layer_types[index] == "full_attention"
        of_qkv = {"bias": config.attention_bias or config.qkv_bias, "prefix": f"{prefix}.qkv_proj"}
        of_out = {"bias": config.attention_bias, "prefix": f"{prefix}.o_proj"}
        self.qkv_proj = QKVParallelLinear(config.hidden_size, size, heads, kv_heads, quant_config=quantised, **of_qkv)
        self.o_proj = RowParallelLinear(heads * size, config.hidden_size, quant_config=quantised, **of_out)
        self.q_norm, self.k_norm = (RMSNorm(size, eps=config.rms_norm_eps) if config.qk_norm else None for _ in "qk")
        of_gate = {"bias": False, "prefix": f"{prefix}.head_gate"}
        self.head_gate = ColumnParallelLinear(config.hidden_size, heads, **of_gate) if config.head_gates else None
        self.value_gate = self.value_embedding = None
        if config.embeds_values(index):
            of_value_gate = {"bias": False, "prefix": f"{prefix}.value_gate"}
            self.value_gate = ReplicatedLinear(config.hidden_size, kv_heads, **of_value_gate)
            self.value_embedding = VocabParallelEmbedding(config.vocab_size, kv_heads * size)
        self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if config.learns_alpha(index) else None
        first = get_tensor_model_parallel_rank() * kv_heads // ranks
        self.own_kv_heads = slice(first, first + self.kv_heads)
        window, how = planned(vllm_config)[index], {}
        if window is not None:
            pattern = config.learned_pattern if config.learns_alpha(index) else config.layer_patterns(index)
            if config.stagger_heads and len(pattern) > 1:
                pattern = pattern[self.own_kv_heads]
            how = {"per_layer_sliding_window": window, "attn_backend": FibAttnBackend}
            how.update(pattern=pattern, theta=self.theta)
        self.attn = Attention(
            *(self.heads, size, size**-0.5, self.kv_heads),
            cache_config=vllm_config.cache_config,
            quant_config=quantised,
            prefix=f"{prefix}.attn",
            **how,
        )

    def forward(
        self, positions: tuple[Rotation, Rotation, Tensor | None, Tensor | None], hidden_states: Tensor
    ) -> Tensor:
        """`hidden_states` (tokens, hidden size) in and out; `positions` as in a layer."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        if self.value_gate is not None and self.value_embedding is not None:
            # Every rank is given all KV heads' of both, which are few.
            gates = 2 * torch.sigmoid(self.value_gate(hidden_states)[0])
            embedded = self.value_embedding(positions[3]).unflatten(-1, (-1, self.head_dim)) * gates[..., None]
            v = v + embedded[:, self.own_kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        if self.rotated:
            q, k = (rotate(x[None], positions[self.scales_rope])[0] for x in (q, k))
        out = self.attn(q.flatten(-2), k.flatten(-2), v.flatten(-2))
        if self.head_gate is not None:
            gates = 2 * torch.sigmoid(self.head_gate(hidden_states)[0])
            out = (out.unflatten(-1, (self.heads, self.head_dim)) * gates[..., None]).flatten(-2)
        return self.o_proj(out)[0]


class _Gated(nn.Module):
    def __init__(self, activation: str):
        super().__init__()
        self.activation = ACT2FN[activation]

    def forward(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.activation(gate) * up


class _Ungated(nn.Module):
    def __init__(self, config: Any, quant_config: Any, bias: bool, prefix: str):
        super().__init__()
        hidden, inner, how = config.hidden_size, config.intermediate_size, {"quant_config": quant_config, "bias": bias}
        self.up_proj = ColumnParallelLinear(hidden, inner, prefix=f"{prefix}.up_proj", **how)
        self.down_proj = RowParallelLinear(inner, hidden, prefix=f"{prefix}.down_proj", **how)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)[0]))[0]


class FibAttnDecoderLayer(LlamaDecoderLayer):
    """Llama's, with our attention, any activation, and where the model has one the skip from its embedding."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.hidden_size = config.hidden_size
        self.self_attn = FibAttnAttention(vllm_config, f"{prefix}.self_attn")
        given = {"quant_config": vllm_config.quant_config, "bias": config.mlp_bias, "prefix": f"{prefix}.mlp"}
        if config.gated_mlp:
            self.mlp: nn.Module = LlamaMLP(config.hidden_size, config.intermediate_size, "silu", **given)
        else:
            self.mlp = _Ungated(config, **given)
        if config.gated_mlp and config.hidden_act != "silu":
            self.mlp.act_fn = _Gated(config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.skip = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_skip else None

    def forward(self, positions: Any, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As Llama's; for positions both rotations of the tokens, their embedding, and their ids."""
        if self.skip is not None:
            stream = hidden_states if residual is None else hidden_states + residual
            hidden_states, residual = self.skip[0] * stream + self.skip[1] * positions[2], None
        return super().forward(positions, hidden_states, residual)


@support_torch_compile
class FibAttnModel(LlamaModel):
    """Llama's, with rotary positions from float64 at any length."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = FibAttnDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        config = vllm_config.model_config.hf_config
        self.rotary_emb = FibAttnRotaryEmbedding(config, scaled=False)
        scaled = config.rope_parameters["rope_type"] != "default"
        self.scaled_rotary_emb = FibAttnRotaryEmbedding(config, scaled=True) if scaled else None
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.embed_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.embedding_skip else None
        if not config.gated_mlp:
            stacked = LlamaModel.hf_to_vllm_mapper.orig_to_new_stacked
            self.hf_to_vllm_mapper = WeightsMapper(
                orig_to_new_stacked={name: of for name, of in stacked.items() if of[0] == ".qkv_proj"}
            )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """As Llama's, whose layers are handed the rotations of the tokens for their positions."""
        plain = self.rotary_emb(self.like, positions[None])
        scaled = plain if self.scaled_rotary_emb is None else self.scaled_rotary_emb(self.like, positions[None])
        if self.embed_norm is not None:
            inputs_embeds = self.embed_norm(self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds)
        given = (plain, scaled, inputs_embeds, input_ids)
        return super().forward(input_ids, given, intermediate_tensors, inputs_embeds)


class FibAttnForCausalLM(LlamaForCausalLM):
    """What vLLM makes of a folder with a `FibAttnForCausalLM`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        config.check_engine("the model for vLLM")
        if config.embedding_skip and vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise InputError("embedding_skip is True, and the embedding is on the first pipeline rank alone: use one")
        if config.value_embeddings and vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise InputError("value_embeddings is True, which was not tried on several pipeline ranks: use one")
        if config.value_embeddings and vllm_config.model_config.enable_prompt_embeds:
            raise InputError(
                "enable_prompt_embeds is True, but this model has value_embeddings: the ids of tokens decide its "
                "values; leave it out"
            )
        if not config.gated_mlp:
            self.packed_modules_mapping = {"qkv_proj": self.packed_modules_mapping["qkv_proj"]}
        chunk, longest = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len
        kept = [None if one is None else min(one - 1 + chunk, longest) for one in planned(vllm_config)]
        more = "" if None in kept else f"; beyond {longest:,} tokens: VLLM_ALLOW_LONG_MAX_MODEL_LEN=1, --max-model-len"
        _log.info_once(memory_of_a_request(config, kept, vllm_config.model_config.dtype) + more)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> FibAttnModel:
        return FibAttnModel(vllm_config=vllm_config, prefix=prefix)


class FibAttnConvertedForCausalLM(LlamaForCausalLM):
    """Refuses a converted model of an architecture that is not ours."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> NoReturn:
        kind = (vllm_config.model_config.hf_config.source or {}).get("model_type")
        raise InputError(
            f"this is a converted {kind} model, which vLLM would have to know sparse; it serves those that are saved "
            "as a FibAttnForCausalLM (llama, mistral, qwen2, qwen3, smollm3). Use transformers serve "
            "--continuous-batching"
        )
