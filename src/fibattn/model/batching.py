"""Continuous batching by Transformers: `generate_batch` and `transformers serve --continuous-batching`.

Its manager keeps full layers in pages and sliding ones in a paged ring for each request, one window for all of them. So
it is shown the configuration with every bounded layer as a sliding one of the longest reach, and bounded layers read
what the ring hands out: the keys of every request, one after the other, in which `attend_paged` knows their distances.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.utils import logging

from fibattn.attention.paged import Batch, attend_paged
from fibattn.errors import InputError
from fibattn.model.configuration import check_engine
from fibattn.pattern import LearnedPattern, Pattern, reach_of

_log: Any = logging.get_logger(f"transformers.{__name__}")

_update: Any = PagedAttentionCache.update  # pyright: ignore[reportAttributeAccessIssue]
LAYERS_UPDATE = "kwargs" in inspect.signature(_update).parameters
"""Whether a layer may update the cache itself; up to 5.17 its attention has to."""

CONVERTED_FULL = "sdpa" if LAYERS_UPDATE else "paged|sdpa"
"""The attention of those layers of a converted model that keep to everything."""


class _Shown:
    """Something with a few attributes of its own, and all others those of another object."""

    def __init__(self, behind: Any, **own: Any):
        self.__dict__.update(own, _behind=behind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._behind, name, value)


class _ShownConfig(_Shown):
    """A configuration as the manager's cache reads it."""

    def get_text_config(self, **_: Any) -> "_ShownConfig":
        return self


class _ShownModel(_Shown):
    """A model with another configuration."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._behind(*args, **kwargs)

    def eval(self) -> "_ShownModel":
        self._behind.eval()
        return self


def start_batching(
    model: PreTrainedModel, patterns: Sequence[Any], *args: Any, **kwargs: Any
) -> ContinuousBatchingManager:
    """What `init_continuous_batching` returns, for a model whose layers attend by these patterns (None: to all)."""
    for pattern in patterns:
        check_engine("continuous batching", pattern)
    reaches = [None if pattern is None else reach_of(pattern) for pattern in patterns]
    bounded = [reach for reach in reaches if reach is not None]
    window = max(bounded, default=0) + 1
    own: dict[str, Any] = {
        "layer_types": ["full_attention" if reach is None else "sliding_attention" for reach in reaches],
        "sliding_window": window,
    }
    of_model: dict[str, Any] = {}
    if len(bounded) == len(reaches):
        # No layer's attention is Transformers'. So it calls what reads lengths, and makes no masks.
        own["_attn_implementation"] = "paged|flash_fibattn"
    elif hasattr(model.base_model, "fibattn"):
        own["_attn_implementation"] = CONVERTED_FULL
        of_model = {"_supports_flash_attn": False, "set_attn_implementation": lambda _: None}
    shown: Any = _ShownModel(model, config=_ShownConfig(model.config, **own), **of_model)
    manager = GenerationMixin.init_continuous_batching(shown, *args, **kwargs)
    _log.info(memory_of_a_request(model.config, [None if reach is None else window for reach in reaches], model.dtype))
    add = manager.add_request

    def add_request(input_ids: list[int], *args: Any, **kwargs: Any) -> str | None:
        check_requests([input_ids])
        return add(input_ids, *args, **kwargs)

    manager.add_request = add_request
    create = manager._create_batch_processor

    def create_settled() -> Any:
        # Transformers (5.17 to 5.24) clears its buffers on this thread's stream, and fills them on others that do not
        # wait for it: while the GPU is busy, the first requests would be cleared again.
        processor = create()
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return processor

    manager._create_batch_processor = create_settled
    return manager


def check_requests(requests: Sequence[Sequence[int]]) -> None:
    """Refuse a request without tokens."""
    if any(not len(one) for one in requests):
        raise InputError("a request has no tokens; a prompt has at least one, such as the model's bos_token_id")


def memory_of_a_request(config: PreTrainedConfig, kept: Sequence[int | None], dtype: torch.dtype) -> str:
    """What a server says of a request's cache when it starts, its layers keeping so many tokens (None: all)."""
    heads, size = config.num_key_value_heads, getattr(config, "head_dim", None)
    row = 2 * heads * (size or config.hidden_size // config.num_attention_heads) * dtype.itemsize
    bounded = [tokens for tokens in kept if tokens is not None]
    bound = f"{sum(bounded) * row / 2**20:.1f} MiB there at any length"
    others = f"; {(len(kept) - len(bounded)) * row / 2**10:.1f} KiB more a token in the others"
    said = f"{len(bounded)} of {len(kept)} layers are bounded: a request takes at most {bound}"
    return said + (others if len(bounded) < len(kept) else "")


def attend_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | tuple[Pattern, ...] | LearnedPattern,
    given: dict[str, Any],
    **how: Any,
) -> Tensor:
    """The output (1, tokens, query heads, head size) of a bounded layer for the tokens of all requests.

    Args:
        q: (1, tokens, query heads, head size).
        k, v: (1, KV heads, keys, head size), from `update`.
        given: what the manager hands to a model's forward.
        how: alpha and scale, as in `attend`.
    """
    starts, key_starts = given["cu_seq_lens_q"], given["cu_seq_lens_k"]
    if isinstance(key_starts, dict):
        key_starts = key_starts["sliding_attention"]
    longest = given.get("max_length_q", given.get("max_seqlen_q", 0))
    batch = Batch(starts, key_starts.diff(), longest, first=key_starts[:-1])
    return attend_paged(q[0], k.transpose(1, 2), v.transpose(1, 2), pattern, batch, **how)[None]


def update(cache: Any, k: Tensor, v: Tensor, layer: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Write keys and values; those that the tokens of all requests may read, (1, KV heads, tokens, head size)."""
    if LAYERS_UPDATE:
        return cache.update(k, v, layer, kwargs=given)
    k, v = cache.update(k, v, layer, read_index=given["read_index"], write_index=given["write_index"])
    return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def mask_of_full_layers(attention_mask: Tensor | dict[str, Tensor] | None) -> Tensor | None:
    """The mask of the full layers among those that the manager made."""
    return attention_mask.get("full_attention") if isinstance(attention_mask, dict) else attention_mask
