"""Any decoder: the attention of a loaded Transformers model made sparse in place, and back again.

Weights stay as they are; what changes is which keys a layer attends to, and that its cache is bounded. The
work is done through Transformers' registries and forward hooks (`converted_layers`), never by replacing a
module, so adapters, quantised weights, devices and sharding stay untouched.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from fibattn.errors import InputError, whole_number
from fibattn.model.converted_layers import (
    IMPLEMENTATION,
    STORED_PATTERN,
    ConvertedLayer,
    before_attention,
    before_decoder,
)
from fibattn.model.converted_rotary import after_rotation, before_rotation, rotary_modules
from fibattn.pattern import Base, Pattern, Schedule, layer_patterns

ARCHITECTURES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3_text", "smollm3")
"""The model types that can be converted: those that the tests convert."""

_FIELDS: tuple[str, ...] = ("window", "base", "schedule", "rungs", "rung_reach", "max_offset", "keep_layers")


@dataclass
class _Conversion:
    """What `restore` needs; an attribute of the decoder."""

    previous: str
    name: str | None
    handles: list[RemovableHandle]


def convert(
    model: PreTrainedModel,
    *,
    window: int | None = None,
    base: Base = "fibonacci",
    schedule: Schedule = "linear",
    rungs: int = 15,
    rung_reach: int | None = None,
    max_offset: int | None = None,
    keep_layers: Sequence[int] = (),
) -> PreTrainedModel:
    """Turn the attention of a loaded Transformers decoder into fixed-offset attention, in place.

    A converted layer attends to a subset of what it attended to: one with a sliding window of its own keeps
    that as its limit. With a `window` as long as the input the logits are those of the original. The
    pattern goes into the configuration, so `save_pretrained` keeps it; a model loaded from such a folder
    refuses to run until `convert(model)`, without a pattern, has applied it again.

    Args:
        model: a loaded model of one of `ARCHITECTURES`, with any head; not wrapped (convert before `peft`).
        window: distances 0 … window are always attended; None takes the whole pattern from the configuration.
        base: `fibonacci` or `power_of_two`.
        schedule: `fixed`, `linear` or `coprime`: the scale of each layer's rungs.
        rungs: how many Fibonacci rungs there are before scaling; 15 look back 987, 20 look back 10,946.
        rung_reach: the farthest unscaled rung of a power-of-two base; the model's
            `max_position_embeddings` - 1 when None.
        max_offset: rungs farther than this after scaling are dropped; None keeps all.
        keep_layers: the indices of layers that keep their own attention, full or sliding; it runs through
            PyTorch's scaled dot-product attention.

    Returns:
        `model` itself.

    Raises:
        InputError: (a ValueError) with the reason, for a model that cannot be converted, bad values, and a
            stored pattern that contradicts itself. The model is then unchanged.
    """
    _check_model(model)
    decoder: Any = model.base_model
    config = decoder.config
    farthest = config.max_position_embeddings - 1 if rung_reach is None else rung_reach
    if isinstance(keep_layers, str) or not isinstance(keep_layers, Iterable):
        example = keep_layers if isinstance(keep_layers, int | str) else 0
        raise InputError(f"keep_layers is {keep_layers!r}; give the layers as a list: [{example}]")
    keep_layers = sorted(whole_number("a layer of keep_layers", layer) for layer in keep_layers)
    if window is not None:
        window, rungs = whole_number("window", window), whole_number("rungs", rungs)
        farthest = whole_number("rung_reach", farthest)
        max_offset = None if max_offset is None else whole_number("max_offset", max_offset)
        values = (window, base, schedule, rungs, farthest, max_offset, keep_layers)
        entry: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
    elif (base, schedule, rungs, rung_reach, max_offset, *keep_layers) == ("fibonacci", "linear", 15, None, None):
        entry = _stored_entry(config)
    else:
        raise InputError("a pattern was given without its window; say how many distances are always attended")
    layers = _layers(config, entry)
    _check_stored(entry, layers)
    stored = {**entry, "layer_offsets": _offsets(layers)}
    name = model.name_or_path
    if name and getattr(config, STORED_PATTERN, None) != stored:
        # An adapter keeps this name for its base: were it that of the original, it would be loaded on a dense model.
        given = ", ".join(f"{field}={value!r}" for field, value in entry.items() if field in _FIELDS)
        name = f"{name}, converted by fibattn.convert(model, {given})"
    _apply(model, layers, name)
    setattr(config, STORED_PATTERN, stored)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Give a converted model its own attention back, in place, and take the pattern out of its configuration.

    From a converted model that was loaded dense, by naming another attention, it takes the pattern alone. A cache that
    the converted model wrote is not for the restored one.

    Returns:
        `model` itself.

    Raises:
        InputError: (a ValueError) for a model that is not converted.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} cannot be restored; give the Transformers model that was converted: unwrap it "
            "(peft, DistributedDataParallel, torch.compile) first"
        )
    decoder: Any = model.base_model
    done = getattr(decoder, "fibattn", None)
    if not isinstance(done, _Conversion):
        if not hasattr(decoder.config, STORED_PATTERN):
            raise InputError(f"this {type(model).__name__} is not converted; there is nothing to restore")
        delattr(decoder.config, STORED_PATTERN)
        return model
    for handle in done.handles:
        handle.remove()
    for module in decoder.modules():
        if hasattr(module, "fibattn"):
            del module.fibattn
    model.name_or_path = decoder.name_or_path = done.name  # pyright: ignore
    del decoder.config.attn_implementation
    delattr(decoder.config, STORED_PATTERN)
    model.set_attn_implementation(done.previous)
    return model


def _apply(model: PreTrainedModel, layers: Sequence[ConvertedLayer], name: str | None) -> None:
    decoder: Any = model.base_model
    modules, previous = _attention_modules(decoder), decoder.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if decoder.config._attn_implementation != IMPLEMENTATION:
        raise InputError(f"{type(model).__name__} does not take its attention from Transformers' registry")
    # Written to config.json, so that a plain load of the saved model fails aloud instead of running dense.
    decoder.config.attn_implementation = IMPLEMENTATION
    handles = [decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)]
    for module, layer in zip(modules, layers, strict=True):
        module.fibattn = layer  # pyright: ignore[reportArgumentType]
        handles.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
    for module in rotary_modules(decoder):
        handles.append(module.register_forward_pre_hook(before_rotation))
        handles.append(module.register_forward_hook(after_rotation, with_kwargs=True))
    decoder.fibattn = _Conversion("sdpa" if previous == IMPLEMENTATION else previous, model.name_or_path, handles)
    model.name_or_path = decoder.name_or_path = name  # pyright: ignore


def _layers(config: PreTrainedConfig, entry: dict[str, Any]) -> list[ConvertedLayer]:
    """What every layer attends to; a converted layer stays inside the sliding window it had."""
    count, kept = config.num_hidden_layers, entry["keep_layers"]
    if entry["schedule"] == "learned":
        raise InputError("schedule is 'learned'; a converted model has fixed offsets: take fixed, linear or coprime")
    if len(set(kept)) != len(kept) or not all(0 <= layer < count for layer in kept):
        raise InputError(f"keep_layers is {kept}; expected different indices from 0 to {count - 1}")
    if len(kept) == count:
        raise InputError(f"keep_layers is {kept}, every layer of the model; leave out those to convert")
    given = {name: entry[name] for name in ("base", "schedule", "window", "rungs", "max_offset")}
    patterns = layer_patterns(**given, layers=count, reach=entry["rung_reach"])
    layers = []
    for layer, pattern in enumerate(patterns):
        keys = _sliding_window(config, layer)
        layers.append(ConvertedLayer(None if layer in kept else _inside(pattern, keys), keys))
    return layers


def _inside(pattern: Pattern, keys: int | None) -> Pattern:
    """The pattern without what is beyond a sliding window of `keys` keys."""
    if keys is None:
        return pattern
    return Pattern(min(pattern.window, keys - 1), tuple(offset for offset in pattern.offsets if offset < keys))


def _sliding_window(config: PreTrainedConfig, layer: int) -> int | None:
    """The layer's own sliding window in keys, as Transformers' caches read it from a configuration."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None


def _offsets(layers: Sequence[ConvertedLayer]) -> list[list[int] | None]:
    return [None if layer.pattern is None else list(layer.pattern.offsets) for layer in layers]


def _stored_entry(config: PreTrainedConfig) -> dict[str, Any]:
    entry = getattr(config, STORED_PATTERN, None)
    if entry is None:
        raise InputError(
            f"no window was given and the configuration has no {STORED_PATTERN}; say how many distances are always "
            "attended, such as window=128"
        )
    if set(entry) != {*_FIELDS, "layer_offsets"}:
        raise InputError(
            f"{STORED_PATTERN} in the configuration has the fields {', '.join(sorted(entry))}; this version knows "
            f"{', '.join(_FIELDS)} and layer_offsets. One of a newer fibattn needs that version"
        )
    return entry


def _check_stored(entry: dict[str, Any], layers: Sequence[ConvertedLayer]) -> None:
    stored, derived = entry.get("layer_offsets"), _offsets(layers)
    if stored is not None and stored != derived:
        raise InputError(
            f"{STORED_PATTERN} in the configuration stores the offsets {stored}, but its other fields give {derived}; "
            "correct one of them, or convert with a pattern of your own"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} cannot be converted; expected a loaded Transformers model. Convert before "
            "wrapping it (peft, DistributedDataParallel, torch.compile)"
        )
    decoder: Any = model.base_model
    if hasattr(decoder, "fibattn"):
        raise InputError("this model is converted already; call fibattn.restore(model) first for another pattern")
    reason = _refusal(decoder.config)
    if reason:
        kind = decoder.config.model_type
        raise InputError(f"a {type(model).__name__} (model type {kind!r}) cannot be converted: {reason}")


def _refusal(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration cannot be converted."""
    if config.model_type == "fibattn":
        return "its layers are sparse by themselves; change its configuration instead"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; fixed offsets are causal, for decoders alone"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"it caps its attention logits at {config.attn_logit_softcapping}, which the operator does not do"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "it has multi-head latent attention, whose keys and values differ in size"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks ahead; fixed offsets are causal"
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {config.attention_dropout}; the operator has none, load it with 0.0"
    if config.model_type not in ARCHITECTURES:
        return f"its architecture is not among those known to work: {', '.join(ARCHITECTURES)}"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of other kinds: {', '.join(sorted(other))}"
    return None


def _attention_modules(decoder: Any) -> list[nn.Module]:
    """The attention modules, first layer first."""
    found = [module for module in decoder.modules() if hasattr(module, "num_key_value_groups")]
    found.sort(key=lambda module: module.layer_idx)
    indices, count = [module.layer_idx for module in found], decoder.config.num_hidden_layers
    if indices != list(range(count)):
        raise InputError(
            f"a {type(decoder).__name__} cannot be converted: its attention modules are of the layers {indices}, "
            f"expected one for each of {count} layers"
        )
    return found
