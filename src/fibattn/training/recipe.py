"""What a training run is: frozen dataclasses. No torch here: `fibattn train --help` reads this file."""

import math
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from fibattn.errors import InputError
from fibattn.pattern import Base, LayerType, Schedule

_MOST = (1 << 31) - 1


def _check_count(name: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise InputError(f"{name} is {value}; it must be {'at least 1' if value < 1 else f'at most {most:,}'}")


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
    """Query heads of a layer; hidden_size divides by them, unless head_dim says how large they are."""
    num_key_value_heads: int = 2
    """Heads of keys and values, each shared by as many query heads."""
    head_dim: int | None = None
    """Numbers of a head; None: hidden_size over the query heads."""
    layer_types: tuple[LayerType, ...] = ("fibonacci_attention",)
    """What each layer does: window and rungs, window alone, window and blocks that queries choose, or everything.
    Shorter than the depth, it repeats."""
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
    """How many distances there are before scaling; those inside the window add nothing."""
    max_offset: int | Literal["sequence"] | None = "sequence"
    """Drop rungs farther than this; sequence: those that no training sequence is long enough for. None keeps all, as
    the paper does."""
    full_reach: int | Literal["sequence"] | None = None
    """How far back the full layers of the finished model look; sequence: as far as in training, so that it runs for
    ever at constant cost. None: to the beginning. Training is the same."""
    blocks: int = 4
    """How many blocks a query of chosen_attention takes."""
    block_size: int = 16
    """Keys of such a block: 16, 32, 64 or 128."""
    block_reach: int = 1023
    """How far back the first key of such a block may be."""
    block_rope: bool = False
    """Choose and read such blocks by queries and keys with rotary positions, as the window is read."""
    block_anchor: bool = False
    """Let one of them always be the first of the text."""
    kv_convolution: int = 0
    """Let keys and values of all but full layers carry those of their last so many tokens; 0: of none."""
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
    head_gates: bool = False
    """Let each layer's input decide how much of every head's output goes on."""
    value_embeddings: bool = False
    """Give every second layer an embedding of its own, which adds to the values of each token."""
    zero_init_outputs: bool = False
    """Begin with layers that add nothing."""
    autocast_residual: bool = False
    """Keep the residual stream in 16 bits where the products are."""

    def check(self) -> None:
        """Refuse what only a recipe can say wrongly; the rest is checked with the configuration."""
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise InputError(f"model.rope_theta is {self.rope_theta}; it must be a finite number above 0")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
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
    muon_weight_decay: float | None = None
    """On the matrices that Muon trains; None: weight_decay."""
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
    value_embedding_pace: float = 10.0
    """How many times as fast as learning_rate value embeddings learn; weight decay takes from them as from the rest."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""

    @property
    def rates(self) -> str:
        """The highest rates, in words."""
        muon = f", {self.muon_learning_rate} (Muon, the matrices of the layers)" if self.muon else ""
        return f"{self.learning_rate} (AdamW){muon}"

    def at(self, factor: float) -> "OptimizerRecipe":
        """The same with both highest rates times `factor`, to five places."""
        rates = {name: round(getattr(self, name) * factor, 5) for name in ("learning_rate", "muon_learning_rate")}
        return replace(self, **rates)

    def check(self) -> None:
        """Refuse values that cannot train."""
        rates = ("learning_rate", "muon_learning_rate")
        for right, expected, names in (
            (lambda x: 0 < x < math.inf, "above 0", (*rates, "epsilon", "max_grad_norm", "value_embedding_pace")),
            (lambda x: 0 < x <= 1, "above 0, at most 1", ("decay_fraction",)),
            (lambda x: 0 <= x <= 1, "from 0 to 1", ("final_fraction", "weight_decay", "muon_weight_decay")),
            (lambda x: 0 <= x < 1, "from 0 to below 1", ("beta1", "beta2", "muon_momentum")),
            (lambda x: 0 <= x <= _MOST, f"from 0 to {_MOST:,}", ("warmup_steps",)),
        ):
            for name in names:
                if (value := getattr(self, name)) is not None and not right(value):
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
    """Train the start's own model, perhaps a converted one; it notes a longer length. `model` then says nothing."""
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
        start = f"start a multiple of it: torchrun --nproc-per-node {max(cut, 2)} -m fibattn train …"
        sizes = {"processes under torchrun": processes, "tokens of a sequence": self.sequence_length}
        for (what, number), change in zip(sizes.items(), (start, "change one of them"), strict=True):
            if number % cut:
                raise InputError(f"context_parallel is {cut}, and {number} {what} do not divide by it; {change}")
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
        """Refuse values that cannot train."""
        counts = ("sequence_length", "sequences_per_step", "steps", "micro_batch", "context_parallel")
        for name in (*counts, "log_every", "save_every", "keep_checkpoints", "evaluate_every", "evaluate_tokens"):
            _check_count(name, getattr(self, name), _MOST)
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
