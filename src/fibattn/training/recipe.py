"""What a training run is: frozen dataclasses, presets as a Python table, and their JSON.

No torch here: `fibattn train --help` reads this file. A run writes its recipe as `recipe.json`, and
`fibattn train recipe.json` does that run again.
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fibattn import files
from fibattn.errors import InputError, suggestion
from fibattn.pattern import Base, LayerType, Schedule, hybrid_layers


@dataclass(frozen=True)
class ModelRecipe:
    """The shape of the model and what its layers attend to. Defaults: the paper's 60 M parameters."""

    hidden_size: int = 512
    """Numbers for each token between the layers."""
    intermediate_size: int = 1366
    """Width inside the feed-forward part of a layer."""
    num_hidden_layers: int = 16
    """Depth: how many layers."""
    num_attention_heads: int = 8
    """Query heads of a layer; hidden_size divides by them."""
    num_key_value_heads: int = 2
    """Heads of keys and values, each shared by as many query heads."""
    layer_types: tuple[LayerType, ...] = ("fibonacci_attention",)
    """What each layer does: window and rungs, window alone, or everything. Shorter than the depth, it repeats."""
    no_rope_layers: tuple[Literal[0, 1], ...] = (1,)
    """For each layer 1 with rotary positions, 0 without. Shorter than the depth, it repeats."""
    base: Base = "fibonacci"
    """The distances before scaling: Fibonacci numbers or powers of two."""
    schedule: Schedule = "linear"
    """How the scale of the distances goes over the layers."""
    stagger_heads: bool = False
    """Give every KV head of a layer rungs of its own scale, too."""
    window: int = 12
    """Distances 0 … window are attended: window + 1 keys."""
    rungs: int = 15
    """How many distances there are beyond the window, before scaling."""
    max_offset: int | Literal["sequence"] | None = "sequence"
    """Drop rungs farther than this; sequence: those that no training sequence is long enough for. None keeps all, as
    the paper does."""
    full_reach: int | Literal["sequence"] | None = None
    """How far back the full layers of the finished model look; sequence: as far as in training, so that it runs for
    ever at constant cost. None: to the beginning. Training is the same."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions: larger turns slower."""
    hidden_act: Literal["silu", "relu2"] = "silu"
    """The feed-forward's activation; relu2 is the square of ReLU."""
    gated_mlp: bool = True
    """Give the feed-forward a gate, a third matrix."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    embedding_skip: bool = False
    """Normalise the embedding, and mix it into the input of every layer."""
    zero_init_outputs: bool = False
    """Begin with layers that add nothing."""
    autocast_residual: bool = False
    """Keep the residual stream in 16 bits where the products are."""

    def check(self) -> None:
        """Refuse what only a recipe can say wrongly; the rest is checked with the configuration.

        Raises:
            InputError: naming the field, its value and what was expected.
        """
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise InputError(f"model.rope_theta is {self.rope_theta}; it must be a finite number above 0")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            _check_count(f"model.{name}", getattr(self, name), 1_000_000)
        _check_count("model.num_hidden_layers", self.num_hidden_layers, 10_000)
        for name in ("layer_types", "no_rope_layers"):
            if not 1 <= (count := len(getattr(self, name))) <= self.num_hidden_layers:
                raise InputError(
                    f"model.{name} has {count} entries for {self.num_hidden_layers} layers; give one for each layer, "
                    "or fewer that repeat"
                )
        for name in ("max_offset", "full_reach"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise InputError(f"model.{name} is {value}; it must be at least 1, sequence, or None for no limit")
        if self.full_reach is not None and "full_attention" not in self.layer_types:
            raise InputError(
                f"model.full_reach is {self.full_reach}, but no layer has full attention; name some in "
                "model.layer_types, or leave it out"
            )


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW, alone or beside Muon, and their rate: linear warm-up, then a fall. Defaults: the paper's (section 4)."""

    learning_rate: float = 3e-4
    """The highest, after the warm-up."""
    muon: bool = False
    """Muon for the matrices of the layers, AdamW for the rest; AdamW for everything when off."""
    muon_learning_rate: float = 3e-3
    """Muon's highest rate; scaled so that AdamW's rates suit it."""
    muon_momentum: float = 0.95
    """How slowly Muon's mean of the gradients follows."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the rate falls."""
    decay_fraction: float = 1.0
    """The part of the steps after the warm-up in which it falls; before, it stays at the highest."""
    final_fraction: float = 0.1
    """The rate at the end, as a part of the highest."""
    warmup_steps: int = 300
    """Steps in which the rate rises to the highest."""
    beta1: float = 0.9
    """How slowly the mean of the gradients follows, from 0 to below 1."""
    beta2: float = 0.95
    """How slowly the mean of their squares follows."""
    epsilon: float = 1e-8
    """Added to the root of the squares, against division by 0."""
    weight_decay: float = 0.1
    """On parameters of two dimensions or more."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""

    def at(self, factor: float) -> "OptimizerRecipe":
        """The same with both highest rates times `factor`, to five places."""
        rates = {name: round(getattr(self, name) * factor, 5) for name in ("learning_rate", "muon_learning_rate")}
        return replace(self, **rates)

    def check(self) -> None:
        """Refuse values that cannot train.

        Raises:
            InputError: naming the field, its value and what was expected.
        """
        for right, expected, names in (
            (
                lambda x: 0 < x < math.inf,
                "above 0",
                ("learning_rate", "muon_learning_rate", "epsilon", "max_grad_norm"),
            ),
            (lambda x: 0 < x <= 1, "above 0, at most 1", ("decay_fraction",)),
            (lambda x: 0 <= x <= 1, "from 0 to 1", ("final_fraction", "weight_decay")),
            (lambda x: 0 <= x < 1, "from 0 to below 1", ("beta1", "beta2", "muon_momentum")),
            (lambda x: 0 <= x <= _MOST, f"from 0 to {_MOST:,}", ("warmup_steps",)),
        ):
            for name in names:
                if not right(value := getattr(self, name)):
                    raise InputError(f"optimizer.{name} is {value}; it must be {expected}")


@dataclass(frozen=True)
class Recipe:
    """One training run. Everything that moves its result is here."""

    data: Path = Path("data/text")
    """A folder made by `fibattn prepare`."""
    out: Path = Path("runs/run")
    """Where checkpoints, metrics and the finished model go."""
    start: Path | None = None
    """A finished run, or its model, whose weights are the beginning; fresh ones when left out. What its layers
    attend to may differ, the length too."""
    keep_model: bool = False
    """Train the model of the start as it is, as one that was converted needs: `model` then says nothing."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    """The shape of the model, and what its layers attend to."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """The optimizer and its rate."""
    sequence_length: int = 1024
    """Tokens of a training sequence."""
    sequences_per_step: int = 32
    """Training sequences of one step, over all processes."""
    steps: int = 13_000
    """Updates of the weights in all."""
    order: Literal["random", "epochs"] = "random"
    """Sequences drawn with replacement (the paper's), or every one once an epoch."""
    init_seed: int = 42
    """Decides the weights at the beginning."""
    data_seed: int = 42
    """Decides the order of the sequences."""
    micro_batch: int = 32
    """The most sequences a process takes at once; fewer need less memory. A step stays the same up to rounding: it
    is cut into equal parts, and a run may go on with another value."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast dtype over float32 parameters; auto is bf16 on a GPU."""
    compile: bool = False
    """Compile the step: minutes before the first, then faster."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes under torchrun do: copy the model or shard it (FSDP2)."""
    context_parallel: int = 1
    """Over how many GPUs each sequence is cut, for those too long for one; weights are then sharded, too."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    save_every: int = 1000
    """Steps from one checkpoint to the next."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    evaluate_every: int | None = 250
    """Steps from one look at the held-out loss to the next, into held-out.jsonl; None for none."""
    evaluate_tokens: int = 131_072
    """Held-out tokens of a look, always the same ones, an equal part of each set; beside them as many of training."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl and held-out.jsonl."""

    @property
    def tokens(self) -> int:
        """Training targets in all."""
        return self.steps * self.sequences_per_step * self.sequence_length

    @property
    def full_reach(self) -> int | None:
        """The finished model's `full_reach` as a number: sequence is the farthest distance in one, None no bound."""
        return self._distance(self.model.full_reach)

    def _distance(self, value: int | Literal["sequence"] | None) -> int | None:
        return max(self.sequence_length - 1, 1) if value == "sequence" else value

    def resolved(self) -> "Recipe":
        """The same with each layer named and distances as numbers: recipes that mean the same are then equal."""
        shape = self.model
        written: dict[str, Any] = {
            name: tuple(islice(cycle(getattr(shape, name)), shape.num_hidden_layers))
            for name in ("layer_types", "no_rope_layers")
        }
        written |= {"max_offset": self._distance(shape.max_offset), "full_reach": self.full_reach}
        return replace(self, model=replace(shape, **written))

    def split(self, processes: int) -> tuple[int, int]:
        """How each of `processes` cuts its share of a step: sequences of a micro-batch, and how many micro-batches.

        Raises:
            InputError: when a step does not divide over the processes, nor they or a sequence by `context_parallel`.
        """
        cut = self.context_parallel
        for what, number in (("processes under torchrun", processes), ("tokens of a sequence", self.sequence_length)):
            if number % cut:
                raise InputError(
                    f"context_parallel is {cut}, and {number} {what} do not divide by it; change one of them"
                )
        groups = processes // cut
        share, rest = divmod(self.sequences_per_step, groups)
        if rest or not share:
            raise InputError(
                f"{self.sequences_per_step} sequences a step do not divide over {processes} processes"
                f"{f' in groups of {cut}' if cut > 1 else ''}; set sequences_per_step to a multiple of {groups}, such "
                f"as {max(share, 1) * groups}"
            )
        size = max(size for size in range(1, min(share, self.micro_batch) + 1) if share % size == 0)
        return size, share // size

    def check(self) -> None:
        """Refuse values that cannot train.

        Raises:
            InputError: naming the field, its value and what was expected.
        """
        counts = ("sequence_length", "sequences_per_step", "steps", "micro_batch", "context_parallel")
        for name in (*counts, "log_every", "save_every", "keep_checkpoints", "evaluate_every", "evaluate_tokens"):
            if (value := getattr(self, name)) is not None:
                _check_count(name, value, _MOST)
        if (sequences := self.steps * self.sequences_per_step) > 1e9:
            raise InputError(
                f"{self.steps} steps of {self.sequences_per_step} sequences are {sequences:.0e}, and the order of a "
                "run is a file of at most 1e9; make steps smaller"
            )
        if self.keep_model and self.start is None:
            raise InputError("keep_model is True, but there is no start; name the model that is to be trained: --start")
        self.optimizer.check()
        for name in ("init_seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 2**32 - 1")
        self.model.check()


_tuned = Recipe(
    optimizer=OptimizerRecipe(
        learning_rate=3e-3, muon=True, muon_learning_rate=8e-3, decay="linear", final_fraction=0.0
    ),
    compile=True,
)
_dense = ModelRecipe(
    intermediate_size=2048,
    hidden_act="relu2",
    gated_mlp=False,
    qk_norm=True,
    zero_init_outputs=True,
    autocast_residual=True,
    layer_types=("full_attention",),
)
_hybrid = replace(_dense, window=64, full_reach="sequence", **hybrid_layers(8, full=(7,)))


def _larger(layers: int, heads: int, *, head_size: int, sequences: int, micro_batch: int, steps: int) -> Recipe:
    """The default recipe in a larger model, for sequences of 2,048 and about 20 tokens a parameter.

    Rates fall with the root of the width: an update of Muon, as large as AdamW's, then turns what goes through a matrix
    as far in a wide one as in a narrow one (arXiv 2310.17813, section 3). They were not tuned at these sizes.
    """
    width = heads * head_size
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return replace(
        _tuned,
        model=replace(_hybrid, **shape, num_attention_heads=heads, num_key_value_heads=4),
        optimizer=replace(_tuned.optimizer.at(math.sqrt(_hybrid.hidden_size / width)), warmup_steps=1000),
        sequence_length=2048,
        sequences_per_step=sequences,
        micro_batch=micro_batch,
        steps=steps,
    )


_small = replace(
    _hybrid,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    window=32,
    **hybrid_layers(3, full=(2,)),
)

_recipes = {
    "paper": Recipe(model=ModelRecipe(max_offset=None), compile=True),
    "dense": replace(_tuned, model=_dense),
    "hybrid": replace(_tuned, model=_hybrid),
    "five-minutes": replace(
        _tuned,
        model=_hybrid,
        optimizer=replace(_tuned.optimizer, learning_rate=4e-3, muon_learning_rate=1.1e-2),
        sequences_per_step=64,
        micro_batch=64,
        steps=4177,
    ),
    "hybrid-125m": _larger(16, 12, head_size=64, sequences=64, micro_batch=32, steps=19_000),
    "hybrid-300m": _larger(24, 16, head_size=64, sequences=128, micro_batch=16, steps=23_000),
    "hybrid-1b": _larger(24, 16, head_size=128, sequences=256, micro_batch=4, steps=43_000),
    "small": Recipe(
        model=_small,
        optimizer=replace(_tuned.optimizer, warmup_steps=50),
        sequence_length=256,
        sequences_per_step=16,
        steps=600,
        micro_batch=16,
        save_every=100,
        evaluate_every=100,
        evaluate_tokens=16_384,
    ),
}
PRESETS = {name: replace(recipe, out=Path("runs") / name) for name, recipe in _recipes.items()}
"""`paper` is the paper's linear stagger at its rate, `hybrid` the project's own, tuned (the study's ladder): a wider
window and two layers of full attention without rotary positions, bounded once they are trained. `dense` is its rival:
full attention, all else as in `hybrid`. `five-minutes` is `hybrid` for five minutes of an H200, in larger steps. Those
with a size are larger, for days of a GPU. `small` is `hybrid` for a laptop, every third layer full."""

DEFAULT, ON_CPU = "hybrid", "small"
"""The recipe of who names none, with a GPU and without."""


def load_recipe(name: str) -> Recipe:
    """A preset by name, or a recipe from a JSON file.

    Raises:
        InputError: for an unknown name, or a file with a misspelt key or a value of the wrong kind.
    """
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).suffix == ".json":
        return _from_json(Recipe, files.read_json(Path(name)), name)
    raise InputError(
        f"unknown recipe {name!r}: {suggestion(name, PRESETS, 'presets')} (a file of your own ends in .json)"
    )


_MOST = (1 << 31) - 1


def _check_count(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InputError(f"{name} is {value}; it must be {'at least 1' if value < 1 else f'at most {most:,}'}")


def to_json(recipe: Any) -> Any:
    """A recipe as plain JSON values."""
    if dataclasses.is_dataclass(recipe):
        return {one.name: to_json(getattr(recipe, one.name)) for one in dataclasses.fields(recipe)}
    if isinstance(recipe, tuple):
        return [to_json(one) for one in recipe]
    return str(recipe) if isinstance(recipe, Path) else recipe


_RENAMED = {
    "length": "sequence_length",
    "windows_per_step": "sequences_per_step",
    "peak_rate": "learning_rate",
    "clip_norm": "max_grad_norm",
    "attention": 'layer_types, such as ["full_attention"] for all layers alike',
    "full_layers": "layer_types, a type for each layer",
    "full_layers_rope": "no_rope_layers, for each layer 1 with RoPE or 0 without",
    "clip_offsets": 'max_offset, "sequence" for true and null for false',
    "bound_full_layers": 'full_reach, "sequence" for true and null for false',
}
"""What became of the names that recipes had in earlier versions."""


def _from_json(kind: type, value: Any, where: str) -> Any:
    """Build the dataclass `kind` from JSON, checking every key and value; `where` names the place in messages."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {_shown(value)}; expected an object with keys")
    hints = get_type_hints(kind)
    for key in value:
        if key in _RENAMED and key not in hints:
            raise InputError(f"{where} has the earlier name {key!r}; it is now {_RENAMED[key]}")
        if key not in hints:
            raise InputError(f"{where} has an unknown key {key!r}: {suggestion(key, hints, 'keys')}")
    return kind(**{key: _value(hints[key], one, f"{where}: {key}") for key, one in value.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _from_json(kind, value, where)  # pyright: ignore[reportArgumentType]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_value(get_args(kind)[0], one, where) for one in value)
    if get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            with contextlib.suppress(InputError):
                return _value(one, value, where)
    elif get_origin(kind) is Literal:
        if any(value == one and type(value) is type(one) for one in get_args(kind)):
            return value
    elif kind is float and type(value) in (int, float) and abs(value) < _HUGE:
        return float(value)
    elif kind is int and type(value) is int and abs(value) < _HUGE:
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind in (bool, NoneType) and type(value) is kind:
        return value
    raise InputError(f"{where} is {_shown(value)}; expected {_expected(kind)}")


_HUGE = 1 << 63
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null", Path: "a path"}


def _expected(kind: Any) -> str:
    """What a value of the type `kind` is, in words."""
    if get_origin(kind) is tuple:
        return f"a list, each {_expected(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return ("one of " if len(get_args(kind)) > 1 else "") + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        *others, last = map(_expected, get_args(kind))
        return f"{', '.join(others)} or {last}"
    return _WORDS[kind] + (" below 2**63" if kind in (int, float) else "")


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"
