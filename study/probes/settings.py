"""What each probe can be told: the same dataclass for its function and for its command line. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fibattn.training.healing_recipe import HealingRecipe

Start = Literal["uniform", "staggered", "fixed", "linear"]


@dataclass(frozen=True)
class Retrieval:
    """Copy from two marked distances: does a learned scale find them (paper, section 6)?"""

    depths: tuple[int, ...] = (2, 4, 8)
    """Layers of the models."""
    starts: tuple[Start, ...] = ("uniform", "staggered")
    """Learned scales from 1 or from the ramp, or integer offsets by a schedule."""
    seeds: tuple[int, ...] = (0, 1)
    """Each seeds the weights and the sequences of one run."""
    steps: int = 4000
    """Training steps of a run."""
    batch: int = 32
    """Sequences of a step."""
    learning_rate: float = 1e-3
    """After warm-up."""
    sequences: int = 128
    """Fresh sequences for the accuracy."""


@dataclass(frozen=True)
class Recall:
    """Associative recall and passkey over distance: rungs against a plain window of as many keys."""

    names: tuple[str, ...] = ()
    """Of window, stagger, hybrid, window hybrid, dense; chosen, and chosen, convolved, reaching hybrid. The first five
    when left out."""
    length: int = 4096
    """Tokens of a training row."""
    window: int = 128
    """Of the stagger; the plain window gets as many keys."""
    bound: int | None = None
    """How far back full layers look when they are asked; None: to the beginning. Training is the same."""
    layers: int = 8
    """Of every model."""
    distances: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
    """The farthest distances of the questions."""
    steps: int = 4000
    """Training steps of a model."""
    batch_tokens: int = 16_384
    """Tokens of a training step and, at most, of an evaluation pass; at least one row."""
    learning_rate: float = 1e-3
    """After warm-up."""
    asked: int = 512
    """Questions for each task and distance."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and rows; every model is trained from each of them."""


@dataclass(frozen=True)
class Ruler:
    """RULER's variable tracking, as a forced choice among the values in the text."""

    items: int = 120
    """For each number of hops."""
    seed: int = 0
    """Of the items."""
    batch: int = 4
    """Items of a forward pass; fewer need less memory."""


@dataclass(frozen=True)
class Lego:
    """LEGO over Z/2: chains of variables and negations, as a forced choice between 0 and 1."""

    items: int = 120
    """For each length of the chain."""
    seed: int = 0
    """Of the items."""
    batch: int = 16
    """Items of a forward pass; fewer need less memory."""


@dataclass(frozen=True)
class Harness:
    """LAMBADA, BLiMP and any other task of lm-eval (the extra `evaluation`)."""

    tasks: tuple[str, ...] = ("lambada_openai", "blimp")
    """Tasks or groups."""
    include: Path | None = None
    """A folder with more tasks in lm-eval's YAML."""
    limit: int | None = None
    """Items of each task at most, the first ones."""
    length: int | None = None
    """The longest input; the training length when left out."""
    batch: int = 16
    """Inputs of a forward pass."""


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass at the paper's shape: static offsets, learned scales, hybrid and dense."""

    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 131_072)
    """Tokens of a sequence."""
    tokens: int = 8192
    """Of a pass, as batches of shorter sequences: 8 x 1024 at first."""
    warmup: int = 5
    """Passes before the clock runs, of every model and length."""
    repeats: int = 20
    """Passes that are timed."""
    compiled: bool = False
    """Through torch.compile."""


@dataclass(frozen=True)
class Flops:
    """Counted operations of a forward pass, and attention's share of the layers, for every model of a study."""

    study: str = "paper"
    """Whose models."""
    length: int | None = None
    """Tokens of a sequence; the training length when left out."""


@dataclass(frozen=True)
class Healing:
    """A trained dense model made sparse in most layers, and healed with a part of its tokens."""

    model: Path
    """The dense model, or its finished run."""
    data: Path
    """What it was trained on, a folder made by `fibattn prepare`; healed and measured on, too."""
    tokens: int | None = None
    """How many tokens it was trained on; its recipe's when left out."""
    rows: tuple[str, ...] = (
        *("measured:4:rungs:0.02", "measured:4:window:0.02", "measured:4:rungs:0", "measured:4:window:0"),
        *("own:4:blocks-31-4:0", "own:4:blocks-31-4:0.02", "own:4:window-95:0", "own:4:window-95:0.02"),
        *("evenly:4:rungs:0", "worst:4:rungs:0", "measured:2:rungs:0", "measured:8:rungs:0"),
        *("evenly:4:rungs:0.02", "measured:4:rungs:0.05", "worst:4:rungs:0.02", "measured:4:rungs:0.01"),
        *("measured:8:rungs:0.02", "measured:2:rungs:0.02", "fresh:4:rungs:0.02"),
    )
    """What is measured, in this order, each PLACEMENT:COUNT:SHAPE:PART. COUNT layers stay full: those found on held-out
    text beside rungs (measured) or beside the row's own SHAPE (own), evenly over the depth, or whose loss alone hurts
    least (worst); fresh are the measured ones in a model trained from nothing. The others have rungs, a window of as
    many keys, window-W, or blocks-W-N: a window W and N blocks of 16 keys that each query chooses, or anchored-W-N:
    one of them is always the first of the text. PART of the tokens heals, 0 none."""
    window: int = 64
    """Of the layers with rungs."""
    learning_rate: float = 3e-4
    """Of the healing."""
    matching: float = HealingRecipe.matching
    """The part of the healing in which layers are matched."""
    text_weight: float = HealingRecipe.text_weight
    """Of the text's cross entropy in the rest."""
    sequences_per_step: int = 16
    """Of the healing, each of the training length."""
    search_tokens: int = 65_536
    """On which placements are measured, an equal part of each held-out set."""
    eval_tokens: int = 131_072
    """Targets of each held-out set at most."""
    factors: tuple[int, ...] = (1, 4, 16)
    """Times the training length at which the loss is measured; past it full layers are bounded."""
    work: Path = Path("healing")
    """Where the models lie until they are measured, each in a folder of its own, which is removed then."""
