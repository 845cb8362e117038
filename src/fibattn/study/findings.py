"""The paper's findings and the project's own goals, each held against the results: holds, does not, or not run."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fibattn.progress import quantity
from fibattn.study.recalled import recalled
from fibattn.study.results import PLAIN, Group, Model, Probes, in_words, losses, mean_loss
from fibattn.study.store import ways

Verdict = Literal["holds", "partly", "does not hold", "undecided", "not run"]
"""`partly`: where it was looked at, it holds in some places, or not all places were looked at. `undecided`: the
difference is smaller than seeds make."""

_WINDOWS = (6, 8, 10, 12)
_PAPERS_MODELS = 21
_REPEATED = 5
"""Models that the paper trained from several seeds."""


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


def own_goals(group: Group, probes: Probes) -> list[Finding]:
    """What the default recipe is meant to do, checked."""
    return [
        _better_everywhere(group),
        _no_worse_when_long(group),
        _helped_dense(group),
        _bounded(group),
        _trains_as_fast(group),
        _rungs_against_window(group),
        _recalls_farther(probes),
    ]


def percent(difference: float, digits: int = 1) -> str:
    """A difference of losses as a difference of perplexities, in per cent."""
    return real_minus(f"{100 * math.expm1(difference):+.{digits}f} %")


def real_minus(numbers: str) -> str:
    """Numbers as people set them, with a minus sign in place of each hyphen."""
    return numbers.replace("-", "−")


def _missing(claim: str, group: Group, *names: str) -> Finding:
    absent = [name for name in names if group.get(name) is None]
    return Finding(claim, "not run", f"needs {', '.join(absent or names)}")


def _judged(claim: str, holds: bool, evidence: str) -> Finding:
    return Finding(claim, "holds" if holds else "does not hold", evidence)


def _order(group: Group) -> Finding:
    claim = "At every window: linear ≈ coprime < learned < fixed"
    right, seen = [], []
    for window in _WINDOWS:
        names = [f"{schedule}-w{window}" for schedule in ("linear", "coprime", "learned", "fixed")]
        models = [model for name in names if (model := group.get(name))]
        means = group.compared(models) if len(models) == len(names) else {}
        if not means:
            continue
        linear, coprime, learned, fixed = (means[name] for name in names)
        right.append(abs(linear - coprime) < group.tie(*models) and max(linear, coprime) < learned < fixed)
        seen.append(
            f"W = {window}: coprime {percent(coprime - linear)}, learned {percent(learned - linear)}, "
            f"fixed {percent(fixed - linear)} against linear"
        )
    if not seen:
        return _missing(claim, group, *(f"{schedule}-w12" for schedule in ("linear", "coprime", "learned", "fixed")))
    return _so_far(claim, right, len(_WINDOWS), "; ".join(seen), "windows")


def _power_of_two_fixed(group: Group) -> Finding:
    claim = "Power-of-two fixed, W = 8, is the worst of all"
    worst, ranked = group.get("pow2-fixed-w8"), list(_ranked_papers(group))
    if worst is None or len(ranked) < 5:
        return _missing(claim, group, "pow2-fixed-w8")
    last = group.get(ranked[-1])
    evidence = f"place {ranked.index(worst.name) + 1} of {len(ranked)}; the last is {last.label if last else '–'}"
    return _so_far(claim, [last is worst] * len(ranked), _PAPERS_MODELS, evidence, "models")


def _power_of_two_linear(group: Group) -> Finding:
    claim = "Power-of-two linear matches Fibonacci learned"
    gaps = {}
    for window in _WINDOWS:
        one, other = group.get(f"pow2-linear-w{window}"), group.get(f"learned-w{window}")
        gap = one.gap(other, group.trained_at) if one and other else None
        if gap is not None:
            gaps[window] = gap
    if not gaps:
        return _missing(claim, group, "pow2-linear-w12", "learned-w12")
    evidence = ", ".join(f"W = {window}: {percent(gap)}" for window, gap in gaps.items()) + " (within 1 % counts)"
    return _so_far(claim, [abs(gap) < math.log(1.01) for gap in gaps.values()], len(_WINDOWS), evidence, "windows")


def _ranked_papers(group: Group) -> dict[str, float]:
    """The paper's sparse models that were run, best first."""
    return group.compared([model for model in group.models if model.is_papers])


def _best_sparse(group: Group) -> Finding:
    claim = "The best of the 21 is linear, W = 12"
    ranked = _ranked_papers(group)
    if len(ranked) < 5:
        return Finding(claim, "not run", f"needs five of them or more; {len(ranked)} were run")
    (best, loss), (second, following), *_ = ranked.items()
    evidence = f"the best is {best}, ahead of {second} by {percent(following - loss)}"
    return _so_far(claim, [best == "linear-w12"] * len(ranked), _PAPERS_MODELS, evidence, "models")


def _dense_ahead(group: Group) -> Finding:
    claim = "At the training length dense is ahead of the best of them (there by 26 %)"
    dense, ranked = group.get("dense"), _ranked_papers(group)
    best = group.get(next(iter(ranked))) if ranked else None
    gap = best.gap(dense, group.trained_at) if best and dense else None
    if not (dense and best) or gap is None:
        return _missing(claim, group, "dense", "linear-w12")
    evidence = f"{best.label} is {percent(gap)} against dense here (other text, other budget)"
    return _judged(claim, gap > group.tie(dense, best), evidence)


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
    gaps = [gap for one, other in pairs if other and (gap := one.gap(other, group.trained_at)) is not None]
    behind = [gap > 0 for gap in gaps]
    evidence = (
        f"farthest from 1: {farthest:.3f} (up to 0.08 counts); "
        f"behind the stagger in {sum(behind)} of {len(behind)} pairs"
    )
    return _so_far(claim, [farthest <= 0.08, *behind], 1 + len(_WINDOWS), evidence, "checks")


def _gain_is_flat(group: Group) -> Finding:
    claim = "The stagger's gain over fixed is flat over the window, about 0.035 nats"
    fixed, linear = group.get("fixed-w12"), group.get("linear-w12")
    gain = fixed.gaps_by_part(linear, group.trained_at)[1:] if fixed and linear else []
    if not gain:
        return _missing(claim, group, "fixed-w12", "linear-w12")
    mean, spread = statistics.mean(gain), max(gain) - min(gain)
    evidence = (
        f"{mean:.3f} nats in the mean of parts 2 … 8, between {min(gain):.3f} and {max(gain):.3f} (a spread below the "
        "mean counts as flat; in part 1 most rungs reach before the text)"
    )
    return _judged(claim, mean > 0 and spread < mean, evidence)


def _seeds(group: Group) -> Finding:
    claim = "Seeds differ little: at W = 12 by 0.06 to 0.18 of a perplexity of 42, that is 0.1 to 0.4 %"
    models = [model for model in group.models if model.is_papers and model.recipe["window"] == 12]
    repeated = [model for model in models if len(model.runs) > 1]
    sigma = group.sigma(*repeated)
    if sigma is None:
        return Finding(claim, "not run", "needs the study seeds")
    evidence = f"{100 * math.expm1(sigma):.2f} % pooled (below 0.6 % counts)"
    return _so_far(claim, [sigma < math.log(1.006)] * len(repeated), _REPEATED, evidence, "models")


def _verdict(good: Sequence[bool]) -> Verdict:
    return "holds" if all(good) else "partly" if any(good) else "does not hold"


def _so_far(claim: str, good: Sequence[bool], wanted: int, evidence: str, things: str) -> Finding:
    """What may be said of a claim about `wanted` things, so many of which were looked at: no more than partly."""
    verdict = _verdict(good)
    if len(good) == wanted:
        return Finding(claim, verdict, evidence)
    return Finding(claim, "partly" if verdict == "holds" else verdict, f"{len(good)} of {wanted} {things}: {evidence}")


def _by_seed(evidence: dict[int, str]) -> str:
    """What each seed says; one alone is said to be so."""
    return "; ".join(f"seed {seed}: {words}" for seed, words in evidence.items()) + (
        "" if len(evidence) > 1 else " (one seed)"
    )


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
        words = [f"{name} {percent(change)}" for name, change in changes.items()]
        best = min(group.lengths, key=lambda length: mean_loss(run, length))
        from_best = percent(mean_loss(run, longest) - mean_loss(run, best))
        evidence[run["seed"]] = ", ".join(words) + f", best at {best // group.trained_at}×, {from_best} from there"
    return Finding(claim, _verdict(good), _by_seed(evidence))


def control_pairs(group: Group) -> list[tuple[Model, Model]]:
    """Each clipped stagger, and each such hybrid, with the plain window that reads about as many keys."""
    pairs = []
    for model in group.models:
        own = model.recipe
        if own["attention"] != "fibonacci" or model.is_papers or own["stagger_heads"]:
            continue
        near = [
            one
            for one in group.models
            if one.recipe["attention"] == "sliding"
            and one.recipe["full_layers"] == own["full_layers"]
            and 0 < one.recipe["window"] - own["window"] < 16
        ]
        if near:
            pairs.append((model, min(near, key=lambda one: one.recipe["window"])))
    return pairs


def _rungs_against_window(group: Group) -> Finding:
    claim = "In perplexity, rungs earn more than the same number of keys added to a plain window"
    gaps = [(one, two, gap) for one, two in control_pairs(group) if (gap := one.gap(two, group.trained_at)) is not None]
    if not gaps:
        return Finding(claim, "not run", "needs stagger-w128 and window-w132, or another such pair")
    tie = group.tie(*(model for model in group.models if not model.is_papers))
    evidence = "; ".join(f"{one.label} {percent(gap)} against {two.label}" for one, two, gap in gaps)
    if all(abs(gap) < tie for *_, gap in gaps):
        return Finding(claim, "undecided", f"{evidence} (up to {percent(tie).lstrip('+')} may be the seeds)")
    return Finding(claim, _verdict([gap < 0 for *_, gap in gaps]), evidence)


def _helped_dense(group: Group) -> Finding:
    claim = "The default recipe is ahead of dense past the training length, however dense is helped there"
    dense, ours = group.get("dense"), group.get("hybrid")
    pairs = [(own, theirs) for own, theirs in ours.beside(dense) if ways(theirs)] if dense and ours else []
    if not pairs:
        return _missing(claim, group, "dense", "hybrid")
    evidence, good = {}, []
    for own, theirs in pairs:
        words = []
        for length in (length for length in group.lengths if length > group.trained_at):
            best, way = min((mean_loss(theirs, length, way), way) for way in (PLAIN, *ways(theirs)))
            gap = mean_loss(own, length) - best
            good.append(gap < 0)
            words.append(f"{length // group.trained_at}×: {percent(gap)} ({in_words(way)})")
        evidence[own["seed"]] = ", ".join(words)
    tried = ", ".join(dict.fromkeys(in_words(way) for _, theirs in pairs for way in ways(theirs)))
    against = f"against the best of {tried}: {_by_seed(evidence)}"
    helps = {"bounded": "bounded", "lengthened": "trained on in longer windows"}
    untried = [words for name, words in helps.items() if not all(theirs.get(name) for _, theirs in pairs)]
    if untried and all(good):
        return Finding(claim, "partly", f"{against}; not every run of dense was {' and '.join(untried)}")
    return Finding(claim, _verdict(good), against)


def _bounded(group: Group) -> Finding:
    claim = "With bounded full layers, at constant cost, the default recipe is no worse in the longest windows"
    ours, longest = group.get("hybrid"), group.lengths[-1]
    runs = [run for run in ours.runs if run.get("bounded")] if ours else []
    if not runs:
        return Finding(claim, "not run", "needs a run of hybrid that was evaluated so")
    evidence, good = {}, []
    for run in runs:
        gaps = {int(n): mean_loss(run, longest, n) - mean_loss(run, longest) for n in run["bounded"]}
        good.append(min(gaps.values()) <= 0)
        evidence[run["seed"]] = ", ".join(f"{n:,} tokens: {percent(gap)}" for n, gap in gaps.items())
    return Finding(claim, _verdict(good), f"against no bound, in windows of {longest:,}: {_by_seed(evidence)}")


def _trains_as_fast(group: Group) -> Finding:
    claim = "The default recipe trains at least as fast as dense at the training length"
    dense, ours = group.get("dense"), group.get("hybrid")
    if not (dense and ours):
        return _missing(claim, group, "dense", "hybrid")
    theirs = dense.alone()
    pairs = [(own, other) for own in ours.alone() for other in theirs if own["hardware"] == other["hardware"]]
    if not pairs:
        return Finding(claim, "not run", "needs a run of each that had the same kind of GPU for itself")
    own, other = (run["training"]["tokens_per_second"] for run in pairs[-1])
    device = pairs[-1][0]["hardware"]["device"]
    return _judged(claim, own >= other, f"{quantity(own)} tokens/s against {quantity(other)} on {device}")


def _recalls_farther(probes: Probes) -> Finding:
    claim = "With rungs a small model recalls from farther back than with a window of as many keys"
    found = recalled(probes["recall"][-1]) if probes.get("recall") else []
    farther, seen = [], []
    for task in dict.fromkeys(one.task for one in found):
        reach = {one.variant: one.reach for one in found if one.task == task}
        if {"window", "stagger"} <= set(reach):
            farther += [own > other for own in reach["stagger"] for other in reach["window"]]
            seen.append(f"{task}: " + ", ".join(f"{name} {_range(several)}" for name, several in reach.items()))
    if not farther:
        return Finding(claim, "not run", "needs fibattn probe recall")
    return Finding(claim, _verdict(farther), f"tokens up to which 9 in 10 are found; {'; '.join(seen)}")


def _range(ascending: Sequence[int]) -> str:
    low, high = ascending[0], ascending[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
