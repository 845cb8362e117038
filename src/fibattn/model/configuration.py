"""The configuration: Llama's names for what is shared with Llama, and the attention pattern of every layer."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, configuration_utils
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from fibattn import files
from fibattn.errors import InputError, suggestion
from fibattn.pattern import (
    Base,
    ChosenPattern,
    LayerType,
    LearnedPattern,
    Pattern,
    Schedule,
    base_rungs,
    layer_alphas,
    reach_of,
)

LAYER_TYPES = get_args(LayerType)

_SHIM = "modeling_fibattn"

# Transformers has no call to make a layer type known, and its Trainer reads configurations by their base class.
configuration_utils.ALLOWED_ATTN_LAYER_TYPES += ("fibonacci_attention", "chosen_attention")  # pyright: ignore[reportPrivateImportUsage]

_TRANSFORMERS_READS = {
    *("auto_map", "custom_pipelines", "quantization_config", "compression_config", "transformers_weights"),
    *("tokenizer_class", "processor_class", "is_decoder", "add_cross_attention", "tie_last_hidden_states", "loss_type"),
    *("sep_token_id", "code_revision"),
}
"""What Transformers keeps in any configuration, or is given with one, without a name for it in the base class."""


class FoundByShim:
    """What is saved with a few lines of code that find its class in the installed package."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: Transformers would copy this package's source beside the weights, where the shim is enough."""


class SavesShim(FoundByShim):
    """A configuration `XConfig`, in whose folders that code finds `XModel` and `XForCausalLM`, too."""

    auto_map: dict[str, str]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in Transformers, and a few lines of code beside it that find the classes in the installed package."""
        found = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        name = type(self).__name__.removesuffix("Config")
        self.auto_map = {auto: f"{_SHIM}.{name}{kind}" for auto, kind in found.items()}
        shim = Path(__file__).with_name("shim.py").read_text(encoding="utf-8")
        files.write_text(Path(save_directory) / f"{_SHIM}.py", shim)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


@strict
class FibAttnConfig(SavesShim, PreTrainedConfig):
    """Configuration of `FibAttnForCausalLM`; the defaults are the paper's 60 M-parameter model, linear stagger.

    Args:
        max_position_embeddings: the training length. It bounds nothing; evaluation tools read it.
        rope_parameters: as in Llama. Scaling (`yarn`, `linear`, …) acts on the full-attention layers alone:
            a sparse layer never sees a distance beyond its reach, so it has nothing to scale.
        rope_scales_all: it acts on all layers. A converted model was trained so.
        initializer_range: standard deviation of the initial weights; `hidden_size ** -0.5` when None.
        hidden_act: the feed-forward's activation, by its name in Transformers: `silu`, `relu2`, `gelu`, …
        qk_norm: queries and keys go through an RMSNorm over the head size before they are rotated, as in Qwen3.
        attention_bias: all four projections of the attention have a bias, as they may in Llama.
        qkv_bias: those to queries, keys and values alone have one, as in Qwen2.
        mlp_bias: the projections of the feed-forward have a bias.
        gated_mlp: the feed-forward has a gate (`gate_proj`), as in Llama; without one it is `down(act(up(x)))`.
        embedding_skip: the embedding is normalised, and every layer begins with a learned mix of the residual stream
            and that embedding.
        head_gates: the output of each head goes through a gate that the layer's input decides.
        value_embeddings: every second layer, the last among them, has an embedding of its own that adds to each token's
            values, times a gate for each KV head that the layer's input decides. So the model needs `input_ids`.
        zero_init_outputs: what writes to the residual stream begins at zero; otherwise small (paper, section 4).
        autocast_residual: under autocast the residual stream has the autocast dtype; otherwise the embedding's.
        base: `fibonacci` or `power_of_two`.
        schedule: `fixed`, `linear`, `coprime` or `learned`: the scale alpha of each layer's rungs.
        stagger_heads: the KV heads of a layer have scales of their own: the schedule runs over the layers of
            the first KV head, then over those of the next.
        window: distances 0 … window are always attended (`window + 1` keys).
        rungs: how many Fibonacci rungs there are before scaling.
        rung_reach: the farthest unscaled rung of a power-of-two base; training length - 1 when None.
        max_offset: rungs farther than this after scaling are dropped; None keeps all.
        layer_types: for each layer `fibonacci_attention`, `sliding_attention` (window only), `chosen_attention` (window
            and the blocks that a query chooses) or `full_attention`; all Fibonacci when None.
        blocks: how many blocks a query of a `chosen_attention` layer chooses.
        block_size: keys of a block: 16, 32, 64 or 128.
        block_reach: how far back the first key of a block may be.
        block_rope: blocks are chosen and read by queries and keys with rotary positions, as the window is. Without
            it, by those that have none. A converted model has them.
        block_anchor: one of the blocks is the first of the document, while it is in reach.
        kv_convolution: to each channel of keys and values a learned sum over its last so many tokens is added, in all
            layers but those of `full_attention`; 0 for none.
        no_rope_layers: for each layer 1 with RoPE or 0 without, as in Transformers' SmolLM3; all 1 when None.
        full_reach: how far back the full-attention layers look; None: to the beginning. A trained model may be loaded
            with it (`from_pretrained(…, full_reach=1023)`): then it runs for ever at constant cost, and far context
            cannot spread the attention of those layers thin.
        layer_limits: for each layer the farthest distance that it may attend to, whatever its type, or None for no
            limit; all None when None. A converted layer stays within the sliding window that it had.
        converted_from: the configuration of the model that this one was converted from, for the way back.
        layer_offsets: for each layer the resolved integer offsets, one list for each set of KV heads that
            shares one; None for full attention and learned rungs. Derived when None, checked when given.

    Raises:
        InputError: (a ValueError) for values outside the above, stored offsets that the rest contradicts, and names
            that neither this class nor Transformers knows; a file may have those of a newer Transformers.
    """

    model_type = "fibattn"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  # the Trainer adds a list to it
    default_theta = 10_000.0

    vocab_size: int = 32_768
    hidden_size: int = 512
    intermediate_size: int = 1366
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    initializer_range: float | None = None
    rope_parameters: RopeParameters | dict | None = None
    rope_scales_all: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    qk_norm: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    embedding_skip: bool = False
    head_gates: bool = False
    value_embeddings: bool = False
    zero_init_outputs: bool = False
    autocast_residual: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    base: str = "fibonacci"
    schedule: str = "linear"
    stagger_heads: bool = False
    window: int = 12
    rungs: int = 15
    rung_reach: int | None = None
    max_offset: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    full_reach: int | None = None
    layer_limits: list[int | None] | None = None
    layer_offsets: list[list[list[int]] | None] | None = None
    blocks: int = 4
    block_size: int = 16
    block_reach: int = 1023
    block_rope: bool = False
    block_anchor: bool = False
    kv_convolution: int = 0
    converted_from: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "sliding_window" in kwargs:
            raise InputError(
                f"sliding_window is {kwargs['sliding_window']}; it follows from the window, whose keys it counts: give "
                "window, one less"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    f"hidden_size is {self.hidden_size}, which does not divide by {self.num_attention_heads} attention "
                    "heads; use a multiple of twice as many, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.initializer_range is None and self.hidden_size > 0:
            self.initializer_range = self.hidden_size**-0.5
        if self.rung_reach is None:
            self.rung_reach = max(self.max_position_embeddings - 1, 1)
        if self.layer_types is None:
            self.layer_types = ["fibonacci_attention"] * self.num_hidden_layers
        if self.no_rope_layers is None:
            self.no_rope_layers = [1] * self.num_hidden_layers
        self._check_sizes()
        self._check_layers()
        if self.layer_offsets is None:
            self.layer_offsets = self._resolve_offsets()
        else:
            self.check_offsets()
        super().__post_init__(**kwargs)
        if self.transformers_version is None:
            # Transformers takes what it knows out of the rest, and sets what it does not know.
            self._refuse_unknown(name for name in kwargs if name in vars(self))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, but changes to fields go in before the offsets are derived and checked."""
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__annotations__}
        give_back = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict({**config_dict, **changes}, return_unused_kwargs=True, **kwargs)
        if give_back:
            return config, unused
        # The rest are the loader's own options, of which there is no list; what is nearly a field was meant as one.
        # A tokenizer's go through here as well: its tokens (pad_token) are called nearly as their ids.
        others = (name for name in unused if not name.endswith("_token"))
        cls._refuse_unknown(name for name in others if get_close_matches(name, cls.__annotations__, cutoff=0.75))
        return config

    @classmethod
    def _refuse_unknown(cls, names: Iterable[str]) -> None:
        for name in names:
            if not (name.startswith("_") or name in _TRANSFORMERS_READS or hasattr(cls, name)):
                raise InputError(f"FibAttnConfig has no {name!r}: {suggestion(name, cls.__annotations__, 'fields')}")

    @property
    def sliding_window(self) -> int:
        """What Transformers calls the window: the number of keys, the query's own position included."""
        return self.window + 1

    @property
    def base_rungs(self) -> tuple[int, ...]:
        """The unscaled rungs."""
        return base_rungs(self.base, count=self.rungs, reach=1 if self.rung_reach is None else self.rung_reach)  # pyright: ignore[reportArgumentType]

    def layer_patterns(self, layer: int) -> tuple[Pattern, ...] | None:
        """The patterns of a layer's KV heads (one when they share it); None where distances are not fixed, or all."""
        full = (self.layer_types or [])[layer] == "full_attention"
        limits = [self._limit(layer), self.full_reach if full else self.window]
        window = min((limit for limit in limits if limit is not None), default=None)
        sets = [[]] if full and window is not None else (self.layer_offsets or [])[layer]
        return None if sets is None or window is None else tuple(Pattern(window, tuple(one)) for one in sets)

    def _limit(self, layer: int) -> int | None:
        return None if self.layer_limits is None else self.layer_limits[layer]

    @property
    def unbounded(self) -> bool:
        """Whether some layer attends to everything."""
        limits = self.layer_limits or [None] * len(self.layer_types or [])
        return self.full_reach is None and ("full_attention", None) in zip(self.layer_types or [], limits, strict=True)

    @property
    def learned_pattern(self) -> LearnedPattern:
        """What the layers attend to that learn an alpha, which stays below 1.5."""
        return LearnedPattern(self.window, self.base_rungs, self.max_offset, largest_alpha=1.5)

    @property
    def chosen_pattern(self) -> ChosenPattern:
        """What the layers of `chosen_attention` attend to."""
        return ChosenPattern(self.window, self.blocks, self.block_size, self.block_reach, self.block_anchor)

    def layer_pattern(self, layer: int) -> tuple[Pattern, ...] | LearnedPattern | ChosenPattern | None:
        """What a layer attends to, of whatever kind; None for unbounded attention."""
        if self.chooses(layer):
            return self.chosen_pattern
        return self.learned_pattern if self.learns_alpha(layer) else self.layer_patterns(layer)

    def layer_reach(self, layer: int) -> int | None:
        """The farthest distance a layer looks back; None for unbounded attention."""
        pattern = self.layer_pattern(layer)
        return None if pattern is None else reach_of(pattern)

    def chooses(self, layer: int) -> bool:
        """Whether the queries of the layer choose blocks of keys."""
        return (self.layer_types or [])[layer] == "chosen_attention"

    def check_engine(self, engine: str) -> None:
        """Refuse what no engine but `generate()` does yet: blocks that queries choose, convolved keys and values."""
        for layer in range(self.num_hidden_layers):
            check_engine(engine, self.layer_pattern(layer), convolves=self.kv_convolution > 0)

    def learns_alpha(self, layer: int) -> bool:
        """Whether the layer has a scale that is trained."""
        return self.schedule == "learned" and (self.layer_types or [])[layer] == "fibonacci_attention"

    def embeds_values(self, layer: int) -> bool:
        """Whether the layer has a value embedding."""
        return self.value_embeddings and (self.num_hidden_layers - 1 - layer) % 2 == 0

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if (getattr(self, name) or 0) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise InputError(
                f"{self.num_attention_heads} attention heads do not divide into {self.num_key_value_heads} KV heads; "
                "use a multiple of them"
            )
        if self.full_reach is not None and not 1 <= self.full_reach < 1 << 63:
            raise InputError(f"full_reach is {self.full_reach}; it must be at least 1, below 2**63, or None")
        if (self.head_dim or 0) % 2:
            raise InputError(
                f"head_dim is {self.head_dim}, and RoPE needs an even head size; where it is not given, hidden_size is "
                f"a multiple of twice the attention heads ({2 * self.num_attention_heads})"
            )

    def _check_layers(self) -> None:
        for name, allowed in (("base", get_args(Base)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; this version knows {', '.join(allowed)}. "
                    "A configuration of a newer fibattn needs that version"
                )
        for layer, kind in enumerate(self.layer_types or []):
            if kind not in LAYER_TYPES:
                raise InputError(f"layer_types[{layer}] is {kind!r}; the types are {', '.join(LAYER_TYPES)}")
        for name in ("layer_types", "no_rope_layers", "layer_limits"):
            if len(getattr(self, name) or [0] * self.num_hidden_layers) != self.num_hidden_layers:
                raise InputError(f"{name} has {len(getattr(self, name))} entries for {self.num_hidden_layers} layers")
        if self.stagger_heads and self.schedule == "learned":
            raise InputError("stagger_heads is True, but a learned scale is one for all heads of a layer; leave it out")
        if any(limit is not None and limit < 1 for limit in self.layer_limits or []):
            raise InputError(f"layer_limits is {self.layer_limits}; each entry is at least 1, or None for no limit")
        if self.layer_limits and self.schedule == "learned":
            raise InputError("layer_limits are given, but a learned scale moves the rungs; take a fixed schedule")
        if "chosen_attention" in (self.layer_types or []):
            _ = self.chosen_pattern  # which checks its numbers
            if any(self.chooses(layer) and limit for layer, limit in enumerate(self.layer_limits or [])):
                raise InputError("layer_limits are given, but chosen_attention has block_reach; leave one of them out")
        if not 0 <= self.kv_convolution <= 64:
            raise InputError(f"kv_convolution is {self.kv_convolution}; it is from 1 to 64 tokens, or 0 for none")
        if set(self.no_rope_layers or []) - {0, 1}:
            raise InputError(f"no_rope_layers is {self.no_rope_layers}; each entry is 1 (with RoPE) or 0 (without)")
        if self.hidden_act not in ACT2FN:
            raise InputError(f"hidden_act is {self.hidden_act!r}: {suggestion(self.hidden_act, ACT2FN, 'activations')}")

    def _resolve_offsets(self) -> list[list[list[int]] | None]:
        rungs = self.base_rungs
        heads = (self.num_key_value_heads or 1) if self.stagger_heads else 1
        alphas = layer_alphas(self.schedule, layers=self.num_hidden_layers * heads)  # pyright: ignore[reportArgumentType]
        patterns = [Pattern.scaled(self.window, rungs, alpha, self.max_offset) for alpha in alphas]
        resolved: list[list[list[int]] | None] = []
        for layer, kind in enumerate(self.layer_types or []):
            if kind == "sliding_attention":
                resolved.append([[]])
            elif kind in ("full_attention", "chosen_attention") or self.learns_alpha(layer):
                resolved.append(None)
            else:
                of_heads, limit = patterns[layer :: self.num_hidden_layers], self._limit(layer)
                resolved.append([[d for d in one.offsets if limit is None or d <= limit] for one in of_heads])
        return resolved

    def check_offsets(self) -> None:
        """Refuse stored offsets that the rest contradicts, as after a change to one of the fields."""
        stored, resolved = self.layer_offsets or [], self._resolve_offsets()
        if len(stored) != len(resolved):
            raise InputError(f"layer_offsets has {len(stored)} entries for {len(resolved)} layers")
        for layer, (found, expected) in enumerate(zip(stored, resolved, strict=True)):
            if found != expected:
                raise InputError(
                    f"layer_offsets[{layer}] is {found}, but base {self.base!r}, schedule {self.schedule!r}, window "
                    f"{self.window} and rungs {self.rungs} give {expected}; correct one of them, or leave "
                    "layer_offsets out to have it derived"
                )


def check_engine(engine: str, pattern: Any, *, convolves: bool = False) -> None:
    """Refuse a layer that attends by `pattern`, where no engine but `generate()` does it yet."""
    if isinstance(pattern, ChosenPattern):
        raise not_yet(engine, "blocks that queries choose")
    if convolves:
        raise not_yet(engine, "a convolution over keys and values")


def not_yet(engine: str, what: str) -> InputError:
    """What is said where an engine lacks something."""
    return InputError(f"{engine} does not do {what} yet; without it the model trains, and generate() writes")
