"""What a reader should see first: dense attention and the hybrid over evaluation length, both tuned."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fibattn.progress import quantity
from study.report.results import PLAIN, Group
from study.report.rivals_tables import Records, best_rate, by_budget, seeds_of
from study.rivals import OURS, Rivals
from study.store import over_sets, ways


@dataclass(frozen=True)
class Curve:
    """Perplexity over evaluation length."""

    name: str
    kind: str
    style: str
    """Matplotlib's, of the line."""
    perplexities: dict[int, float]
    """By length, where there is any."""


@dataclass(frozen=True)
class Headline:
    """Curves that may be compared: of the same text, budget and seeds."""

    tokens: int
    trained_at: int
    seeds: int
    curves: tuple[Curve, ...]

    @property
    def shows_ours_far_out(self) -> bool:
        """Whether there is more of the hybrid than a point."""
        return any(len(one.perplexities) > 1 for one in self.curves if one.name == OURS)

    @property
    def words(self) -> str:
        """The same at the training length, in a sentence."""
        ends = {one.name: one.perplexities[self.trained_at] for one in self.curves}
        if (ours := ends.get(OURS)) is None:
            return f"After {quantity(self.tokens)} tokens in the tuned recipe dense attention has {ends['dense']:.2f}"
        return (
            f"After {quantity(self.tokens)} tokens in the tuned recipe: perplexity {ours:.2f} for the hybrid, "
            f"{ends['dense']:.2f} for dense attention ({self.of_seeds})"
        )

    @property
    def of_seeds(self) -> str:
        """Of how many seeds the numbers are, in words."""
        return "one seed" if self.seeds == 1 else f"the mean of {self.seeds} seeds"


def tuned_headline(rivals: Rivals, records: Iterable[dict[str, Any]]) -> Headline | None:
    """Of finished runs of them: at the largest budget at which both were looked at past their length.

    Without such a budget at the largest that has both, or dense alone; None without dense. Means over the seeds that
    both have, dense at the best rate that was tried.
    """
    both = {tokens: _both(found, rivals.ours) for tokens, found in by_budget(records).items()}
    both = {tokens: pair for tokens, pair in both.items() if pair[0]}
    if not both:
        return None
    tokens = max(both, key=lambda tokens: (_far(both[tokens][1]), bool(both[tokens][1]), tokens))
    dense, ours = both[tokens]
    trained_at = next(iter(dense.values()))["trained_at"]
    curves = [
        Curve("dense", "dense", "-", _means(dense, PLAIN)),
        Curve("dense, YaRN", "dense", "--", _means(dense, "yarn")),
        Curve("dense, bounded", "dense", ":", _means(dense, str(trained_at))),
        *([Curve(OURS, "hybrid", "-", _means(ours, str(trained_at)))] if ours else []),
    ]
    return Headline(
        tokens, trained_at, len(dense), tuple(one for one in curves if one.style == "-" or len(one.perplexities) > 1)
    )


def _both(found: dict[str, dict[str, Any]], ours: str) -> tuple[Records, Records]:
    """Dense and what stands for the project, a run of this name, with the seeds that both have.

    Those that were looked at far out if there are any.

    All of dense and nothing where they have none in common.
    """
    dense, own = seeds_of(found, "dense", best_rate(found, "dense")), seeds_of(found, ours, 1.0)
    common = [seed for seed in dense if seed in own]
    common = [seed for seed in common if _far({seed: own[seed]}) and _far({seed: dense[seed]})] or common
    if not common:
        return dense, {}
    return {seed: dense[seed] for seed in common}, {seed: own[seed] for seed in common}


def _far(records: Records) -> bool:
    """Whether there are any, all evaluated past their training length."""
    return bool(records) and all(max(_lengths(one)) > one["trained_at"] for one in records.values())


def _lengths(record: dict[str, Any]) -> list[int]:
    return [int(length) for length in next(iter(record["evaluation"].values()))]


def _means(records: Records, way: str) -> dict[int, float]:
    """Perplexity by length, the geometric mean over sets and seeds; nothing where a way was not tried.

    Up to the training length no way changes anything.
    """
    found: dict[int, list[float]] = defaultdict(list)
    for one in records.values():
        other = {PLAIN: one["evaluation"], **ways(one)}.get(way, {})
        for length in _lengths(one):
            sets = {name: rows | other.get(name, {}) for name, rows in one["evaluation"].items()}
            if other or length <= one["trained_at"]:
                found[length].append(over_sets(one, "nll", sets, length))
    return {
        length: math.exp(statistics.mean(losses)) for length, losses in found.items() if len(losses) == len(records)
    }


def paper_headline(group: Group) -> Headline | None:
    """Of a group at one rate, such as the paper's, first seeds; None without dense, YaRN and a bounded hybrid."""
    if not {"dense", OURS} <= set(group.models.index) or "yarn" not in group.ways("dense") or not group.bounded:
        return None
    shown = {
        "dense": ("dense", PLAIN, "-"),
        "dense, YaRN": ("dense", "yarn", "--"),
        OURS: (OURS, str(group.trained_at), "-"),
    }
    curves = (
        Curve(
            name,
            group.models.at[model, "kind"],
            style,
            {length: math.exp(group.first(length, way)[model]) for length in group.lengths},
        )
        for name, (model, way, style) in shown.items()
    )
    return Headline(group.tokens, group.trained_at, 1, tuple(curves))
