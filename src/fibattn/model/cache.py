"""Caches of bounded size: a sparse layer keeps a ring of as many tokens as it can look back, and its newest.

A dynamic ring grows with its sequence until it has that size, so a short text takes no more than it has tokens.

The rings are cache layers of Transformers, for `DynamicCache` and `StaticCache` alike. A cache that was made
without knowing of them (with no configuration, or for window-only layers, which Transformers would give a
cache of its own) has its still empty layers replaced when a model first uses them, because only the model
knows how far each of its layers looks back. Layers with full attention keep what Transformers gave them.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    StaticLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fibattn.attention import ring as rings
from fibattn.errors import InputError

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What the installed version calls a cache in its models' arguments and outputs; renamed in the course of version 5."""


def _writable() -> torch.inference_mode:
    """What is made inside can be written to in any mode; a buffer made in inference mode, in that alone."""
    return torch.inference_mode(False)


class RingLayer(CacheLayerMixin):
    """What both kinds of ring share: `keys` and `values` (batch, KV heads, rows, head size).

    Token `p` of the sequence is in row `p mod rows`. There are `reach + 1` rows, fewer while a dynamic ring grows, but
    then no fewer than tokens. `owner` says which pattern the tokens were written for, so that another model's cache
    is noticed.
    """

    is_sliding = True
    supports_early_init = False
    reach = -1
    owner: object = None
    half_cropped = False
    """Whether it refused to go back, so that layers before it may have gone."""

    def claim(self, owner: object, reach: int) -> None:
        """Size the ring for a layer that looks back `reach` tokens."""
        self.owner, self.reach = owner, reach

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, for keys and values of the given batch, heads and head size."""
        if self.reach < 0:
            raise InputError("this cache layer belongs to no layer of a model yet; let the model write to it")
        self.device, self.batch_size = key_states.device, key_states.shape[0]
        batch, heads, tokens, _ = key_states.shape
        with _writable():
            rows = (batch, heads, self._rows_for(tokens))
            self._hold(*(key_states.new_zeros(*rows, x.shape[3]) for x in (key_states, value_states)))
        self.is_initialized = True

    def _rows_for(self, tokens: int) -> int:
        """How many rows a sequence of so many tokens needs."""
        return self.reach + 1

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        if not torch.compiler.is_compiling():
            # CUDA graphs may then write to the buffers in place.
            torch._dynamo.mark_static_address(keys)
            torch._dynamo.mark_static_address(values)

    @property
    def _rings(self) -> tuple[Tensor, Tensor]:
        """Views of the buffers, (batch, rows, KV heads, head size), as `attend_cached` takes them."""
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)  # pyright: ignore[reportOptionalMemberAccess]

    def take(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Count the tokens k and v (batch, tokens, KV heads, head size), and hand out the rings to write them to.

        Raises:
            InputError: when the buffers are of another batch, shape or dtype.
        """
        if not self.is_initialized:
            self.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        ring = self._rings[0]
        held, new = (ring.shape[0], *ring.shape[2:]), (k.shape[0], *k.shape[2:])
        if held != new or ring.dtype != k.dtype or ring.device != k.device:
            raise InputError(
                f"the cache holds (batch, KV heads, head size) {held} in {ring.dtype} on {ring.device}, the "
                f"model gives {new} in {k.dtype} on {k.device}; use the cache with the model and batch it was made for"
            )
        self.count(k, v)
        return self._rings

    def begin(self, k: Tensor, v: Tensor, length: int) -> None:
        """Hold a sequence of `length` tokens, of which k and v (batch, tokens, KV heads, head size) are the newest:
        `reach + 1`, or all."""
        at = torch.arange(length - k.shape[1], length, device=k.device)[None]
        for ring, new in zip(self.take(k, v), (k, v), strict=True):
            rings.store(ring, new, at)

    def before(self, cache_positions: Tensor, count: int) -> list[Tensor]:
        """The `count` keys and values before a chunk, (batch, count, KV heads, head size), oldest first."""
        return [rings.before(ring, cache_positions, count) for ring in self._rings]

    def count(self, k: Tensor, v: Tensor) -> None:
        """Note that the tokens k and v are about to be written, and see that there is room."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens; returns what they may attend to: the `reach` tokens before them, and themselves."""
        k, v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        positions = torch.arange(k.shape[1], device=k.device)[None] + self.get_seq_length()
        seen = []
        for ring, new in zip(self.take(k, v), (k, v), strict=True):
            seen.append(torch.cat([rings.before(ring, positions, self.reach), new], dim=1).transpose(1, 2))
            rings.store(ring, new, positions)
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """How many keys `update` returns, and the position of the first."""
        return self.reach + query_length, self.get_seq_length() - self.reach

    def get_max_length(self) -> int:
        """No maximum: a ring never fills."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences into the order of `beam_idx`, in place."""
        if self.is_initialized:
            for ring in self._rings:
                ring.copy_(ring.index_select(0, beam_idx.to(self.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.is_initialized:
            self._select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        if self.is_initialized:
            self._select(indices.to(self.device))

    def _select(self, indices: Tensor) -> None:
        with _writable():
            self.keys, self.values = self.keys[indices], self.values[indices]  # pyright: ignore
        self.batch_size = self.keys.shape[0]


class DynamicRingLayer(RingLayer, DynamicLayer):
    """A ring that counts on the host, for `DynamicCache`; it grows, and can go back as far as it was told to record."""

    record_past = False

    def __init__(self, **_: Any):
        super().__init__()
        self.length = self._written = 0
        self._recorded: tuple[Tensor, Tensor] | None = None

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it can go back however far it has come; assisted decoding asks before it begins."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Keep every token from now on until the next `crop`, so that it can go back."""
        self.record_past = True

    def _rows_for(self, tokens: int) -> int:
        return min(self.reach + 1, tokens)

    def count(self, k: Tensor, v: Tensor) -> None:
        """As in `RingLayer`."""
        more = rings.lacking(self._rings[0].shape[1], self.length + k.shape[1], self.reach)
        if more:
            with _writable():
                self._hold(*(functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values)))  # pyright: ignore
        if self.record_past:
            self._recorded = tuple(  # pyright: ignore
                torch.cat([old, new.detach()], dim=1)
                for old, new in zip(self._recorded or self._newest(), (k, v), strict=True)
            )
        self.length += k.shape[1]
        self._written = max(self._written, self.length)

    def begin(self, k: Tensor, v: Tensor, length: int) -> None:
        """As in `RingLayer`, in few calls: a prompt may wait for the host. What was held is forgotten."""
        self.device, self.batch_size, self.is_initialized = k.device, k.shape[0], True
        rows = self._rows_for(length)
        with _writable():
            newest = (x.detach()[:, -rows:].transpose(1, 2) for x in (k, v))
            self._hold(*(x.roll(length % rows, 2).contiguous() for x in newest))
        self.length = self._written = length
        self._recorded = (k.detach(), v.detach()) if self.record_past else None

    def _newest(self) -> tuple[Tensor, ...]:
        """The newest tokens in order, `reach` of them or as many as there are."""
        last = torch.tensor([[self.length]], device=self.device)
        return tuple(rings.before(ring, last, min(self.reach, self.length)) for ring in self._rings)

    def get_seq_length(self) -> int:
        """How many tokens the sequence has had; the ring holds the last of them."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by `-tokens_to_remove` tokens, and forget what was recorded for it.

        Raises:
            InputError: when the ring no longer has the tokens that would then be within reach.
        """
        back, recorded, rows = -tokens_to_remove, self._recorded, self.reach + 1
        left = self.length - back
        if not 0 <= back <= self.length:
            self.half_cropped = True
            raise InputError(f"crop({tokens_to_remove}) of {self.length} tokens; give minus how many to remove")
        if self._written > max(rows, left + 1):  # the ring has the `rows` tokens before the farthest it ever came
            kept = 0 if recorded is None else recorded[0].shape[1] - back
            if recorded is None or kept < min(self.reach, left):
                self.half_cropped = True
                raise InputError(
                    f"{back} tokens cannot be removed: the layer has kept no more than its reach of {self.reach}; "
                    "call activate_past_recording() on the cache before writing the tokens that may have to go "
                    "(generate() does, but a converted or a bounded dense model cannot be its assistant)"
                )
            at = torch.arange(left - kept, left, device=self.device)[None]
            for ring, tokens in zip(self._rings, recorded, strict=True):
                rings.store(ring, tokens[:, :kept], at)
            self._written = max(left, left - kept + rows)
        self.length, self._recorded = left, None

    def reset(self) -> None:
        """Begin a new sequence with the same buffers."""
        self.length, self._written, self._recorded, self.half_cropped = 0, 0, None, False
        if self.is_initialized:
            for ring in self._rings:
                ring.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As in `RingLayer`."""
        super().reorder_cache(beam_idx)
        if self._recorded is not None:
            self._recorded = tuple(x.index_select(0, beam_idx.to(self.device)) for x in self._recorded)  # pyright: ignore

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        if self._recorded is not None:
            self._recorded = tuple(x[indices] for x in self._recorded)  # pyright: ignore


class StaticRingLayer(RingLayer, StaticLayer):
    """A ring that counts on the device, for `StaticCache` and compiled decoding; it cannot go back."""

    is_croppable = False

    def __init__(self, max_cache_len: int = -1, **_: Any):
        with _writable():
            super().__init__(max_cache_len)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As in `RingLayer`."""
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)

    def count(self, k: Tensor, v: Tensor) -> None:
        """As in `RingLayer`."""
        self.cumulative_length.add_(k.shape[1])

    def get_seq_length(self) -> Any:
        """How many tokens the sequence has had: a tensor on the device, changed in place, once there are any."""
        return self.cumulative_length if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless nothing is to be removed."""
        if tokens_to_remove:
            raise InputError(
                "a static cache of sparse layers cannot be cropped, it has already overwritten what would be within "
                "reach again; use a DynamicCache (leave cache_implementation out)"
            )


for _kind in ("fibonacci_attention", "chosen_attention"):
    DYNAMIC_LAYER_TYPE_MAPPING[_kind], STATIC_LAYER_TYPE_MAPPING[_kind] = DynamicRingLayer, StaticRingLayer


def only_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given by one of its two names; two different ones are refused."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise InputError(
            "cache and past_key_values are two different caches; give one. (peft's prefix tuning gives its prefix as "
            "past_key_values while generating: take LoRA)"
        )
    return past_key_values if cache is None else cache


def ring_of(cache: Cache, layer: int, owner: object, reach: int) -> RingLayer:
    """The ring of a sparse layer in any cache of a decoder, put there when the layer has not been used yet.

    A cache that was written for another `owner` (what tokens are attended by, such as the layer's patterns) is refused.
    """
    found = cache.layers[layer] if layer < len(cache.layers) else None
    if isinstance(found, RingLayer) and found.reach >= 0:
        if not found.owner == owner:  # the compiler knows no `!=` where a pattern's numbers are symbols
            raise InputError(
                f"layer {layer} of the cache was written for the pattern {found.owner}, the model has {owner}; "
                "a cache belongs to the model that made it: begin a new one"
            )
        if found.half_cropped and layer:
            raise InputError(f"layer {layer} of the cache refused a crop that layers before it made; begin a new cache")
        return found
    if not isinstance(found, RingLayer):
        empty = isinstance(found, CacheLayerMixin) and not (found.is_initialized and found.get_seq_length())
        if found is not None and not empty:
            raise InputError(
                f"layer {layer} of the cache is a {type(found).__name__} with tokens that this model has not written. "
                "peft's prefix tuning puts a prefix there, which fixed distances reach from few places: take LoRA. "
                "Any other cache belongs to the model that made it: begin a new one"
            )
        # The cache of a full layer can always be cropped; the ring of a bounded one records if the rings beside it do.
        recording = any(getattr(one, "record_past", False) for one in cache.layers)
        found = StaticRingLayer() if isinstance(found, StaticLayer) else DynamicRingLayer()
        if isinstance(found, DynamicRingLayer):
            found.record_past = recording
        cache.layers[layer : layer + 1] = [found]
    found.claim(owner, reach)
    return found


def check_full(cache: Cache, layer: int, tokens: int) -> None:
    """Refuse a cache for a layer with full attention that was a sparse layer's, or has no room for `tokens` more."""
    found = cache.layers[layer] if layer < len(cache.layers) else None
    if getattr(found, "is_sliding", False):
        raise InputError(
            f"layer {layer} of the cache forgets what is far back, but the model's layer attends to everything; "
            "a cache belongs to the model that made it: begin a new one"
        )
    if isinstance(found, StaticLayer):
        used = found.get_seq_length()
        # Asking a GPU or a graph for the number would stall it; there only an impossible chunk is noticed.
        readable = not torch.compiler.is_compiling() and not (isinstance(used, Tensor) and used.device.type != "cpu")
        held = int(used) if readable else 0
        if held + tokens > found.max_cache_len:
            raise InputError(
                f"{tokens} tokens do not fit into a static cache of {found.max_cache_len} that holds {held}; "
                "make one with a larger max_cache_len"
            )
