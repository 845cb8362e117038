"""`python -m study probe NAME`: measures beside perplexity, each as a table and a JSON file that the report reads."""

import importlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError, suggestion

FOLDER = Path("study/results/probes")
Out = Annotated[Path, tyro.conf.arg(help="Where the JSON goes.")]
OutOfModel = Annotated[
    Path | None, tyro.conf.arg(help=f"Where the JSON goes; {FOLDER}/PROBE-MODEL.json when left out.")
]
Model = Annotated[Path, tyro.conf.Positional]

_VOCABULARY = 32_768  # the paper's
_TRAINING = ("retrieval", "recall")
"""Probes that train models, and write every row as it comes: cut short, the same command goes on with what is left."""


@dataclass(frozen=True)
class Retrieval:
    """Copy from two marked distances: does a learned scale find them (paper, section 6)?"""

    depths: tuple[int, ...] = (2, 4, 8)
    """Layers of the models."""
    starts: tuple[Literal["uniform", "staggered", "fixed", "linear"], ...] = ("uniform", "staggered")
    """Learned scales from 1 or from the ramp, or integer offsets by a schedule."""
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 4000
    batch: int = 32
    """Sequences of a step."""
    peak_rate: float = 1e-3
    sequences: int = 128
    """Fresh sequences for the accuracy."""
    out: Out = FOLDER / "retrieval.json"


@dataclass(frozen=True)
class Recall:
    """Associative recall and passkey over distance: rungs against a plain window of as many keys."""

    names: tuple[str, ...] = ()
    """Of window, stagger, hybrid, window hybrid and dense; all when left out."""
    length: int = 4096
    """Tokens of a training row."""
    window: int = 128
    """Of the stagger; the plain window gets as many keys."""
    layers: int = 8
    distances: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
    """Where recall is asked for."""
    steps: int = 4000
    batch_tokens: int = 16_384
    peak_rate: float = 1e-3
    asked: int = 512
    """Questions for each task and distance."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every model is trained from each of them."""
    out: Out = FOLDER / "recall.json"


@dataclass(frozen=True)
class Ruler:
    """RULER's variable tracking, as a forced choice among the values in the text."""

    model: Model
    """A model folder, or a finished run."""
    items: int = 120
    """For each number of hops."""
    seed: int = 0
    batch: int = 4
    """Items of a forward pass; fewer need less memory."""
    out: OutOfModel = None


@dataclass(frozen=True)
class Lego:
    """LEGO over Z/2: chains of variables and negations, as a forced choice between 0 and 1."""

    model: Model
    """A model folder, or a finished run."""
    items: int = 120
    """For each length of the chain."""
    seed: int = 0
    batch: int = 16
    """Items of a forward pass; fewer need less memory."""
    out: OutOfModel = None


@dataclass(frozen=True)
class Harness:
    """LAMBADA, BLiMP and any other task of lm-eval (the extra evaluation)."""

    model: Model
    """A model folder, or a finished run."""
    tasks: tuple[str, ...] = ("lambada_openai", "blimp")
    """Tasks or groups."""
    include: Path | None = None
    """A folder with more tasks in lm-eval's YAML."""
    limit: int | None = None
    """Items of each task at most."""
    length: int | None = None
    """The longest input; the training length when left out."""
    batch: int = 16
    out: OutOfModel = None


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass at the paper's shape: static offsets, learned scales, the default
    recipe (hybrid) and dense."""

    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 131_072)
    tokens: int = 8192
    """Of a pass, as batches of shorter sequences: 8 x 1024 at first."""
    warmup: int = 5
    repeats: int = 20
    """Passes that are timed."""
    compiled: bool = False
    """Through torch.compile."""
    out: Out = FOLDER / "latency.json"


@dataclass(frozen=True)
class Flops:
    """Counted operations of a forward pass, and attention's share of the layers, for every model of a study."""

    study: str = "paper"
    """Whose models."""
    length: int | None = None
    """Tokens of a sequence; the training length when left out."""
    out: Out = FOLDER / "flops.json"


PROBES = {kind.__name__.lower(): kind for kind in (Retrieval, Recall, Ruler, Lego, Harness, Latency, Flops)}


def run(arguments: list[str]) -> None:
    """Run the probe named by the first argument, print its table, write its JSON."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m study probe NAME [flags]      python -m study probe NAME --help\n")
        print("\n".join(f"  {name:<11}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in PROBES.items()))
        return
    name = arguments[0]
    if name not in PROBES:
        raise InputError(f"there is no probe {name!r}: {suggestion(name, PROBES, 'probes')}")
    chosen: Any = parse(PROBES[name], arguments[1:], f"python -m study probe {name}")
    result = _flops(chosen) if name == "flops" else _measure(name, chosen)
    _print(result)
    out = chosen.out or _out_of_model(result)
    if name not in _TRAINING:
        _write(out, result)
    print(f"written to {out}")


def _out_of_model(result: dict[str, Any]) -> Path:
    """A file for each model, so that the report has them all."""
    from fibattn.model.loading import model_name

    return FOLDER / f"{result['probe']}-{model_name(Path(result['model']).resolve())}.json"


def _write(path: Path, result: dict[str, Any]) -> None:
    """The result, and in every new row on what and when it was made."""
    from study.measure import machine, versions

    made = {**machine(), **versions(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    for row in result["rows"]:
        row.setdefault("made", made)
    files.write_json(path, result)


def _measure(name: str, chosen: Any) -> dict[str, Any]:
    """Call the function of the probe's name in the module of its name, with a trained model where it takes one."""
    probe = getattr(importlib.import_module(f"study.probes.{name}"), name)
    given = {field: value for field, value in vars(chosen).items() if field not in ("out", "model")}
    if name in _TRAINING:
        earlier = files.read_json(chosen.out) if chosen.out.exists() else None
        return probe(**given, earlier=earlier, keep=partial(_write, chosen.out))
    if not hasattr(chosen, "model"):
        return probe(**given)
    from fibattn.data.tokenizer import load_tokenizer
    from fibattn.model.loading import find_model, load_model

    folder = find_model(chosen.model)
    result = probe(load_model(folder), load_tokenizer(folder), **given)
    return {"probe": name, "model": str(folder), **result}


def _flops(chosen: Flops) -> dict[str, Any]:
    from fibattn.model.cost import flops
    from fibattn.training.run import model_config
    from study.presets import find_study

    study = find_study(chosen.study)
    length = study.recipe.length if chosen.length is None else chosen.length
    if length < 1:
        raise InputError(f"length is {length}; it must be at least 1")
    rows = []
    for run in study.runs:
        cost = flops(model_config(replace(study.recipe, model=run.model), _VOCABULARY, 0), length)
        parts = {"projections": cost.projections, "attention": cost.attention, "head": cost.head}
        rows.append({"model": run.name, **parts, "total": cost.total, "attention_share": cost.attention_share})
    return {"probe": "flops", "study": chosen.study, "length": length, "vocabulary": _VOCABULARY, "rows": rows}


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from study.report.probe_tables import cell, flat

    rows = [flat(row) for row in result["rows"]]
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in columns))
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    console.print(table)
