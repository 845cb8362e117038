"""Results as the report asks for them: models of one budget beside each other, each with its seeds.

Losses are in nats, the mean over the held-out sets, so a perplexity here is the geometric mean over the sets
and a difference of two losses is the logarithm of a ratio of perplexities.
"""

import hashlib
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from fibattn import files
from fibattn.errors import InputError
from fibattn.training.recipe import DEFAULT
from study.store import LENGTHENED, Store, ways

PLAIN = "plain"
ROPE_NAMES = {"yarn": "YaRN", "linear": "linear scaling"}
"""Ways to stretch RoPE, in words."""

Probes = dict[str, list[dict[str, Any]]]
"""What `python -m study probe` wrote into `probes/*.json`, by the probe's name."""


def paper() -> dict[str, Any]:
    """The published figures of arXiv 2606.28560."""
    return json.loads(package_files("study").joinpath("paper.json").read_text(encoding="utf-8"))


def papers_gain() -> list[float]:
    """By how many nats the paper's linear stagger is ahead of fixed, W = 12, in each part of a window."""
    published = paper()["position_nll_8_bins"]
    fixed, linear = (_by_part(published[f"fibonacci/{name}/w12"].values()) for name in ("fixed", "linear"))
    return [one - other for one, other in zip(fixed, linear, strict=True)]


def in_words(way: str) -> str:
    """What is different in one of the `ways`, or `plain`."""
    if way == PLAIN:
        return "plainly"
    if way in ROPE_NAMES:
        return ROPE_NAMES[way]
    tokens = f"{int(way.removeprefix(LENGTHENED)):,}"
    return f"a tenth more at {tokens}" if way.startswith(LENGTHENED) else f"bounded to {tokens}"


def as_saved(run: dict[str, Any]) -> str:
    """The way in which a finished model of the default recipe looks back: no farther than it was trained to.

    `PLAIN` where it was not evaluated so.
    """
    way = str(run["trained_at"])
    return way if way in ways(run) else PLAIN


def _measured(run: dict[str, Any], length: int, way: str) -> dict[str, dict[str, Any]]:
    """What was measured on each held-out set at `length`; plainly, where a way changes nothing at that length."""
    plain, other = run["evaluation"], {} if way == PLAIN else ways(run)[way]
    return {name: other.get(name, {}).get(str(length)) or rows[str(length)] for name, rows in plain.items()}


def losses(run: dict[str, Any], length: int, way: str = PLAIN) -> dict[str, float]:
    """The loss of a run on each held-out set at `length`."""
    return {name: row["nll"] for name, row in _measured(run, length, way).items()}


def mean_loss(run: dict[str, Any], length: int, way: str = PLAIN) -> float:
    """The mean loss of a run over the held-out sets at `length`."""
    return statistics.mean(losses(run, length, way).values())


def bins(run: dict[str, Any], length: int, way: str = PLAIN) -> list[float]:
    """The loss of a run in equal parts of windows of `length`, the mean over the held-out sets."""
    return _by_part(row["bins"] for row in _measured(run, length, way).values())


def _by_part(several: Iterable[Sequence[float]]) -> list[float]:
    """The mean of several curves, part by part."""
    return [statistics.mean(values) for values in zip(*several, strict=True)]


@dataclass(frozen=True)
class Model:
    """One model of a study at one budget: its runs, lowest seed first."""

    name: str
    runs: tuple[dict[str, Any], ...]
    note: str = ""
    """What sets it apart from a newer model of the same name."""

    @property
    def first(self) -> dict[str, Any]:
        """The run that stands for the model in tables without seeds."""
        return self.runs[0]

    @property
    def recipe(self) -> dict[str, Any]:
        """The model's part of its recipe, and which of its layers are full, for the words of tables."""
        own = self.first["recipe"]["model"]
        kinds, rotated = own["layer_types"], own["no_rope_layers"]
        full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        sparse = next((kind for kind in kinds if kind != "full_attention"), "full_attention")
        return own | {
            "attention": sparse.removesuffix("_attention"),
            "full_layers": full if len(full) < len(kinds) else [],
            "full_layers_rope": all(rotated[layer] for layer in full),
            "clip_offsets": own["max_offset"] is not None,
        }

    @property
    def keys(self) -> float:
        """Keys that a query reads at the training length, the mean over layers and positions."""
        return self.first["model"]["keys"]

    @property
    def is_papers(self) -> bool:
        """Whether it is one of the paper's 21 sparse models."""
        own = self.recipe
        plain = not (own["clip_offsets"] or own["full_layers"] or own["stagger_heads"])
        return own["attention"] == "fibonacci" and plain

    @property
    def paper_key(self) -> str | None:
        """How the published figures call it, None when they do not have it."""
        if self.recipe["attention"] == "full":
            return "dense"
        return "{base}/{schedule}/w{window}".format(**self.recipe) if self.is_papers else None

    @property
    def label(self) -> str:
        """What it is, in words."""
        return self._words() + self.note

    def ways(self) -> list[str]:
        """The other ways in which some seed of it was evaluated."""
        return list(dict.fromkeys(way for run in self.runs for way in ways(run)))

    def tried(self, way: str) -> dict[str, Any]:
        """The run that stands for the model in one of its ways: the first that was evaluated so."""
        return self.first if way == PLAIN else next(run for run in self.runs if way in ways(run))

    def label_of(self, way: str) -> str:
        """The same, evaluated in one of its ways."""
        return self.label if way == PLAIN else f"{self.label}, {in_words(way)}"

    def label_of_tried(self, way: str) -> str:
        """The label of `tried(way)`, which tells its seed where it is not the first run."""
        run = self.tried(way)
        return self.label_of(way) + ("" if run is self.first else f", seed {run['seed']}")

    def _words(self) -> str:
        own = self.recipe
        if own["attention"] == "full":
            return "dense"
        words = "window only" if own["attention"] == "sliding" else own["schedule"]
        if own["attention"] == "fibonacci":
            words = ("power-of-two " if own["base"] == "power_of_two" else "") + words
            words += " over heads too" if own["stagger_heads"] else ""
        words += f", W = {own['window']}"
        if own["full_layers"]:
            layers = ", ".join(map(str, own["full_layers"]))
            words = f"hybrid: {words}, full {layers}"
            words += " with RoPE" if own["full_layers_rope"] else ""
        elif own["attention"] == "fibonacci" and own["clip_offsets"]:
            words += ", clipped"
        return words

    def lengths(self) -> list[int]:
        """The evaluation lengths."""
        return sorted(int(length) for length in next(iter(self.first["evaluation"].values())))

    def losses(self, length: int) -> dict[str, float]:
        """The loss on each held-out set at `length`."""
        return losses(self.first, length)

    def loss(self, length: int, way: str = PLAIN) -> float:
        """The mean loss over the held-out sets at `length`, of the run that stands for the model in this way."""
        return mean_loss(self.tried(way), length, way)

    def alone(self) -> list[dict[str, Any]]:
        """The runs that had a GPU for themselves while they trained: only their speeds may be compared."""
        return [
            run
            for run in self.runs
            if run["training"].get("alone") or (run["hardware"].get("processes_a_gpu") or 1) == 1
        ]

    def seed_losses(self, length: int) -> list[float]:
        """The mean loss of every seed at `length`."""
        return [mean_loss(run, length) for run in self.runs]

    def beside(self, other: "Model") -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """This model's runs and the other's, by the seeds that both have."""
        theirs = {run["seed"]: run for run in other.runs}
        return [(run, theirs[run["seed"]]) for run in self.runs if run["seed"] in theirs]

    def gap(self, other: "Model", length: int) -> float | None:
        """By how much the mean loss is above the other's, over the seeds that both have; None where they share none."""
        gaps = [mean_loss(own, length) - mean_loss(theirs, length) for own, theirs in self.beside(other)]
        return statistics.mean(gaps) if gaps else None

    def last(self, length: int) -> float:
        """The mean loss over the held-out sets of the last 256 positions of windows of `length`."""
        sets = self.first["evaluation"].values()
        return statistics.mean(math.log(rows[str(length)]["last_256_perplexity"]) for rows in sets)

    def bins(self, length: int) -> list[float]:
        """The loss in equal parts of windows of `length`, the mean over the sets."""
        return bins(self.first, length)

    def gaps_by_part(self, other: "Model", length: int, way: str = PLAIN) -> list[float]:
        """As `gap`, in each equal part of windows of `length`; empty where the two share no seed.

        With another way to evaluate this model, over the seeds that it was tried on.
        """
        both = [(own, theirs) for own, theirs in self.beside(other) if way == PLAIN or way in ways(own)]
        pairs = [(bins(own, length, way), bins(theirs, length)) for own, theirs in both]
        gaps = [[one - two for one, two in zip(own, theirs, strict=True)] for own, theirs in pairs]
        return _by_part(gaps)


@dataclass(frozen=True)
class Group:
    """All models that were trained on the same data for as many tokens: what may be compared."""

    tokens: int
    trained_at: int
    data_fingerprint: str
    models: tuple[Model, ...]

    def get(self, name: str) -> Model | None:
        """The model of that name."""
        return next((model for model in self.models if model.name == name), None)

    @property
    def sets(self) -> list[str]:
        """The held-out sets."""
        return list(self.models[0].first["evaluation"])

    @property
    def lengths(self) -> list[int]:
        """The evaluation lengths that all models have."""
        return sorted(set.intersection(*(set(model.lengths()) for model in self.models)))

    @property
    def plain_window(self) -> Model | None:
        """The plain window that reads nearest to as many keys as the default recipe; without that one, the widest."""
        windows = [one for one in self.models if one.recipe["attention"] == "sliding" and not one.recipe["full_layers"]]
        if not windows:
            return None
        ours = self.get(DEFAULT)
        wanted = ours.keys if ours else max(one.keys for one in windows)
        return min(windows, key=lambda one: abs(one.keys - wanted))

    def compared(self, models: Sequence[Model]) -> dict[str, float]:
        """The mean loss of each at the training length, by name, best first, over the seeds that all of them have.

        Empty where no seed is common to all.
        """
        seeds = set.intersection(*({run["seed"] for run in model.runs} for model in models)) if models else set()
        if not seeds:
            return {}
        means = {
            model.name: statistics.mean(mean_loss(run, self.trained_at) for run in model.runs if run["seed"] in seeds)
            for model in models
        }
        return dict(sorted(means.items(), key=lambda one: one[1]))

    def sigma(self, *models: Model) -> float | None:
        """Standard deviation of the loss over seeds at the training length, pooled over `models`; None without seeds.

        Over those that are compared and no others: a model that is about to learn to copy has many times the
        deviation of one that cannot.
        """
        squares, degrees = 0.0, 0
        for model in models:
            found = model.seed_losses(self.trained_at)
            if len(found) > 1:
                squares += (len(found) - 1) * statistics.variance(found)
                degrees += len(found) - 1
        return math.sqrt(squares / degrees) if degrees else None

    def tie(self, *models: Model) -> float:
        """Losses of these closer than this count as equal: twice the deviation of a difference, 0.5 % without seeds."""
        sigma = self.sigma(*models)
        return math.log(1.005) if sigma is None else 2 * math.sqrt(2) * sigma


@dataclass(frozen=True)
class Results:
    """Everything that a results folder holds; of the longest training windows the group with the most models first."""

    groups: tuple[Group, ...]
    failures: tuple[dict[str, Any], ...]
    probes: Probes

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read a results folder.

        Raises:
            InputError: when it holds no finished run.
        """
        store = Store(folder)
        records, finished = store.records(), store.finished()
        if not finished:
            raise InputError(f"{folder} holds no finished run; make some with `python -m study run`")
        failures = tuple(one for one in records if one["kind"] == "failure" and one["key"] not in finished)
        probes: Probes = defaultdict(list)
        for path in sorted(folder.glob("probes/*.json")):
            probe = files.read_json(path)
            if not (isinstance(probe, dict) and isinstance(probe.get("probe"), str) and probe.get("rows")):
                raise InputError(
                    f"{path} is not a result of `python -m study probe`; move it out of the folder, or make it anew"
                )
            probes[probe["probe"]].append(probe)
        return cls(_grouped(finished.values()), failures, dict(probes))


def _grouped(records: Iterable[dict[str, Any]]) -> tuple[Group, ...]:
    parts: dict[tuple[int, int, str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        data = record["inputs"]["data_fingerprint"]
        parts[record["tokens"], record["trained_at"], data, _targets(record)].append(record)
    groups = [Group(tokens, length, data, _models(runs)) for (tokens, length, data, _), runs in parts.items()]
    return tuple(sorted(groups, key=lambda group: (-group.trained_at, -len(group.models), -group.tokens)))


def _targets(record: dict[str, Any]) -> int:
    """How many targets of a set it was evaluated on: what was evaluated on fewer is not comparable."""
    return max(row["targets"] for rows in record["evaluation"].values() for row in rows.values())


def _models(records: Sequence[dict[str, Any]]) -> tuple[Model, ...]:
    """One model for each recipe; where two recipes have one name, the newest has it alone."""
    named: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record["time"]):
        named[re.sub(r"-seed\d+$", "", record["run"])][_digest(record["recipe"])].append(record)
    models = []
    for name, recipes in named.items():
        *older, newest = sorted(recipes, key=lambda digest: recipes[digest][-1]["time"])
        models.append(Model(name, _by_seed(recipes[newest])))
        models += [Model(f"{name}@{one}", _by_seed(recipes[one]), f", earlier recipe {one}") for one in older]
    return tuple(models)


def _by_seed(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(sorted(runs, key=lambda run: run["seed"]))


def _digest(recipe: dict[str, Any]) -> str:
    """What a recipe says but for its seeds, in six letters."""
    text = json.dumps({**recipe, "init_seed": None, "data_seed": None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]
