"""A long text read by several processes, a part each; its cache is then in all, as if each had read it alone."""

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from fibattn.errors import InputError
from fibattn.model.cache import CACHE_NAME, DynamicRingLayer
from fibattn.model.configuration import FibAttnConfig, not_yet
from fibattn.parallel.exchange import check_same, wanted
from fibattn.parallel.shard import Shard

_ENGINE = "prefill over several processes"


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor, group: dist.ProcessGroup | None = None) -> Cache:
    """The cache of a text but for its last tokens, at most as many as there are processes; one at least.

    What is left is what `generate` begins with: `model.generate(input_ids, past_key_values=cache)`, in any of the
    processes, or in all. Each needs the whole model, and memory for its part of the text.

    Args:
        model: own or converted; its layers look back a bounded way.
        input_ids: (batch, tokens), the same in all processes, without padding.
        group: the processes; all when left out.

    Raises:
        InputError: for texts that differ, or have no more tokens than there are processes, and layers that attend to
            everything, whose cache would be the whole text's in each process, choose blocks or have a convolution.
    """
    if isinstance(model.config, FibAttnConfig):
        model.config.check_engine(_ENGINE)
    shard = Shard.of(group or dist.group.WORLD)  # pyright: ignore
    check_same(input_ids, shard.ranks, shard.group)
    part = (input_ids.shape[1] - 1) // shard.ranks
    if not part:
        raise InputError(f"{input_ids.shape[1]} tokens are too few for {shard.ranks} processes; read them in one")
    model.eval()
    cache = _begun(model, input_ids[:, :1])
    tokens = part * shard.ranks
    layers: list[Any] = cache.layers
    reaches = [one.reach if isinstance(one, DynamicRingLayer) else one.sliding_window - 1 for one in layers]
    reading = _Reading(shard.rank, shard.ranks, shard.group, reaches)
    first = shard.rank * part
    place = torch.arange(first, first + part, device=input_ids.device)[None]
    decoder: Any = model.get_decoder()
    decoder(input_ids=input_ids[:, first : first + part], position_ids=place, use_cache=False, shard=reading)
    for layer, (k, v) in zip(layers, reading.newest, strict=True):
        layer.begin(k, v, tokens) if isinstance(layer, DynamicRingLayer) else _begin_window(layer, k, v, tokens)
    return cache


@dataclass(frozen=True)
class _Reading(Shard):
    """A part whose layers leave the newest keys and values of the row behind, in all processes."""

    reaches: list[int]
    newest: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def with_blocks(self, positions: Tensor | None) -> NoReturn:
        """Refused: converted layers ask, when they choose."""
        raise not_yet(_ENGINE, "blocks that queries choose")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Any, **how: Any) -> Tensor:
        """As in `Shard`."""
        tokens, rows = q.shape[1], self.reaches[len(self.newest)] + 1
        held = [wanted(self.ranks - rank, rows, tokens) for rank in range(self.ranks)]
        keys, values = (x.contiguous() for x in self._from_all((k, v), held))
        self.newest.append((keys, values))
        return super().attend(q, k, v, pattern, **how)


def _begun(model: PreTrainedModel, one: Tensor) -> DynamicCache:
    """A cache whose layers are what the model makes of them, from one token."""
    cache = DynamicCache(config=model.config)
    model.get_decoder()(input_ids=one, use_cache=True, **{CACHE_NAME: cache})  # pyright: ignore
    layers: list[Any] = cache.layers
    unbounded = [str(index) for index, layer in enumerate(layers) if not layer.is_sliding]
    if unbounded:
        raise InputError(
            f"layers {', '.join(unbounded)} attend to everything, so each process would need memory for the whole "
            "text's keys and values; load the model with a bound, from_pretrained(…, full_reach=1023), or convert them"
        )
    return cache


def _begin_window(layer: Any, k: Tensor, v: Tensor, tokens: int) -> None:
    """As `DynamicRingLayer.begin`, for a sliding window of Transformers."""
    layer.keys, layer.values = (x[:, :, :0] for x in (layer.keys, layer.values))
    layer.cumulative_length = tokens - k.shape[1]
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
