"""A finding: a claim that is held against the results, what came of it, and the numbers that say so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from study.report.results import Group

Verdict = Literal["holds", "partly", "does not hold", "undecided", "not run"]
"""`partly`: where it was looked at, it holds in some places, or not all places were looked at. `undecided`: the
difference is smaller than seeds make."""


@dataclass(frozen=True)
class Finding:
    """A claim, what came of it, and the numbers that say so."""

    claim: str
    verdict: Verdict
    evidence: str


def percent(difference: float, digits: int = 1) -> str:
    """A difference of losses as a difference of perplexities, in per cent."""
    return real_minus(f"{100 * math.expm1(difference):+.{digits}f} %")


def real_minus(numbers: str) -> str:
    """Numbers as people set them, with a minus sign in place of each hyphen."""
    return numbers.replace("-", "−")


def missing(claim: str, group: Group, *names: str) -> Finding:
    """A claim that waits for models; those of `names` that the group does not have are said."""
    absent = [name for name in names if group.get(name) is None]
    return Finding(claim, "not run", f"needs {', '.join(absent or names)}")


def judged(claim: str, holds: bool, evidence: str) -> Finding:
    """A claim that one comparison decides."""
    return Finding(claim, "holds" if holds else "does not hold", evidence)


def verdict_over(good: Sequence[bool]) -> Verdict:
    """The verdict on a claim about several things, from whether it is true of each; of none nothing is known."""
    if not good:
        return "not run"
    return "holds" if all(good) else "partly" if any(good) else "does not hold"


def so_far(claim: str, good: Sequence[bool], wanted: int, evidence: str, things: str) -> Finding:
    """What may be said of a claim about `wanted` things, so many of which were looked at: no more than partly."""
    verdict = verdict_over(good)
    if len(good) == wanted:
        return Finding(claim, verdict, evidence)
    return Finding(claim, "partly" if verdict == "holds" else verdict, f"{len(good)} of {wanted} {things}: {evidence}")
