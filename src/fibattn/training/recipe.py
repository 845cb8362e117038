"""What a training run is: frozen dataclasses, presets as a Python table, and their JSON.

No torch here: `fibattn train --help` reads this file. A run writes its recipe as `recipe.json`, and
`fibattn train recipe.json` does that run again.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fibattn import files
from fibattn.errors import InputError, suggestion
from fibattn.pattern import Base, Schedule


@dataclass(frozen=True)
class ModelRecipe:
    """The shape of the model and what its layers attend to. Defaults: the paper's 60 M parameters."""

    hidden_size: int = 512
    intermediate_size: int = 1366
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    attention: Literal["fibonacci", "sliding", "full"] = "fibonacci"
    """What the layers do: window and rungs, window only, or everything."""
    base: Base = "fibonacci"
    schedule: Schedule = "linear"
    stagger_heads: bool = False
    """Give every KV head of a layer rungs of its own scale, too."""
    window: int = 12
    """Distances 0 … window are attended: window + 1 keys."""
    rungs: int = 15
    clip_offsets: bool = True
    """Drop rungs that no training window is long enough for; the paper keeps them, untrained."""
    full_layers: tuple[int, ...] = ()
    """Layers with full attention instead."""
    full_layers_rope: bool = True
    """Whether those layers rotate their queries and keys."""
    bound_full_layers: bool = False
    """Let full layers of the finished model look back as far as a training window is long and no farther, so that it
    runs for ever at constant cost. Training is the same."""
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW and its rate: linear warm-up, then a cosine to a fraction of the peak (paper, section 4)."""

    peak_rate: float = 3e-4
    final_fraction: float = 0.1
    warmup_steps: int = 300
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On parameters of two dimensions or more."""
    clip_norm: float = 1.0

    def check(self) -> None:
        """Refuse values that cannot train.

        Raises:
            InputError: naming the field, its value and what was expected.
        """
        for name in ("peak_rate", "epsilon", "clip_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("final_fraction", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} is {getattr(self, name)}; it must be from 0 to below 1")
        if self.warmup_steps < 0:
            raise InputError(f"optimizer.warmup_steps is {self.warmup_steps}; it must be 0 or more")


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
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    length: int = 1024
    """Tokens of a training window."""
    windows_per_step: int = 32
    steps: int = 13_000
    order: Literal["random", "epochs"] = "random"
    """Windows drawn with replacement (the paper's), or every window once an epoch."""
    init_seed: int = 42
    data_seed: int = 42
    micro_batch: int = 32
    """Windows a process takes at once; fewer need less memory. The step stays the same up to rounding."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast dtype over float32 parameters; auto is bf16 on a GPU."""
    compile: bool = False
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes under torchrun do: copy the model or shard it (FSDP2)."""
    log_every: int = 10
    save_every: int = 1000
    keep_checkpoints: int = 2
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl."""

    @property
    def tokens(self) -> int:
        """Training targets in all."""
        return self.steps * self.windows_per_step * self.length

    @property
    def full_reach(self) -> int | None:
        """How far back the full layers of the finished model look; None: to the beginning."""
        return max(self.length - 1, 1) if self.model.bound_full_layers else None

    def micro_batches(self, processes: int) -> int:
        """How many micro-batches each of `processes` takes a step.

        Raises:
            InputError: when a step does not divide evenly.
        """
        share, rest = divmod(self.windows_per_step, self.micro_batch * processes)
        if rest or not share:
            raise InputError(
                f"{self.windows_per_step} windows a step do not divide into micro-batches of {self.micro_batch} on "
                f"{processes} process(es); set micro_batch to a divisor of {self.windows_per_step / processes:g}"
            )
        return share

    def check(self) -> None:
        """Refuse values that cannot train.

        Raises:
            InputError: naming the field, its value and what was expected.
        """
        positive = (
            "length",
            "windows_per_step",
            "steps",
            "micro_batch",
            "log_every",
            "save_every",
            "keep_checkpoints",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self.optimizer.check()
        for name in ("init_seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 2**32 - 1")
        if not (math.isfinite(self.model.rope_theta) and self.model.rope_theta > 0):
            raise InputError(f"model.rope_theta is {self.model.rope_theta}; it must be a finite number above 0")
        outside = [layer for layer in self.model.full_layers if not 0 <= layer < self.model.num_hidden_layers]
        if outside:
            raise InputError(f"model.full_layers has {outside}; the layers are 0 … {self.model.num_hidden_layers - 1}")
        if self.model.bound_full_layers and not (self.model.full_layers or self.model.attention == "full"):
            raise InputError(
                "model.bound_full_layers is set, but no layer has full attention; name some in model.full_layers, or "
                "leave it out"
            )


_paper = Recipe(out=Path("runs/paper"), model=ModelRecipe(clip_offsets=False), compile=True)
_small = ModelRecipe(hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6)

PRESETS: dict[str, Recipe] = {
    "paper": _paper,
    "dense": replace(_paper, out=Path("runs/dense"), model=ModelRecipe(attention="full")),
    "hybrid": replace(
        _paper,
        out=Path("runs/hybrid"),
        model=ModelRecipe(window=64, full_layers=(7, 15), full_layers_rope=False, bound_full_layers=True),
    ),
    "small": Recipe(
        out=Path("runs/small"),
        model=_small,
        optimizer=OptimizerRecipe(peak_rate=2e-3, warmup_steps=50),
        length=256,
        windows_per_step=16,
        steps=1000,
        micro_batch=16,
        save_every=100,
    ),
}
"""`paper` is the paper's linear stagger, `dense` its baseline, `hybrid` the project's own: a wider window and two
layers of full attention without rotary positions, bounded once they are trained; in the study ahead of both.
`small` trains on a laptop."""

DEFAULT = "hybrid"
"""The recipe of who names none."""


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


def to_json(recipe: Any) -> Any:
    """A recipe as plain JSON values."""
    if dataclasses.is_dataclass(recipe):
        return {one.name: to_json(getattr(recipe, one.name)) for one in dataclasses.fields(recipe)}
    if isinstance(recipe, tuple):
        return [to_json(one) for one in recipe]
    return str(recipe) if isinstance(recipe, Path) else recipe


def _from_json(kind: type, value: Any, where: str) -> Any:
    """Build the dataclass `kind` from JSON, checking every key and value; `where` names the place in messages."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {value!r}; expected an object with keys")
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise InputError(f"{where} has an unknown key {key!r}: {suggestion(key, hints, 'keys')}")
    return kind(**{key: _value(hints[key], one, f"{where}: {key}") for key, one in value.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _from_json(kind, value, where)  # pyright: ignore[reportArgumentType]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{where} is {value!r}; expected one of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is UnionType:
        wanted = next(one for one in get_args(kind) if one is not type(None))
        return None if value is None else _value(wanted, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} is {value!r}; expected a list")
        return tuple(_value(get_args(kind)[0], one, where) for one in value)
    expected: type | UnionType = {float: int | float, Path: str}.get(kind, kind)
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where} is {value!r}; expected {getattr(kind, '__name__', kind)}")
    return kind(value)
