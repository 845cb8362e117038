"""The paper's findings and the project's own goals, each held against the results: holds, does not, or not run."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fibattn.study.results import Group, Model, losses, mean_loss

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
        models = [model for model in four if model]
        if len(models) < len(four):
            continue
        linear, coprime, learned, fixed = (model.loss(group.trained_at) for model in models)
        fits = abs(linear - coprime) < group.tie(*models) and max(linear, coprime) < learned < fixed
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
    evidence = f"linear, W = 12 is {percent(gap)} against dense here (other text, fewer tokens)"
    return _judged(claim, gap > group.tie(dense, linear), evidence)


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
    claim = "Seeds differ little: at W = 12 by 0.06 to 0.18 of a perplexity of 42, that is 0.1 to 0.4 %"
    sigma = group.sigma(*(model for model in group.models if model.is_papers and model.recipe["window"] == 12))
    if sigma is None:
        return Finding(claim, "not run", "needs the study seeds")
    return _judged(claim, sigma < math.log(1.006), f"{100 * math.expm1(sigma):.2f} % pooled (below 0.6 % counts)")


def _verdict(good: Sequence[bool]) -> Verdict:
    return "holds" if all(good) else "partly" if any(good) else "does not hold"


def _by_seed(evidence: dict[int, str]) -> str:
    """What each seed says; the seeds are named where there are several."""
    return "; ".join(f"seed {seed}: {words}" if len(evidence) > 1 else words for seed, words in evidence.items())


def _better_everywhere(group: Group) -> Finding:
    claim = "The default recipe is better than dense at the training length on every domain"
    dense, ours = group.get("dense"), group.get("hybrid")
    if not (dense and ours and ours.beside(dense)):
        return _missing(claim, group, "dense", "hybrid")
    evidence, good, overall = {}, [], []
    for own, theirs in ours.beside(dense):
        other = losses(theirs, group.trained_at)
        gaps = {name: loss - other[name] for name, loss in losses(own, group.trained_at).items()}
        good += [gap < 0 for gap in gaps.values()]
        overall.append(statistics.mean(gaps.values()))
        words = [f"{name} {percent(gap)}" for name, gap in gaps.items()]
        evidence[own["seed"]] = ", ".join([*words, f"together {percent(overall[-1])}"])
    words = _by_seed(evidence)
    if len(overall) > 1:
        words += f"; over all seeds {percent(statistics.mean(overall))}"
    return Finding(claim, _verdict(good), words)


def _no_worse_when_long(group: Group) -> Finding:
    ours, longest = group.get("hybrid"), group.lengths[-1]
    factor = longest // group.trained_at
    claim = f"The default recipe gets no worse at {factor} times the training length"
    if ours is None:
        return _missing(claim, group, "hybrid")
    evidence, good = {}, []
    for run in ours.runs:
        near = losses(run, group.trained_at)
        changes = {name: loss - near[name] for name, loss in losses(run, longest).items()}
        good += [change <= 0 for change in changes.values()]
        evidence[run["seed"]] = ", ".join(f"{name} {percent(change)}" for name, change in changes.items())
    return Finding(claim, _verdict(good), _by_seed(evidence))


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
    evidence = "; ".join(f"{one.label} {percent(gap)} against {other.label}" for one, other, gap in gaps)
    return Finding(claim, _verdict([gap < 0 for *_, gap in gaps]), evidence)


def _stretched_dense(group: Group) -> Finding:
    claim = "The default recipe is ahead of dense with YaRN or linear scaling past the training length"
    dense, ours = group.get("dense"), group.get("hybrid")
    if not (dense and ours and ours.beside(dense) and dense.first["rope_scaling"]):
        return _missing(claim, group, "dense", "hybrid")
    lengths = [length for length in group.lengths if length > group.trained_at]
    evidence, good = {}, []
    for own, theirs in ours.beside(dense):
        gaps = {length: mean_loss(own, length) - _best_stretched(theirs, length) for length in lengths}
        good += [gap < 0 for gap in gaps.values()]
        evidence[own["seed"]] = ", ".join(f"{n // group.trained_at}×: {percent(gap)}" for n, gap in gaps.items())
    return Finding(claim, _verdict(good), f"against the better of the two: {_by_seed(evidence)}")


def _best_stretched(dense: dict[str, Any], length: int) -> float:
    return min(mean_loss(dense, length, rope) for rope in dense["rope_scaling"])
