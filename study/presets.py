"""The matrices of runs, as Python tables: what each study trains, most telling runs first.

All runs of a study differ in the attention of their layers and in nothing else: same shape, recipe, data and
order of sequences.
"""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from fibattn.errors import InputError, suggestion
from fibattn.pattern import Base, Pattern, Schedule, hybrid_layers, layer_patterns
from fibattn.training.presets import PRESETS
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from study.ladder import LADDER, MINUTES, Step
from study.lengthening import Lengthening, warmup
from study.rivals import DEFAULTS, FACTORS, FINALISTS, OURS, RIVALS, SEEDS, Rivals, bounds, name_of
from study.store import key_of

RopeScaling = Literal["linear", "yarn"]

SEED = 42
EQUAL_TIME = 446 / 767
"""Tokens of dense attention for one of the default recipe, in sequences of 8,192 in the same time of an H200."""


@dataclass(frozen=True)
class Run:
    """One model of a study."""

    name: str
    model: ModelRecipe
    seed: int = SEED
    """Of the weights and of the order of sequences."""
    rope_scaling: tuple[RopeScaling, ...] = ()
    """Ways to stretch RoPE past the training length, tried on the finished model."""
    bounds: tuple[int, ...] = ()
    """Bounds of the full layers, tried on the finished model: so many training lengths are seen, the last ones."""
    lengthening: Lengthening | None = None
    """How a copy of the finished model is trained on in longer sequences, and evaluated."""
    recipe: Recipe | None = None
    """The run's own recipe, for all but its model, seed and budget; the study's when None."""
    vocabulary: int | None = None
    """How large a tokenizer it is for; any when None."""

    def repeated(self, seed: int) -> "Run":
        """The same model from another seed."""
        return replace(self, name=f"{self.name}-seed{seed}", seed=seed)


@dataclass(frozen=True)
class Study:
    """Runs that belong together and the recipe that they share."""

    about: str
    recipe: Recipe
    runs: tuple[Run, ...]
    factors: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Evaluation lengths, in training lengths."""
    eval_tokens: int = 1_048_576
    """Targets of each held-out set."""
    items: int = 120
    """Questions of RULER and of LEGO, for each length of their chains; the paper's number. 0 asks none."""

    def chosen(self, patterns: Iterable[str]) -> tuple[Run, ...]:
        """The runs whose names match one of the shell-style `patterns`, all without any.

        Raises:
            InputError: for a pattern that no run matches.
        """
        wanted = list(patterns)
        for pattern in wanted:
            if not any(fnmatch(run.name, pattern) for run in self.runs):
                names = [run.name for run in self.runs]
                raise InputError(f"no run of the study is named {pattern!r}: {suggestion(pattern, names, 'runs')}")
        return tuple(run for run in self.runs if not wanted or any(fnmatch(run.name, one) for one in wanted))

    def resolved(self, run: Run, *, data: Path, out: Path, tokens: int | None, compiled: bool) -> Recipe:
        """The recipe of one run; `tokens` replaces the study's budget and shortens a warm-up over a tenth of it.

        Raises:
            InputError: when `tokens` is less than one step.
        """
        base = run.recipe or self.recipe
        step = base.sequences_per_step * base.sequence_length
        steps = base.steps if tokens is None else tokens // step
        if steps < 1:
            raise InputError(f"a budget of {tokens} tokens is less than one step of {step:,}; give more")
        return replace(
            base,
            data=data,
            out=out,
            model=run.model,
            optimizer=replace(base.optimizer, warmup_steps=warmup(base, steps)),
            steps=steps,
            init_seed=run.seed,
            data_seed=run.seed,
            compile=compiled,
        )

    def key(self, run: Run, recipe: Recipe, data_fingerprint: str) -> str:
        """By which a result of `run` is known; `recipe` is what `resolved` gave.

        A stage in longer sequences counts where its rate is its own: the first results had none of those.
        """
        own = run.lengthening is not None and run.lengthening.rate != 1
        stage = replace(run.lengthening.of(recipe, max(self.factors)), start=None) if own else None  # pyright: ignore
        return key_of(recipe, data_fingerprint, stage)


def paper_name(base: str, schedule: str, window: int) -> str:
    """Of a run of one of the paper's models, such as `pow2-linear-w12`."""
    return f"{'pow2-' if base == 'power_of_two' else ''}{schedule}-w{window}"


def _paper(schedule: Schedule, window: int, base: Base = "fibonacci") -> Run:
    model = ModelRecipe(base=base, schedule=schedule, window=window, max_offset=None)
    return Run(paper_name(base, schedule, window), model)


def _stagger(window: int, heads: bool = False) -> Run:
    name = f"{'heads' if heads else 'stagger'}-w{window}"
    return Run(name, ModelRecipe(window=window, stagger_heads=heads))


def key_count(patterns: Sequence[Pattern]) -> float:
    """How many keys a query far from the beginning of the text attends to: the mean over the patterns."""
    return statistics.mean(len(pattern.distances) for pattern in patterns)


def _control(stagger: Run) -> Run:
    """A plain window with as many keys as `stagger` attends to."""
    own = stagger.model
    patterns = layer_patterns(
        own.base,
        own.schedule,
        layers=own.num_hidden_layers,
        window=own.window,
        rungs=own.rungs,
        max_offset=_full.sequence_length - 1,
    )
    window = round(key_count(patterns)) - 1
    return Run(f"window-w{window}", ModelRecipe(layer_types=("sliding_attention",), window=window))


def _hybrid(name: str, run: Run, full: tuple[int, ...]) -> Run:
    shape = run.model
    layers = hybrid_layers(shape.num_hidden_layers, full, sparse=shape.layer_types[0])
    return Run(name, replace(shape, **layers), bounds=(1,))


_full = replace(PRESETS["paper"], save_every=2000, keep_checkpoints=1)

DENSE = Run(
    "dense",
    ModelRecipe(layer_types=("full_attention",)),
    rope_scaling=("yarn", "linear"),
    bounds=(1,),
    lengthening=Lengthening(),
)
"""The baseline, with all that helps it past its training length."""

HYBRID = Run(OURS, ModelRecipe(window=64, **hybrid_layers(8, full=(7,))), bounds=(1,))
"""The project's hybrid as the paper's models are trained: linear stagger, W = 64, two full layers without RoPE.

It is trained the same with and without its bound, so a run without one is evaluated both ways.
"""

_FULL = (7, 15)
_widths = tuple(_hybrid(f"hybrid-w{window}", _stagger(window), _FULL) for window in (128, 32, 12))
"""The same with other windows; the first two are its rivals."""

_KINDS: tuple[tuple[Schedule, Base], ...] = (
    ("linear", "fibonacci"),
    ("fixed", "fibonacci"),
    ("coprime", "fibonacci"),
    ("learned", "fibonacci"),
    ("linear", "power_of_two"),
)
_W12 = tuple(_paper(schedule, 12, base) for schedule, base in _KINDS)
_narrower = tuple(_paper(schedule, window, base) for window in (8, 6, 10) for schedule, base in _KINDS)
_controls = tuple(_control(_stagger(window)) for window in (128, 12, 32, 64, 256))

_small = ModelRecipe(hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4)


def _of_step(step: Step) -> Run:
    return Run(step.name, step.recipe.model, recipe=step.recipe, vocabulary=step.vocabulary)


def _rivals(of: Rivals, about: str) -> Study:
    tries = [(1.0, SEEDS[0]), *((one, SEEDS[0]) for one in FACTORS if one != 1), *((1.0, seed) for seed in SEEDS[1:])]
    runs = tuple(
        Run(
            name_of(name, factor, seed),
            model,
            seed=seed,
            rope_scaling=("yarn", "linear") if name == "dense" and factor == 1 else (),
            bounds=bounds(model),
            recipe=of.at_rate(factor),
        )
        for factor, seed in tries
        for name, model in of.models.items()
    )
    return Study(about, of.at_rate(1.0), runs, eval_tokens=524_288, items=0)


def _long() -> tuple[Run, ...]:
    """At the rates of the training, then at lower ones, dense attention also for no longer than the default recipe.

    `more` stages are their control: as many tokens at the lower rates, in sequences as before.
    """
    stage, alone = Lengthening(8, share=0.2, sequences=16), ("blocks-w31-none", "window-w127-none")
    full = {
        name: Run(name, DEFAULTS.models[name], bounds=bounds(DEFAULTS.models[name]), lengthening=stage)
        for name in ("dense", DEFAULTS.ours, *alone)
    }
    gentle = [
        replace(full[name], name=f"{name}-stage{rate:g}", lengthening=replace(stage, rate=rate))
        for name, rate in (*itertools.product(("dense", DEFAULTS.ours), (0.25, 0.1)), *((name, 0.25) for name in alone))
    ]
    short = replace(stage, rate=0.25, share=EQUAL_TIME * stage.share)
    gentle.append(replace(full["dense"], name="dense-short", lengthening=short))
    more = Lengthening(1, share=stage.share, rate=0.25)
    gentle += [replace(full[name], name=f"{name}-more0.25", lengthening=more) for name in ("dense", DEFAULTS.ours)]
    return (*full.values(), *gentle, *(run.repeated(SEEDS[1]) for run in gentle))


def _smoke(run: Run, **changes: object) -> Run:
    own = {name: getattr(run.model, name) for name in ("layer_types", "base", "schedule", "max_offset")}
    return replace(run, model=replace(_small, **{**own, **changes}))  # pyright: ignore


STUDIES: dict[str, Study] = {
    "smoke": Study(
        "tiny models of every kind on the standard library: does everything run? Minutes on two cores",
        Recipe(
            optimizer=OptimizerRecipe(learning_rate=5e-3, warmup_steps=20),
            sequence_length=128,
            sequences_per_step=8,
            micro_batch=8,
            steps=200,
            save_every=100,
            keep_checkpoints=1,
            evaluate_every=None,
        ),
        (
            _smoke(DENSE),
            *(_smoke(run) for run in _W12),
            _smoke(HYBRID, window=24, **hybrid_layers(5, full=(2, 4))),
            _smoke(replace(_controls[0], name="window-w24"), window=24),
        ),
        eval_tokens=32_768,
        items=6,
    ),
    "paper": Study(
        "the paper's 21 sparse models and its dense baseline, and the hybrid beside them",
        _full,
        (DENSE, _W12[0], HYBRID, *_W12[1:], _paper("fixed", 8, "power_of_two"), *_narrower),
    ),
    "seeds": Study(
        "two more seeds of dense, the five models with W = 12, the hybrid and its rivals",
        _full,
        tuple(run.repeated(seed) for seed in (SEED + 1, SEED + 2) for run in (DENSE, HYBRID, *_widths[:2], *_W12)),
    ),
    "beyond": Study(
        "past the paper: wider windows, staggered heads, plain windows of the same cost, hybrids, stretched RoPE",
        _full,
        (
            DENSE,
            HYBRID,
            _controls[0],
            _stagger(128),
            _stagger(128, heads=True),
            *_widths,
            _hybrid("hybrid-heads", _stagger(128, heads=True), _FULL),
            _hybrid("hybrid-window", _controls[0], _FULL),
            _hybrid("hybrid-window-w70", _control(_stagger(64)), _FULL),
            _hybrid("hybrid-4", _stagger(128), (3, 7, 11, 15)),
            _hybrid("hybrid-1", _stagger(128), (15,)),
            _hybrid("hybrid-early", _stagger(128), (3, 11)),
            *(
                _hybrid(f"hybrid-{one.name}", one, _FULL)
                for one in (_stagger(64, heads=True), _stagger(256, heads=True))
            ),
            _stagger(12),
            _stagger(12, heads=True),
            _stagger(64),
            _stagger(32),
            _stagger(256),
            *_controls[1:],
        ),
    ),
    "ladder": Study(
        "from the paper's recipe at a tuned rate to the project's, one change a step",
        _full,
        tuple(map(_of_step, LADDER)),
        factors=(1,),
        eval_tokens=524_288,
        items=0,
    ),
    "five-minutes": Study(
        "steps of the ladder in large steps, as far as five minutes of an H200 take them",
        PRESETS["five-minutes"],
        tuple(replace(_of_step(step), bounds=(1,)) for step in MINUTES),
        factors=(1, 2),
        eval_tokens=524_288,
        items=0,
    ),
    RIVALS.study: _rivals(RIVALS, "dense, hybrids and windows in the recipe of the step muon8: rates, then seeds"),
    FINALISTS.study: _rivals(
        FINALISTS, "the same in the default recipe, but that sequences are drawn with replacement"
    ),
    DEFAULTS.study: _rivals(DEFAULTS, "the same in the default recipe: whole passes over the text"),
    "long": Study(
        "dense, the default recipe, chosen blocks, a window: a fifth of the tokens more in sequences of 8,192",
        DEFAULTS.at_rate(1.0),
        _long(),
        factors=(1, 8, 16, 32),
        eval_tokens=524_288,
        items=0,
    ),
}

TUNED = ("ladder", RIVALS.study, FINALISTS.study, DEFAULTS.study, "five-minutes", "long")
"""Studies at tuned rates; each has tables of its own, and is compared with no other."""


def find_study(name: str) -> Study:
    """A study by name.

    Raises:
        InputError: for an unknown name.
    """
    if name in STUDIES:
        return STUDIES[name]
    raise InputError(f"unknown study {name!r}: {suggestion(name, STUDIES, 'studies')}")
