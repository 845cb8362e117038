"""vLLM's attention backend for bounded layers: `attend_paged` over its cache.

A block of a layer holds keys and values of `block size` tokens, heads first: (blocks, KV heads, block size, 2 × head
size). vLLM writes new tokens and attends in two calls. Nothing is read back to the host, and a kernel's grid follows
from shapes, so full CUDA graphs of any batch are safe.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from fibattn.attention.paged import Batch, attend_paged, store_paged
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern

_CACHED = ("auto", "float16", "bfloat16", "float32")


class FibAttnBackend(AttentionBackend):
    """What vLLM asks before it makes a layer."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = list(_CACHED)
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's registry."""
        return "FIBATTN"

    @staticmethod
    def get_impl_cls() -> type["FibAttnImpl"]:
        """What a layer runs."""
        return FibAttnImpl

    @staticmethod
    def get_builder_cls() -> type["FibAttnMetadataBuilder"]:
        """What makes a step's metadata."""
        return FibAttnMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any size that vLLM has."""
        return [MultipleOf(16)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """A window says which blocks are kept."""
        return True


class FibAttnMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """A step's metadata is vLLM's own, under other names."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        """For one group of layers."""
        given = common_attn_metadata
        return Batch(given.query_start_loc, given.seq_lens, given.max_query_len, given.block_table_tensor)


class FibAttnImpl(AttentionImpl[Batch]):
    """The attention of one layer, whose pattern it was given; with a `theta` that of a learned scale."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        *_: Any,
        pattern: tuple[Pattern, ...] | LearnedPattern,
        theta: Tensor | None,
    ):
        if kv_cache_dtype not in _CACHED:
            raise InputError(f"kv_cache_dtype is {kv_cache_dtype!r}; fibattn's layers take {', '.join(_CACHED)}")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), num_kv_heads
        self.sliding_window, self.kv_cache_dtype = sliding_window, kv_cache_dtype
        self.pattern, self.theta = pattern, theta

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new tokens (tokens, KV heads, head size)."""
        tokens = slot_mapping.shape[0]
        store_paged(key[:tokens], value[:tokens], *self._pages(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """`output` (tokens, heads, head size), which it fills; there is no metadata while vLLM measures memory."""
        if attn_metadata is None:
            return output.zero_()
        alpha = None if self.theta is None else 0.5 + torch.sigmoid(self.theta)
        how: dict[str, Any] = {"alpha": alpha, "scale": self.scale, "out": output}
        return attend_paged(query, *self._pages(kv_cache), self.pattern, attn_metadata, **how)

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values
