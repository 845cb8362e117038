"""The paper's findings and the project's own goals, each held against the results: holds, does not, or not run."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fibattn.study.results import Group, Model

Verdict = Literal["holds", "partly", "does not hold", "not run"]

_WINDOWS = (6, 8, 10, 12)


@dataclass(frozen=True)
class Finding:
    """A claim, what came of it, and the numbers that say so."""

    claim: str
    verdict: Verdict
    evidence: str


def papers_findings(group: Group) -> list[Finding]:
    """What the paper says of language models, checked."""
    checks: tuple[Callable[[Group], Finding], ...] = (
        _order,
        _power_of_two_fixed,
        _power_of_two_linear,
        _best_sparse,
        _dense_ahead,
        _dense_degrades,
        _stagger_extrapolates,
        _coprime_extrapolates,
        _learned_stays,
        _gain_is_flat,
        _seeds,
    )
    return [check(group) for check in checks]


def own_goals(group: Group) -> list[Finding]:
    """What the default recipe is meant to do, checked."""
    return [
        _better_everywhere(group),
        _no_worse_when_long(group),
        _rungs_against_window(group),
        _stretched_dense(group),
    ]


def percent(difference: float, digits: int = 1) -> str:
    """A difference of losses as a difference of perplexities, in per cent."""
    return f"{100 * math.expm1(difference):+.{digits}f} %".replace("-", "−")


def _missing(claim: str, group: Group, *names: str) -> Finding:
    absent = [name for name in names if group.get(name) is None]
    return Finding(claim, "not run", f"needs {', '.join(absent or names)}")


def _judged(claim: str, holds: bool, evidence: str) -> Finding:
    return Finding(claim, "holds" if holds else "does not hold", evidence)


def _order(group: Group) -> Finding:
    claim = "At every window: linear ≈ coprime < learned < fixed"
    seen, right, wrong = [], [], []
    for window in _WINDOWS:
        four = [group.get(f"{schedule}-w{window}") for schedule in ("linear", "coprime", "learned", "fixed")]
        if None in four:
            continue
        linear, coprime, learned, fixed = (model.loss(group.trained_at) for model in four if model)
        fits = abs(linear - coprime) < group.tie and max(linear, coprime) < learned < fixed
        (right if fits else wrong).append(window)
        seen.append(
            f"W = {window}: coprime {percent(coprime - linear)}, learned {percent(learned - linear)}, "
            f"fixed {percent(fixed - linear)} against linear"
        )
    if not seen:
        return _missing(claim, group, *(f"{schedule}-w12" for schedule in ("linear", "coprime", "learned", "fixed")))
    verdict: Verdict = "partly" if right and wrong else "holds" if right else "does not hold"
    return Finding(claim, verdict, "; ".join(seen))


def _power_of_two_fixed(group: Group) -> Finding:
    claim = "Power-of-two fixed, W = 8, is the worst of all"
    worst, others = group.get("pow2-fixed-w8"), [model for model in group.models if model.is_papers]
    if worst is None or len(others) < 5:
        return _missing(claim, group, "pow2-fixed-w8")
    ranked = sorted(others, key=lambda model: model.loss(group.trained_at))
    place = ranked.index(worst) + 1
    return _judged(claim, place == len(ranked), f"place {place} of {len(ranked)}; the last is {ranked[-1].label}")


def _power_of_two_linear(group: Group) -> Finding:
    claim = "Power-of-two linear matches Fibonacci learned"
    pairs = [(group.get(f"pow2-linear-w{window}"), group.get(f"learned-w{window}"), window) for window in _WINDOWS]
    gaps = {
        window: one.loss(group.trained_at) - other.loss(group.trained_at)
        for one, other, window in pairs
        if one and other
    }
    if not gaps:
        return _missing(claim, group, "pow2-linear-w12", "learned-w12")
    evidence = ", ".join(f"W = {window}: {percent(gap)}" for window, gap in gaps.items())
    return _judged(claim, all(abs(gap) < math.log(1.01) for gap in gaps.values()), f"{evidence} (within 1 % counts)")


def _best_sparse(group: Group) -> Finding:
    claim = "The best of the 21 is linear, W = 12"
    ranked = sorted((model for model in group.models if model.is_papers), key=lambda one: one.loss(group.trained_at))
    if len(ranked) < 5:
        return Finding(claim, "not run", f"needs five of them or more; {len(ranked)} were run")
    best = ranked[0]
    evidence = f"of {len(ranked)} that were run the best is {best.label}"
    if len(ranked) > 1:
        evidence += (
            f", ahead of {ranked[1].label} by {percent(ranked[1].loss(group.trained_at) - best.loss(group.trained_at))}"
        )
    return _judged(claim, best.name == "linear-w12", evidence)


def _dense_ahead(group: Group) -> Finding:
    claim = "At the training length dense is ahead of the best of them, by about 26 %"
    dense, linear = group.get("dense"), group.get("linear-w12")
    if not (dense and linear):
        return _missing(claim, group, "dense", "linear-w12")
    gap = linear.loss(group.trained_at) - dense.loss(group.trained_at)
    return _judged(
        claim, gap > group.tie, f"linear, W = 12 is {percent(gap)} against dense here (other text, fewer tokens)"
    )


def _at_four(group: Group, name: str) -> float | None:
    model, length = group.get(name), 4 * group.trained_at
    if model is None or length not in model.lengths():
        return None
    return model.loss(length) - model.loss(group.trained_at)


def _dense_degrades(group: Group) -> Finding:
    claim = "Dense degrades past its training length: +201 % at four times"
    change = _at_four(group, "dense")
    if change is None:
        return _missing(claim, group, "dense")
    return _judged(claim, change > math.log(1.5), f"{percent(change)} at four times (+50 % or more counts)")


def _stagger_extrapolates(group: Group) -> Finding:
    claim = "Linear, W = 12 does not degrade: −1.3 % at four times"
    change = _at_four(group, "linear-w12")
    if change is None:
        return _missing(claim, group, "linear-w12")
    return _judged(claim, change < 0.01, f"{percent(change)} at four times")


def _coprime_extrapolates(group: Group) -> Finding:
    claim = "Coprime, W = 12 loses a little: +2.8 % at four times, where its untrained rungs wake up"
    change = _at_four(group, "coprime-w12")
    if change is None:
        return _missing(claim, group, "coprime-w12")
    return _judged(claim, math.log(1.005) < change < math.log(1.10), f"{percent(change)} at four times")


def _learned_stays(group: Group) -> Finding:
    claim = "A learned α stays within about 0.05 of its start and never beats the stagger"
    models = [model for model in group.models if model.is_papers and model.first["model"]["learned_alphas"]]
    if not models:
        return _missing(claim, group, "learned-w12")
    farthest = max(abs(alpha - 1) for model in models for alpha in model.first["model"]["learned_alphas"])
    pairs = [(model, group.get(f"linear-w{model.recipe['window']}")) for model in models]
    beaten = [one.loss(group.trained_at) > other.loss(group.trained_at) for one, other in pairs if other]
    evidence = f"farthest from 1: {farthest:.3f}; behind the stagger in {sum(beaten)} of {len(beaten)} pairs"
    if farthest <= 0.08 and all(beaten):
        return Finding(claim, "holds", evidence)
    return Finding(claim, "partly" if farthest <= 0.08 or all(beaten) else "does not hold", evidence)


def position_gain(fixed: Model, linear: Model, length: int) -> list[float]:
    """By how many nats the stagger is ahead of fixed in each part of a window."""
    return [one - other for one, other in zip(fixed.bins(length), linear.bins(length), strict=True)]


def _gain_is_flat(group: Group) -> Finding:
    claim = "The stagger's gain over fixed is flat over the window, about 0.035 nats"
    fixed, linear = group.get("fixed-w12"), group.get("linear-w12")
    if not (fixed and linear):
        return _missing(claim, group, "fixed-w12", "linear-w12")
    gain = position_gain(fixed, linear, group.trained_at)[1:]
    mean, spread = statistics.mean(gain), max(gain) - min(gain)
    evidence = f"{mean:.3f} nats in the mean of parts 2 … 8, between {min(gain):.3f} and {max(gain):.3f}"
    return _judged(claim, mean > 0 and spread < mean, f"{evidence} (a spread below the mean counts as flat)")


def _seeds(group: Group) -> Finding:
    claim = "Seeds differ little: 0.06 to 0.18 of a perplexity of 42, that is 0.1 to 0.4 %"
    if group.sigma is None:
        return Finding(claim, "not run", "needs the study `seeds`")
    return _judged(
        claim, group.sigma < math.log(1.006), f"{100 * math.expm1(group.sigma):.2f} % pooled (below 0.6 % counts)"
    )


def _better_everywhere(group: Group) -> Finding:
    claim = "The default recipe is better than dense at the training length on every domain"
    dense, ours = group.get("dense"), group.get("hybrid")
    if not (dense and ours):
        return _missing(claim, group, "dense", "hybrid")
    theirs, own = dense.losses(group.trained_at), ours.losses(group.trained_at)
    gaps = {name: own[name] - theirs[name] for name in own}
    better = sum(gap < 0 for gap in gaps.values())
    verdict: Verdict = "holds" if better == len(gaps) else "partly" if better else "does not hold"
    overall = statistics.mean(gaps.values())
    evidence = ", ".join([f"{name} {percent(gap)}" for name, gap in gaps.items()] + [f"together {percent(overall)}"])
    if group.sigma:
        evidence += f", {overall / group.sigma:+.1f} σ of seeds"
    return Finding(claim, verdict, evidence)


def _no_worse_when_long(group: Group) -> Finding:
    ours, longest = group.get("hybrid"), group.lengths[-1]
    factor = longest // group.trained_at
    claim = f"The default recipe gets no worse at {factor} times the training length"
    if ours is None:
        return _missing(claim, group, "hybrid")
    near, far = ours.losses(group.trained_at), ours.losses(longest)
    changes = {name: far[name] - near[name] for name in near}
    good = sum(change <= 0 for change in changes.values())
    verdict: Verdict = "holds" if good == len(changes) else "partly" if good else "does not hold"
    return Finding(claim, verdict, ", ".join(f"{name} {percent(change)}" for name, change in changes.items()))


def control_pairs(group: Group) -> list[tuple[Model, Model]]:
    """Each clipped stagger with the plain window that reads about as many keys."""
    windows = [one for one in group.models if one.recipe["attention"] == "sliding" and not one.recipe["full_layers"]]
    pairs = []
    for model in group.models:
        if not model.name.startswith("stagger-"):
            continue
        near = [one for one in windows if 0 < one.recipe["window"] - model.recipe["window"] < 16]
        if near:
            pairs.append((model, min(near, key=lambda one: one.recipe["window"])))
    return pairs


def _rungs_against_window(group: Group) -> Finding:
    claim = "In perplexity, rungs earn more than the same number of keys added to a plain window"
    pairs = control_pairs(group)
    if not pairs:
        return Finding(claim, "not run", "needs stagger-w128 and window-w132, or another such pair")
    gaps = [(one, other, one.loss(group.trained_at) - other.loss(group.trained_at)) for one, other in pairs]
    better = sum(gap < 0 for *_, gap in gaps)
    verdict: Verdict = "holds" if better == len(gaps) else "partly" if better else "does not hold"
    return Finding(
        claim, verdict, "; ".join(f"{one.label} {percent(gap)} against {other.label}" for one, other, gap in gaps)
    )


def _stretched_dense(group: Group) -> Finding:
    claim = "The default recipe is ahead of dense with YaRN or linear scaling past the training length"
    dense, ours = group.get("dense"), group.get("hybrid")
    if not (dense and ours and dense.first["rope_scaling"]):
        return _missing(claim, group, "dense", "hybrid")
    lengths = [length for length in group.lengths if length > group.trained_at]
    best = {length: _best_stretched(dense, length) for length in lengths}
    gaps = {length: ours.loss(length) - loss for length, loss in best.items()}
    evidence = ", ".join(f"{length // group.trained_at}×: {percent(gap)}" for length, gap in gaps.items())
    return _judged(claim, all(gap < 0 for gap in gaps.values()), f"against the better of the two at {evidence}")


def _best_stretched(dense: Model, length: int) -> float:
    ropes: Sequence[str] = list(dense.first["rope_scaling"])
    return min(dense.loss(length, rope) for rope in ropes)
