"""What each layer of a converted decoder attends to: from the pattern that was asked for, and the windows it had.

The pattern is kept in the configuration as plain values, under the names that `fibattn.convert` takes, and beside
them the offsets that follow, so that it always means the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from fibattn.errors import InputError
from fibattn.model.configuration import FibAttnConfig
from fibattn.pattern import ChosenPattern, Pattern, layer_patterns

STORED_PATTERN = "fibattn_pattern"
"""The entry of a converted model's configuration, while it is in memory."""

BLOCKS = ("blocks", "block_size", "block_reach", "block_anchor")
"""What a pattern has besides where queries choose blocks; no rungs then."""

RUNGS = ("base", "schedule", "rungs", "rung_reach", "max_offset")
"""What says nothing then."""

FIELDS = ("window", *RUNGS, "keep_layers", "full_reach", *BLOCKS)


@dataclass(frozen=True)
class ConvertedLayer:
    """What a converted decoder's attention module attends to; its attribute `fibattn`.

    `pattern` is None where the layer keeps its own attention: to everything, or with a `sliding_window` to so
    many keys, the query's own among them.
    """

    pattern: Pattern | ChosenPattern | None
    sliding_window: int | None

    @property
    def bounded(self) -> Pattern | ChosenPattern | None:
        """All that it attends to, as a pattern; None for everything."""
        if self.pattern is None and self.sliding_window is not None:
            return Pattern(self.sliding_window - 1)
        return self.pattern


def layers_of(config: PreTrainedConfig, entry: dict[str, Any]) -> list[ConvertedLayer]:
    """What every layer of a decoder attends to; a converted layer stays inside the sliding window it had.

    Args:
        config: the decoder's own configuration.
        entry: the values of `FIELDS`, those of `BLOCKS` only where queries choose.

    Raises:
        InputError: for values that are no pattern of this decoder.
    """
    count, kept, bound = config.num_hidden_layers, entry["keep_layers"], entry["full_reach"]
    if entry["schedule"] == "learned":
        raise InputError("schedule is 'learned'; a converted model has fixed offsets: take fixed, linear or coprime")
    if len(set(kept)) != len(kept) or not all(0 <= layer < count for layer in kept):
        raise InputError(f"keep_layers is {list(kept)}; expected different indices from 0 to {count - 1}")
    if len(kept) == count:
        raise InputError(f"keep_layers is {list(kept)}, every layer of the model; leave out those to convert")
    if bound is not None and bound < 1:
        raise InputError(f"full_reach is {bound}; it must be at least 1, or None for no bound")
    if bound is not None and not kept:
        raise InputError(f"full_reach is {bound}, but no layer keeps its own attention; name some in keep_layers")
    given = {name: entry[name] for name in ("base", "schedule", "window", "rungs", "max_offset")}
    patterns = layer_patterns(**given, layers=count, reach=entry["rung_reach"])
    blocks = [entry[name] for name in BLOCKS if name in entry]  # without an anchor, before there was one
    chosen = ChosenPattern(entry["window"], *blocks) if blocks else None
    layers = []
    for layer, sparse in enumerate(patterns):
        keys = sliding_window(config, layer)
        if layer in kept:
            layers.append(ConvertedLayer(None if bound is None else _inside(Pattern(bound), keys), keys))
        elif chosen is not None:
            _check_inside(chosen, layer, keys)
            layers.append(ConvertedLayer(chosen, None))
        else:
            layers.append(ConvertedLayer(_inside(sparse, keys), keys))
    return layers


def _check_inside(chosen: ChosenPattern, layer: int, keys: int | None) -> None:
    if keys is not None and chosen.reach >= keys:
        raise InputError(
            f"block_reach is {chosen.reach}, and layer {layer} has a sliding window of {keys} keys; keep the layer as "
            f"it is (keep_layers), or give a block_reach of at most {keys - 1}"
        )


def _inside(pattern: Pattern, keys: int | None) -> Pattern:
    """The pattern without what is beyond a sliding window of `keys` keys."""
    if keys is None:
        return pattern
    return Pattern(min(pattern.window, keys - 1), tuple(offset for offset in pattern.offsets if offset < keys))


def sliding_window(config: PreTrainedConfig, layer: int) -> int | None:
    """The layer's own sliding window in keys, as Transformers' caches read it; in a model of ours what it looks at."""
    if isinstance(config, FibAttnConfig):
        reach = config.layer_reach(layer)
        return None if reach is None else reach + 1
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None


def with_offsets(entry: dict[str, Any], layers: Sequence[ConvertedLayer]) -> dict[str, Any]:
    """The pattern as it is stored: `entry` and the offsets of every layer, None for one with its own attention.

    Raises:
        InputError: when `entry` has offsets already, and they are others.
    """
    derived = [list(layer.pattern.offsets) if isinstance(layer.pattern, Pattern) else None for layer in layers]
    stored = entry.get("layer_offsets", derived)
    if stored != derived:
        raise InputError(
            f"the pattern stores the offsets {stored}, but its other fields give {derived}; correct one of them, or "
            "convert the original again"
        )
    return {**entry, "layer_offsets": derived}


def in_words(entry: dict[str, Any]) -> str:
    """The pattern as the arguments of `fibattn.convert`."""
    idle = RUNGS if "blocks" in entry else ()
    return ", ".join(f"{name}={entry[name]!r}" for name in FIELDS if name in entry and name not in idle)
