"""Claims: each a plain function from results to a verdict and the numbers that say so."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from study.report.results import Group

Verdict = Literal["holds", "partly", "does not hold", "undecided", "not run"]
"""`partly`: where it was looked at, it holds in some places, or not all places were looked at. `undecided`: the
difference is smaller than seeds make."""
Judged = tuple[Verdict, str] | None
"""A verdict and its evidence; None where the results do not have what the claim is about."""


@dataclass(frozen=True)
class Finding:
    """A claim, what came of it, and the numbers that say so."""

    claim: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Claim:
    """What is said of the models of a group, and how it is checked."""

    words: str
    """`{factor}` stands for the longest evaluation length, in training lengths."""
    needs: str
    """The models that it is about, for whoever has not run them."""
    check: Callable[[Group], Judged]

    def of(self, group: Group) -> Finding:
        """What a group's results say of it."""
        words, found = self.words.format(factor=group.factor), self.check(group)
        return Finding(words, *found) if found else Finding(words, "not run", f"needs {self.needs}")


class Claims(list[Claim]):
    """Claims in the order in which they are written."""

    def say(self, words: str, needs: str) -> Callable[[Callable[[Group], Judged]], None]:
        """Decorates the function that checks a claim."""
        return lambda check: self.append(Claim(words, needs, check))


def percent(difference: float) -> str:
    """A difference of losses as a difference of perplexities, in per cent."""
    return real_minus(f"{100 * math.expm1(difference):+.1f} %")


def real_minus(numbers: str) -> str:
    """Numbers as people set them, with a minus sign in place of each hyphen."""
    return numbers.replace("-", "−")


def verdict_over(good: Iterable[bool]) -> Verdict:
    """The verdict on a claim about several things, from whether it is true of each; of none nothing is known."""
    good = list(good)
    if not good:
        return "not run"
    return "holds" if all(good) else "partly" if any(good) else "does not hold"


def so_far(good: Sequence[bool], wanted: int, evidence: str, things: str) -> Judged:
    """What may be said of a claim about `wanted` things, so many of which were looked at: no more than partly."""
    if not good:
        return None
    verdict = verdict_over(good)
    if len(good) == wanted:
        return verdict, evidence
    return "partly" if verdict == "holds" else verdict, f"{len(good)} of {wanted} {things}: {evidence}"
