"""Any decoder: the attention of a loaded Transformers model made sparse in place, and back again.

Weights stay as they are; what changes is which keys a layer attends to, and that its cache is bounded. The
work is done through Transformers' registries and forward hooks (`converted_layers`), never by replacing a
module, so adapters, quantised weights, devices and sharding stay untouched.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from fibattn.errors import InputError, whole_number
from fibattn.model.batching import start_batching
from fibattn.model.configuration import FibAttnConfig
from fibattn.model.converted_layers import IMPLEMENTATION, before_attention, before_decoder
from fibattn.model.converted_pattern import STORED_PATTERN, in_words, layers_of, with_offsets
from fibattn.model.converted_rotary import after_rotation, before_rotation, keep_exact, rotary_modules
from fibattn.model.modeling import FibAttnPreTrainedModel
from fibattn.model.native import attend_by, dense_model, is_native, native_config, new_trust
from fibattn.pattern import Base, ChosenPattern, Schedule

ARCHITECTURES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3_text", "smollm3")
"""The model types that can be converted, those that the tests convert, beside dense models that were trained here."""


@dataclass
class _Conversion:
    """What `restore` needs; an attribute of the decoder."""

    previous: str
    name: str | None
    handles: list[RemovableHandle]


def convert(
    model: PreTrainedModel,
    *,
    window: int,
    base: Base = "fibonacci",
    schedule: Schedule = "linear",
    rungs: int | None = None,
    rung_reach: int | None = None,
    max_offset: int | None = None,
    keep_layers: Sequence[int] = (),
    full_reach: int | None = None,
    blocks: int | None = None,
    block_size: int = 16,
    block_reach: int | None = None,
    block_anchor: bool = True,
) -> PreTrainedModel:
    """Turn the attention of a loaded Transformers decoder into fixed-offset attention, in place.

    A converted layer attends to a subset of what it attended to: one with a sliding window of its own keeps
    that as its limit. With a `window` as long as the input the logits are those of the original.
    `save_pretrained` writes a folder of another kind (`converted_folder`) that comes back sparse.

    Args:
        model: a loaded model of one of `ARCHITECTURES`, with any head, or a dense one of this project's own kind; not
            wrapped (convert before `peft`).
        window: distances 0 … window are always attended.
        base: `fibonacci` or `power_of_two`.
        schedule: `fixed`, `linear` or `coprime`: the scale of each layer's rungs.
        rungs: how many Fibonacci rungs there are before scaling; 15 look back 987, 20 look back 10,946. 15 when None,
            and none beside blocks.
        rung_reach: the farthest unscaled rung of a power-of-two base; the model's
            `max_position_embeddings` - 1 when None.
        max_offset: rungs farther than this after scaling are dropped; None keeps all.
        keep_layers: the indices of layers that keep their own attention, full or sliding; it runs through
            PyTorch's scaled dot-product attention.
        full_reach: how far back those layers look; None: as far as they did.
        blocks: in place of rungs, how many blocks of keys each query chooses beyond the window, by their mean key
            (`ChosenPattern`); None for none. A converted layer then attends as it did, to those keys alone.
        block_size: keys of a block: 16, 32, 64 or 128.
        block_reach: how far back the first key of a block may be; the model's `max_position_embeddings` - 1 when None,
            at most `64 * block_size - 1`.
        block_anchor: one of the blocks is always the first of the document, while it is in reach.

    Returns:
        `model` itself.

    Raises:
        InputError: (a ValueError) with the reason, for a model that cannot be converted, and bad values. The model is
            then unchanged.
    """
    _check_model(model)
    decoder: Any = model.base_model
    farthest = decoder.config.max_position_embeddings - 1 if rung_reach is None else rung_reach
    if isinstance(keep_layers, str) or not isinstance(keep_layers, Iterable):
        example = keep_layers if isinstance(keep_layers, int | str) else 0
        raise InputError(f"keep_layers is {keep_layers!r}; give the layers as a list: [{example}]")
    kept = sorted(whole_number("a layer of keep_layers", layer) for layer in keep_layers)
    if full_reach is None and kept:
        full_reach = getattr(decoder.config, "full_reach", None)  # a dense model of our own may have a bound
    of_rungs = {"rungs": rungs or None, "base": base, "schedule": schedule, "rung_reach": rung_reach}
    of_blocks = {"block_size": block_size, "block_reach": block_reach, "block_anchor": block_anchor}
    _refuse_idle(of_blocks if blocks is None else of_rungs | {"max_offset": max_offset}, blocks)
    rungs = (15 if blocks is None else 0) if rungs is None else rungs
    entry: dict[str, Any] = {
        "window": whole_number("window", window),
        "base": base,
        "schedule": schedule,
        "rungs": whole_number("rungs", rungs),
        "rung_reach": whole_number("rung_reach", farthest),
        "max_offset": None if max_offset is None else whole_number("max_offset", max_offset),
        "keep_layers": kept,
        "full_reach": None if full_reach is None else whole_number("full_reach", full_reach),
    }
    if blocks is not None:
        block_size = whole_number("block_size", block_size)
        limit = min(decoder.config.max_position_embeddings - 1, 64 * block_size - 1)
        entry |= {
            "blocks": whole_number("blocks", blocks),
            "block_size": block_size,
            "block_reach": limit if block_reach is None else whole_number("block_reach", block_reach),
            "block_anchor": bool(block_anchor),
        }
    # An adapter keeps this name for its base: were it that of the original, it would be loaded on a dense model.
    name = model.name_or_path and f"{model.name_or_path}, converted by fibattn.convert(model, {in_words(entry)})"
    if isinstance(model, FibAttnPreTrainedModel):
        config: Any = native_config(model.config, with_offsets(entry, layers_of(model.config, entry)))
        if config is None:
            raise InputError(f"this {type(model).__name__} is quantised, or of another class; convert it before that")
        return attend_by(model, config, name)
    return apply(model, entry, name)


def _refuse_idle(given: dict[str, Any], blocks: int | None) -> None:
    """Refuse values that would say nothing: of blocks where there are none, of rungs where there are."""
    usual: Any = convert.__kwdefaults__
    if idle := ", ".join(f"{name} is {value!r}" for name, value in given.items() if value != usual[name]):
        both = f" and blocks {blocks}; beyond the window there are either rungs or blocks"
        raise InputError(idle + (", without blocks; give blocks, too, or leave it out" if blocks is None else both))


def apply(model: PreTrainedModel, entry: dict[str, Any], name: str | None) -> PreTrainedModel:
    """Convert `model` to a stored pattern, in place, and give it the name `name`.

    Raises:
        InputError: as `convert`, and for offsets in the pattern that its other values contradict.
    """
    decoder: Any = model.base_model
    layers = layers_of(decoder.config, entry)
    stored = with_offsets(entry, layers)
    modules, previous = attention_modules(decoder), decoder.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if decoder.config._attn_implementation != IMPLEMENTATION:
        raise InputError(f"{type(model).__name__} does not take its attention from Transformers' registry")
    handles = [decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)]
    trusted = is_native(model, stored)
    for module, layer in zip(modules, layers, strict=True):
        module.fibattn = layer  # pyright: ignore[reportArgumentType]
        if trusted and isinstance(layer.pattern, ChosenPattern):
            module.trust = new_trust(module)
        handles.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
    for module in rotary_modules(decoder):
        keep_exact(module)
        handles.append(module.register_forward_pre_hook(before_rotation))
        handles.append(module.register_forward_hook(after_rotation, with_kwargs=True))
    if isinstance(model, GenerationMixin):
        model.init_continuous_batching = partial(start_batching, model, [layer.bounded for layer in layers])
    decoder.fibattn = _Conversion(previous, model.name_or_path, handles)
    model.name_or_path = decoder.name_or_path = name
    setattr(decoder.config, STORED_PATTERN, stored)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Give a converted model its own attention back, and take the pattern out of its configuration.

    A cache that the converted model wrote is not for the restored one.

    Returns:
        `model` itself, restored in place; for a `FibAttnForCausalLM`, which a converted model is once it has been saved
        and loaded, a model of the class that it was converted from, with the same weights, not copied.

    Raises:
        InputError: (a ValueError) for a model that is not converted.
    """
    if isinstance(model, FibAttnPreTrainedModel):
        return dense_model(model)
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} cannot be restored; give the Transformers model that was converted: unwrap it "
            "(peft, DistributedDataParallel, torch.compile) first"
        )
    decoder: Any = model.base_model
    done = getattr(decoder, "fibattn", None)
    if not isinstance(done, _Conversion):
        raise InputError(f"this {type(model).__name__} is not converted; there is nothing to restore")
    for handle in done.handles:
        handle.remove()
    for module in rotary_modules(decoder):
        del module._apply  # the class has its own
    for module in decoder.modules():
        for name in ("fibattn", "trust"):
            if hasattr(module, name):
                delattr(module, name)
    vars(model).pop("init_continuous_batching", None)
    model.name_or_path = decoder.name_or_path = done.name  # pyright: ignore
    delattr(decoder.config, STORED_PATTERN)
    model.set_attn_implementation(done.previous)
    return model


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
    if isinstance(config, FibAttnConfig):
        if set(config.layer_types or []) == {"full_attention"}:
            return None
        if config.converted_from is not None:
            return "it was converted already; restore it first (`fibattn convert MODEL OUT --restore`)"
        return "its layers are sparse by themselves; change its configuration"
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


def attention_modules(decoder: Any) -> list[nn.Module]:
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
