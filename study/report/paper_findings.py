"""The paper's findings, each held against the results: holds, does not, or not run."""

import math
import statistics
from collections.abc import Callable

from study.report.findings import Finding, judged, missing, percent, so_far, verdict_over
from study.report.results import Group, mean_loss

_WINDOWS = (6, 8, 10, 12)
_PAPERS_MODELS = 21
_REPEATED = 5
"""Models that the paper trained from several seeds."""


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
        return missing(claim, group, *(f"{schedule}-w12" for schedule in ("linear", "coprime", "learned", "fixed")))
    return so_far(claim, right, len(_WINDOWS), "; ".join(seen), "windows")


def _power_of_two_fixed(group: Group) -> Finding:
    claim = "Power-of-two fixed, W = 8, is the worst of all"
    worst, ranked = group.get("pow2-fixed-w8"), list(_ranked_papers(group))
    if worst is None or len(ranked) < 5:
        return missing(claim, group, "pow2-fixed-w8")
    last = group.get(ranked[-1])
    evidence = f"place {ranked.index(worst.name) + 1} of {len(ranked)}; the last is {last.label if last else '–'}"
    return so_far(claim, [last is worst] * len(ranked), _PAPERS_MODELS, evidence, "models")


def _power_of_two_linear(group: Group) -> Finding:
    claim = "Power-of-two linear matches Fibonacci learned"
    gaps = {}
    for window in _WINDOWS:
        one, other = group.get(f"pow2-linear-w{window}"), group.get(f"learned-w{window}")
        gap = one.gap(other, group.trained_at) if one and other else None
        if gap is not None:
            gaps[window] = gap
    if not gaps:
        return missing(claim, group, "pow2-linear-w12", "learned-w12")
    evidence = ", ".join(f"W = {window}: {percent(gap)}" for window, gap in gaps.items()) + " (within 1 % counts)"
    return so_far(claim, [abs(gap) < math.log(1.01) for gap in gaps.values()], len(_WINDOWS), evidence, "windows")


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
    return so_far(claim, [best == "linear-w12"] * len(ranked), _PAPERS_MODELS, evidence, "models")


def _dense_ahead(group: Group) -> Finding:
    claim = "At the training length dense is ahead of the best of them (there by 26 %)"
    dense, ranked = group.get("dense"), _ranked_papers(group)
    best = group.get(next(iter(ranked))) if ranked else None
    gap = best.gap(dense, group.trained_at) if best and dense else None
    if not (dense and best) or gap is None:
        return missing(claim, group, "dense", "linear-w12")
    evidence = f"{best.label} is {percent(gap)} against dense here (other text, other budget)"
    return judged(claim, gap > group.tie(dense, best), evidence)


def _at_four(claim: str, group: Group, name: str, counts: Callable[[float], bool], rule: str = "") -> Finding:
    """A claim about the change of a model's loss at four times its training length, in every seed of it."""
    model, length = group.get(name), 4 * group.trained_at
    if model is None or length not in model.lengths():
        return missing(claim, group, name)
    changes = [mean_loss(run, length) - mean_loss(run, group.trained_at) for run in model.runs]
    evidence = f"{', '.join(map(percent, changes))} at four times{rule}"
    seeds = ", ".join(str(run["seed"]) for run in model.runs)
    return Finding(
        claim, verdict_over([counts(one) for one in changes]), f"{evidence} (seed{'s' * (len(changes) > 1)} {seeds})"
    )


def _dense_degrades(group: Group) -> Finding:
    claim = "Dense degrades past its training length: +201 % at four times"
    return _at_four(claim, group, "dense", lambda change: change > math.log(1.5), ", +50 % or more counts")


def _stagger_extrapolates(group: Group) -> Finding:
    claim = "Linear, W = 12 does not degrade: −1.3 % at four times"
    return _at_four(claim, group, "linear-w12", lambda change: change < 0.01)


def _coprime_extrapolates(group: Group) -> Finding:
    claim = "Coprime, W = 12 loses a little: +2.8 % at four times, where its untrained rungs wake up"
    return _at_four(claim, group, "coprime-w12", lambda change: math.log(1.005) < change < math.log(1.10))


def _learned_stays(group: Group) -> Finding:
    claim = "A learned α stays within about 0.05 of its start and never beats the stagger"
    models = [model for model in group.models if model.is_papers and model.first["model"]["learned_alphas"]]
    if not models:
        return missing(claim, group, "learned-w12")
    farthest = max(abs(alpha - 1) for model in models for alpha in model.first["model"]["learned_alphas"])
    pairs = [(model, group.get(f"linear-w{model.recipe['window']}")) for model in models]
    gaps = [gap for one, other in pairs if other and (gap := one.gap(other, group.trained_at)) is not None]
    behind = [gap > 0 for gap in gaps]
    evidence = (
        f"farthest from 1: {farthest:.3f} (up to 0.08 counts); "
        f"behind the stagger in {sum(behind)} of {len(behind)} pairs"
    )
    return so_far(claim, [farthest <= 0.08, *behind], 1 + len(_WINDOWS), evidence, "checks")


def _gain_is_flat(group: Group) -> Finding:
    claim = "The stagger's gain over fixed is flat over the window, about 0.035 nats"
    fixed, linear = group.get("fixed-w12"), group.get("linear-w12")
    gain = fixed.gaps_by_part(linear, group.trained_at)[1:] if fixed and linear else []
    if not gain:
        return missing(claim, group, "fixed-w12", "linear-w12")
    mean, spread = statistics.mean(gain), max(gain) - min(gain)
    evidence = (
        f"{mean:.3f} nats in the mean of parts 2 … 8, between {min(gain):.3f} and {max(gain):.3f} (a spread below the "
        "mean counts as flat; in part 1 most rungs reach before the text)"
    )
    return judged(claim, mean > 0 and spread < mean, evidence)


def _seeds(group: Group) -> Finding:
    claim = "Seeds differ little: at W = 12 by 0.06 to 0.18 of a perplexity of 42, that is 0.1 to 0.4 %"
    models = [model for model in group.models if model.is_papers and model.recipe["window"] == 12]
    repeated = [model for model in models if len(model.runs) > 1]
    sigma = group.sigma(*repeated)
    if sigma is None:
        return Finding(claim, "not run", "needs the study seeds")
    evidence = f"{100 * math.expm1(sigma):.2f} % pooled (below 0.6 % counts)"
    return so_far(claim, [sigma < math.log(1.006)] * len(repeated), _REPEATED, evidence, "models")
