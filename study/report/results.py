"""A results folder as data frames: `runs` has a row for each run, `losses` one for each of its evaluations.

Losses are in nats. Their mean over the held-out sets is the logarithm of a geometric mean of perplexities, and a
difference of two is the logarithm of a ratio.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import pandas as pd

from fibattn import files
from fibattn.errors import InputError
from study.presets import STUDIES, TUNED, paper_name
from study.report.recipes import described
from study.rivals import OURS
from study.store import LENGTHENED, Store, results, ways

PLAIN = "plain"
PARTS = tuple(str(part) for part in range(1, 9))
"""Equal parts of a sequence."""
ROPE_NAMES = {"yarn": "YaRN", "linear": "linear scaling"}
"""Ways to stretch RoPE, in words."""
_SAME = ["tokens", "trained_at", "data", "targets"]
"""What runs have in common that may be compared; fewer targets than others have make another evaluation."""

Frame = Any
"""A data frame or a series: their own types say of an element, a row and a table alike that it may be any of these."""
Probes = dict[str, list[dict[str, Any]]]
"""What `python -m study probe` wrote into `probes/*.json`, by the probe's name."""


def paper() -> dict[str, Any]:
    """The published figures of arXiv 2606.28560."""
    return json.loads(package_files("study").joinpath("paper.json").read_text(encoding="utf-8"))


def published_name(key: str) -> str:
    """The study's name of a model that the published figures call `base/schedule/wN`, or `dense`."""
    base, _, rest = key.partition("/")
    schedule, _, window = rest.partition("/w")
    return paper_name(base, schedule, int(window)) if rest else key


def papers_gain() -> Frame:
    """By how many nats the paper's linear stagger is ahead of fixed, W = 12, in each part of a sequence."""
    published = paper()["position_nll_8_bins"]
    fixed, linear = (pd.DataFrame(published[f"fibonacci/{name}/w12"], index=PARTS) for name in ("fixed", "linear"))
    return fixed.mean(axis=1) - linear.mean(axis=1)


def in_words(way: str) -> str:
    """What is different in one of the `ways`, or `plain`."""
    if way == PLAIN:
        return "plainly"
    if way in ROPE_NAMES:
        return ROPE_NAMES[way]
    tokens = f"{int(way.removeprefix(LENGTHENED)):,}"
    return f"a tenth more at {tokens}" if way.startswith(LENGTHENED) else f"bounded to {tokens}"


def trained_alone(record: dict[str, Any]) -> bool:
    """Whether a run had its GPU for itself while it trained: else its speed may not be compared."""
    return bool(record["training"].get("alone") or (record["hardware"].get("processes_a_gpu") or 1) == 1)


def _run(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a row of `runs`."""
    trained, hardware, model = record["training"], record["hardware"], record["model"]
    return {
        "run": record["key"],
        "model": record["run"].removesuffix(f"-seed{record['seed']}"),
        **{name: record[name] for name in ("seed", "time", "tokens", "trained_at", "convention", "versions")},
        **described(record["recipe"]),
        "data": record["inputs"]["data_fingerprint"],
        "targets": max(row["targets"] for rows in record["evaluation"].values() for row in rows.values()),
        **{name: model[name] for name in ("keys", "parameters", "coverage", "learned_alphas")},
        **{name: record["flops_per_token"][name] for name in ("attention", "attention_share")},
        "alone": trained_alone(record),
        "speed": trained["tokens_per_second"],
        "memory": trained["peak_memory_gib"],
        "seconds": record["seconds"]["training"],
        "device": hardware["device"],
        "hardware": json.dumps(hardware, sort_keys=True),
        **{name: record.get(name) for name in ("copying", "ruler", "lego")},
    }


def _losses(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The evaluations of a record; in lengths where a way changes nothing its rows are the plain ones."""
    for way, sets in {PLAIN: record["evaluation"], **ways(record)}.items():
        for name, plain in record["evaluation"].items():
            for length, row in (plain | sets.get(name, {})).items():
                yield {
                    "run": record["key"],
                    "way": way,
                    "set": name,
                    "length": int(length),
                    "nll": row["nll"],
                    "last": math.log(row["last_256_perplexity"]),
                    **dict(zip(PARTS, row["bins"], strict=True)),
                }


@dataclass(frozen=True)
class Group:
    """All runs that were trained on the same data for as many tokens: what may be compared."""

    tokens: int
    trained_at: int
    data: str
    """The fingerprint of the data."""
    runs: Frame
    """A row a run: models in the order of their runs, the lowest seed of each first."""
    losses: Frame
    """A row for each way, held-out set and length of a run, in the order of `runs`."""

    @cached_property
    def models(self) -> Frame:
        """The run of the lowest seed of each model, by its name: it stands for the model in tables without seeds."""
        return self.runs.drop_duplicates("model").set_index("model", drop=False)

    @property
    def current(self) -> Frame:
        """Those of them that are not an earlier recipe of another."""
        return self.models[~self.models["older"]]

    @cached_property
    def papers(self) -> list[str]:
        """Those of the paper's 21 sparse models that were run."""
        return list(self.models.index[self.models["model"] == self.models["paper_name"]])

    @cached_property
    def sets(self) -> list[str]:
        """The held-out sets."""
        return list(self.losses["set"].unique())

    @cached_property
    def lengths(self) -> list[int]:
        """The evaluation lengths that all models have."""
        plain = self.losses[self.losses["way"] == PLAIN].groupby("length")["model"].nunique()
        return [int(length) for length in plain.index[plain == len(self.models)]]

    @property
    def longest(self) -> int:
        """The longest of them."""
        return self.lengths[-1]

    @property
    def factor(self) -> int:
        """How many training lengths that is."""
        return self.longest // self.trained_at

    @cached_property
    def _means(self) -> Frame:
        """The mean loss over the sets, by seed; columns are way, length and model."""
        return self.losses.pivot_table(index="seed", columns=["way", "length", "model"], values="nll")

    def loss(self, length: int, way: str = PLAIN) -> Frame:
        """The mean loss over the held-out sets at `length`: a row a seed, a column a model."""
        return self._means[way, length].reindex(columns=self.models.index)

    def first(self, length: int, way: str = PLAIN) -> Frame:
        """The same of each model's lowest seed that was evaluated in this way."""
        return self.loss(length, way).bfill().iloc[0]

    def ways(self, model: str) -> list[str]:
        """The other ways in which some seed of a model was evaluated."""
        return [way for way in self.losses.loc[self.losses["model"] == model, "way"].unique() if way != PLAIN]

    def label(self, model: str, way: str = PLAIN) -> str:
        """What a model is, evaluated in one of its ways, in words."""
        words = self.models.at[model, "label"]
        return words if way == PLAIN else f"{words}, {in_words(way)}"

    def tried(self, model: str, way: str = PLAIN) -> str:
        """The same of the seed that `first` tells of, named where it is not the lowest."""
        seed = self.loss(self.trained_at, way)[model].first_valid_index()
        return self.label(model, way) + ("" if seed == self.models.at[model, "seed"] else f", seed {seed}")

    def saved(self, length: int) -> Frame:
        """The loss of each seed of the hybrid as it is saved: it looks no farther back than it was trained to.

        Plain where a run was not evaluated so.
        """
        bound = str(self.trained_at)
        plain = self.loss(length)[OURS].dropna()
        return self.loss(length, bound)[OURS].dropna().combine_first(plain) if self.bounded else plain

    @property
    def bounded(self) -> bool:
        """Whether some run of the hybrid was evaluated as it is saved."""
        return str(self.trained_at) in self.ways(OURS)

    def gap(self, model: str, other: str) -> float:
        """By how much the loss of a model is above another's at the training length; nan where there is none.

        The mean over the seeds that both have.
        """
        losses = self.loss(self.trained_at)
        return float((losses[model] - losses[other]).mean()) if {model, other} <= set(losses) else math.nan

    def by_part(self, length: int, way: str = PLAIN) -> Frame:
        """The loss in each part of sequences of `length`, the mean over the sets: a row a model and seed."""
        chosen = self.losses[(self.losses["way"] == way) & (self.losses["length"] == length)]
        return chosen.groupby(["model", "seed"])[list(PARTS)].mean()

    def gaps_by_part(self, model: str, other: str, length: int, way: str = PLAIN) -> Frame:
        """As `gap`, in each part of sequences of `length`, the first model evaluated in `way`; empty for none."""
        if not {model, other} <= set(self.models.index):
            return pd.Series(dtype=float)
        ours, theirs = self.by_part(length, way).loc[model], self.by_part(length).loc[other]
        return (ours - theirs).dropna().mean().dropna()

    def compared(self, names: Sequence[str]) -> Frame:
        """The loss of each at the training length, best first, over the seeds that all have; empty for none."""
        if not names or not set(names) <= set(self.models.index):
            return pd.Series(dtype=float)
        return self.loss(self.trained_at)[list(names)].dropna().mean().dropna().sort_values(kind="stable")

    def sigma(self, *names: str) -> float:
        """Standard deviation of the loss over seeds at the training length, pooled over these models; nan without.

        Over those that are compared and no others: a model that is about to learn to copy has many times the
        deviation of one that cannot.
        """
        losses = self.loss(self.trained_at)[list(names)]
        degrees = (losses.count() - 1).clip(lower=0)
        return math.sqrt((losses.var() * degrees).sum() / degrees.sum()) if degrees.sum() else math.nan

    def tie(self, *names: str) -> float:
        """Losses of these closer than this count as equal: twice the deviation of a difference, 0.5 % without seeds."""
        sigma = self.sigma(*names)
        return math.log(1.005) if math.isnan(sigma) else 2 * math.sqrt(2) * sigma

    @cached_property
    def plain_window(self) -> str | None:
        """The plain window that reads nearest to as many keys as the hybrid; without that one, the widest."""
        keys = self.current.loc[self.current["kind"] == "window", "keys"]
        wanted = self.models["keys"].get(OURS, keys.max())
        return None if keys.empty else str((keys - wanted).abs().idxmin())


@dataclass(frozen=True)
class Results:
    """Everything that a results folder holds; of the longest training lengths the group with the most models first."""

    groups: tuple[Group, ...]
    failures: Frame
    probes: Probes
    tuned: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The records of the studies at tuned rates, by study."""
    outside: list[dict[str, Any]] = field(default_factory=list)
    """What `python -m study outside` wrote."""

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
        failures = [one for one in records if one["kind"] == "failure" and one["key"] not in finished]
        probes: Probes = defaultdict(list)
        for probe in results(folder / "probes", "probe", _is_probe):
            probes[probe["probe"]].append(probe)
        outside = [files.read_json(path) for path in sorted(folder.glob("outside/*.json"))]
        others = [one for one in finished.values() if one["study"] not in TUNED]
        tuned = {name: list(_belonging(name, store.runs())) for name in TUNED}
        return cls(grouped(others), pd.DataFrame(failures), dict(probes), tuned, outside)


def _is_probe(result: dict[str, Any]) -> bool:
    return isinstance(result.get("probe"), str) and bool(result.get("rows"))


def _belonging(study: str, runs: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Of all `runs`, oldest first, those that are runs of `study`, by its names, also where another study made them.

    A run that several studies made is as this one made it. Of two runs with one recipe the later one of the study is
    it, whose vocabulary is not any.
    """
    own = [one for one in runs if one["study"] == study]
    known = {one["key"]: one for one in runs} | {one["key"]: one for one in own}
    found: dict[str, dict[str, Any]] = {}
    for tokens, fingerprint in sorted({(one["tokens"], one["inputs"]["data_fingerprint"]) for one in own}):
        for run in STUDIES[study].runs:
            recipe = STUDIES[study].resolved(run, data=Path(), out=Path(), tokens=tokens, compiled=True)
            record = known.get(STUDIES[study].key(run, recipe, fingerprint))
            if record is not None and run.vocabulary in (None, record["model"].get("vocabulary")):
                found[record["key"]] = {**record, "study": study, "run": run.name}
    return found.values()


def grouped(records: Iterable[dict[str, Any]]) -> tuple[Group, ...]:
    """The records of finished runs, those together that may be compared."""
    records = sorted(records, key=lambda record: record["time"])
    if not records:
        return ()
    runs: Frame = pd.DataFrame([_run(record) for record in records])
    losses = pd.DataFrame([row for record in records for row in _losses(record)])
    groups = []
    for (tokens, trained_at, data, _), part in runs.groupby(_SAME):
        named = _named(part)
        groups.append(Group(tokens, trained_at, data, named, named[["run", "model", "seed"]].merge(losses, on="run")))
    return tuple(sorted(groups, key=lambda group: (-group.trained_at, -len(group.models), -group.tokens)))


def _named(runs: Frame) -> Frame:
    """Runs in the order of time, put in the order of models and seeds.

    Where two recipes have one name, the newest has it alone, and the name of an older one says so.
    """
    newest = runs.groupby("model")["digest"].transform("last")
    older = runs["digest"] != newest
    runs = runs.assign(
        older=older,
        model=runs["model"].mask(older, runs["model"] + "@" + runs["digest"]),
        label=runs["label"].mask(older, runs["label"] + ", earlier recipe " + runs["digest"]),
    )
    order = runs.assign(order=pd.factorize(runs["model"])[0]).sort_values(["order", "seed"], kind="stable")
    return order.drop(columns="order").reset_index(drop=True)
