"""What the recall probe found: for each model and task its seeds, taken together."""

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

_FOUND = 0.9
"""A distance is reached when so many of its values are found."""


@dataclass(frozen=True)
class Recalled:
    """One variant at one task."""

    variant: str
    task: str
    keys: float
    """What a query of a sparse layer attends to, the mean over those layers."""
    seeds: tuple[dict[int, float], ...]
    """Of every seed, the accuracy at each distance in tokens."""

    @property
    def median(self) -> dict[int, float]:
        """The seeds' median at each distance."""
        return {distance: statistics.median(one[distance] for one in self.seeds) for distance in self.seeds[0]}

    @property
    def reach(self) -> list[int]:
        """For each seed the farthest of the distances up to which values are found, 0 for none; ascending."""
        return sorted(_reach(accuracy) for accuracy in self.seeds)


def recalled(probe: dict[str, Any]) -> list[Recalled]:
    """Every variant at every task, in the order in which they were measured."""
    seeds: dict[tuple[str, str, float], list[dict[int, float]]] = {}
    for row in probe["rows"]:
        accuracy = {int(distance): right for distance, right in row["accuracy"].items()}
        seeds.setdefault((row["variant"], row["task"], row["keys"]), []).append(accuracy)
    return [Recalled(*model, tuple(several)) for model, several in seeds.items()]


def _reach(accuracy: dict[int, float]) -> int:
    found = itertools.takewhile(lambda one: one[1] >= _FOUND, sorted(accuracy.items()))
    return max((distance for distance, _ in found), default=0)
