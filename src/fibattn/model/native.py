"""A converted decoder as a model of this project's own kind: the weights have the same names, a configuration the rest.

So a converted Llama is written as a `FibAttnForCausalLM`, which whatever takes the project's models takes, and back.
A dense model that was trained here is one already: of it the configuration changes.
"""

from copy import copy
from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from fibattn.errors import InputError
from fibattn.model.configuration import FibAttnConfig
from fibattn.model.converted_pattern import BLOCKS, FIELDS, STORED_PATTERN, layers_of
from fibattn.model.modeling import FibAttnForCausalLM, FibAttnPreTrainedModel

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_parameters", "use_cache", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"),
)
_BIASES = ("attention_bias", "mlp_bias")
_FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, bool]]] = {
    "llama": (_BIASES, {}),
    "mistral": ((), {}),
    "qwen2": ((), {"qkv_bias": True}),
    "qwen3": (("attention_bias",), {"qk_norm": True}),
    "smollm3": (_BIASES, {}),
    FibAttnConfig.model_type: (
        (
            *(*_BIASES, "qkv_bias", "qk_norm", "gated_mlp", "embedding_skip", "head_gates", "value_embeddings"),
            *("autocast_residual", "no_rope_layers"),
        ),
        {},
    ),
}
"""For each model type that fits the further fields that it has, by the same names here, and what it always has."""

_PATTERN = tuple(name for name in FIELDS if name != "keep_layers")


def native_config(source: PreTrainedConfig, entry: dict[str, Any]) -> FibAttnConfig | None:
    """The configuration that a converted decoder has as a model of this kind; None where it does not fit.

    Args:
        source: the decoder's own configuration, with the architecture that is to be saved where it names one.
        entry: its pattern, as `fibattn.convert` stores it.
    """
    kind = source.model_type
    bare = MODEL_MAPPING_NAMES.get(kind, "FibAttnModel")
    heads = {None, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, "FibAttnForCausalLM"), bare}
    rope: dict[str, Any] = source.rope_parameters or {}  # pyright: ignore
    known = kind in _FAMILIES and (source.architectures or [None])[0] in heads
    if not known or rope.get("partial_rotary_factor", 1.0) != 1.0 or hasattr(source, "quantization_config"):
        return None
    more, always = _FAMILIES[kind]
    fields = {name: getattr(source, name) for name in (*_SAME, *more) if hasattr(source, name)}
    layers = layers_of(source, entry)
    kept, limits = entry["keep_layers"], [layer.sliding_window and layer.sliding_window - 1 for layer in layers]
    if isinstance(source, FibAttnConfig):  # `full_reach`, which may change while loading, is no limit of kept layers
        own = source.layer_limits or [None] * len(layers)
        limits = [own[index] if index in kept else limit for index, limit in enumerate(limits)]
    sparse = ["fibonacci_attention" if offsets else "sliding_attention" for offsets in entry["layer_offsets"]]
    if "blocks" in entry:
        sparse = ["chosen_attention"] * len(layers)
    kinds = ["full_attention" if index in kept else kind for index, kind in enumerate(sparse)]
    if hasattr(source, "no_rope_layers"):
        fields["no_rope_layers"] = list(source.no_rope_layers)[: len(layers)]  # pyright: ignore
    return FibAttnConfig(
        **fields,
        **always,
        **{name: entry[name] for name in _PATTERN if name in entry},
        layer_types=kinds,
        block_rope="blocks" in entry,
        layer_limits=limits if any(limit is not None for limit in limits) else None,
        rope_scales_all=rope.get("rope_type", "default") != "default",
        architectures=["FibAttnModel" if source.architectures == [bare] else "FibAttnForCausalLM"],
        converted_from=plain(source),
    )


def pattern_of(config: Any) -> dict[str, Any] | None:
    """What a converted model attends to, under the names that `fibattn.convert` takes; None for any other."""
    if not isinstance(config, FibAttnConfig):
        return getattr(config, STORED_PATTERN, None)
    if config.converted_from is None:
        return None
    kept = [layer for layer, kind in enumerate(config.layer_types or []) if kind == "full_attention"]
    absent = () if config.block_rope else BLOCKS
    given = {name: getattr(config, name) for name in _PATTERN if name not in absent}
    return {**given, "keep_layers": kept, "layer_offsets": config.layer_offsets}


def attend_by(model: FibAttnPreTrainedModel, config: FibAttnConfig, name: str | None) -> FibAttnPreTrainedModel:
    """Give `model` the attention of `config`, which says the same of its weights, and the name `name`, in place."""
    decoder: Any = model.base_model
    model.name_or_path = decoder.name_or_path = name
    fields = ("layer_types", "layer_offsets", "layer_limits", "rope_scales_all", "block_rope", "converted_from")
    # Those say nothing of dense layers, and sparse ones would have weights or offsets of them.
    for field in (*_PATTERN, *fields, "kv_convolution", "stagger_heads"):
        setattr(decoder.config, field, getattr(config, field))
    decoder.full_reach = config.full_reach
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.attend_by(config)
        layer.self_attn.trust = new_trust(layer.self_attn) if config.chooses(index) else None
    return model


def is_native(model: PreTrainedModel, entry: dict[str, Any]) -> bool:
    """Whether a decoder that has this pattern is saved as a model of this kind."""
    source = copy(model.base_model.config)
    source.architectures = [type(model).__name__]  # pyright: ignore
    return native_config(source, entry) is not None  # pyright: ignore


def new_trust(attention: Any) -> nn.Parameter:
    """For each KV head how much of a block's mean is added to its keys: at first nothing, as in the dense model."""
    return nn.Parameter(attention.k_proj.weight.new_zeros(attention.config.num_key_value_heads))


def dense_config(config: FibAttnConfig) -> PreTrainedConfig | None:
    """The configuration of the model that one of this configuration was converted from, with as many token ids."""
    given: Any = config.converted_from
    return given and CONFIG_MAPPING[given["model_type"]].from_dict({**given, "vocab_size": config.vocab_size})


def dense_model(model: FibAttnPreTrainedModel) -> PreTrainedModel:
    """The model that `model` was converted from, with the weights of `model`, which are not copied.

    One that was dense of this kind is that again, in place.

    Raises:
        InputError: for a model that was not converted.
    """
    source = dense_config(model.config)
    if source is None:
        raise InputError(f"this {type(model).__name__} was not converted from another model; it has no dense form")
    if isinstance(source, FibAttnConfig):
        return attend_by(model, source, model.config.name_or_path)  # a conversion leaves the configuration's
    source.dtype = model.dtype
    with no_init_weights():
        kind = AutoModelForCausalLM if isinstance(model, FibAttnForCausalLM) else AutoModel
        dense: Any = kind.from_config(source, dtype=model.dtype)
    weights = {name: weight for name, weight in model.state_dict().items() if not name.endswith(".trust")}
    dense.load_state_dict(weights, assign=True)
    dense.tie_weights()
    if dense.can_generate():
        dense.generation_config = model.generation_config
    return dense.train(model.training)


def plain(source: PreTrainedConfig) -> dict[str, Any]:
    """A decoder's own configuration as JSON values."""
    return {name: value for name, value in source.to_diff_dict().items() if name != STORED_PATTERN}
