"""Which layers of a decoder should keep their own attention when it is converted, measured on a text.

What a layer loses by becoming sparse is seen when it is the only sparse one. How layers go together is not: so the
kept ones are found one after another, each time that with which the loss is lowest beside those kept before.
"""

import time
from collections.abc import Collection
from typing import Any

import numpy as np

from fibattn.data.sequences import TrainingSequences
from fibattn.errors import InputError
from fibattn.evaluation.loss import token_losses
from fibattn.model.conversion import convert, restore
from fibattn.progress import Meter


def search(
    model: Any, pattern: dict[str, Any], text: TrainingSequences, count: int, full_reach: int | None = None
) -> dict[str, Any]:
    """Find `count` layers to keep.

    Args:
        model: a loaded causal language model that can be converted; it is converted and restored again and again.
        pattern: the arguments of `fibattn.convert`, but for `keep_layers` and `full_reach`.
        text: what is measured.
        count: how many, at least one and fewer than there are.
        full_reach: how far back those that are kept look; `alone` is measured beside layers that look back freely.

    Returns:
        Plain values for JSON, losses in nats a token: `dense`, `alone` (for each layer what the loss rises by where it
        alone is sparse), `none` (all layers sparse), `search` (the layers in the order in which they were found, and
        the loss with those so far), `evenly` (as many layers evenly over the depth), and what was measured.

    Raises:
        InputError: for another `count`, and a model that changes its logits after the output embedding.
    """
    depth = model.base_model.config.num_hidden_layers
    if not 1 <= count < depth:
        raise InputError(f"{count} layers are to be kept of {depth}; give a number from 1 to {depth - 1}")
    began, passes = time.monotonic(), 3 + depth + sum(depth - found for found in range(count))
    with Meter("placement", passes, "passes") as meter:

        def loss(kept: Collection[int], reach: int | None = None) -> float:
            found = kept_loss(model, pattern | {"full_reach": reach}, text, kept)
            meter.update(1)
            return found

        none, dense = loss(()), loss(range(depth))  # what cannot be converted is refused at once
        alone = [loss({*range(depth)} - {layer}) - dense for layer in range(depth)]
        evenly = evenly_kept(depth, count)
        even = {"layers": evenly, "loss": loss(evenly, full_reach)}
        kept: dict[int, float] = {}
        for _ in range(count):
            left = [layer for layer in range(depth) if layer not in kept]
            tried = {layer: loss({*kept, layer}, full_reach) for layer in left}
            best = min(tried, key=lambda layer: tried[layer])
            kept[best] = tried[best]
    steps = [{"layer": layer, "loss": lowest} for layer, lowest in kept.items()]
    measured = {"sequences": len(text), "sequence_length": text.length}
    found = {"dense": dense, "none": none, "alone": alone, "search": steps, "evenly": even}
    return {**found, **measured, "seconds": round(time.monotonic() - began, 1)}


def kept_loss(model: Any, pattern: dict[str, Any], text: TrainingSequences, kept: Collection[int]) -> float:
    """The mean loss of a token, in nats, where these layers keep their own attention; arguments as in `search`."""
    sparse = len(kept) < model.base_model.config.num_hidden_layers
    if sparse:
        convert(model, **pattern, keep_layers=sorted(kept))
    try:
        return float(token_losses(model, text, quiet=True).mean(dtype=np.float64))
    finally:
        if sparse:
            restore(model)


def evenly_kept(depth: int, count: int) -> list[int]:
    """`count` of `depth` layers, evenly over the depth, the last of each part: 3, 7, 11 and 15 for 4 of 16."""
    return [round((part + 1) * depth / count) - 1 for part in range(count)]
