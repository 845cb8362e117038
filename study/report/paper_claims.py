"""What the paper says of language models, each claim held against the results."""

import math
from collections.abc import Callable

from study.report.claims import Claims, Judged, percent, so_far, verdict_over
from study.report.results import Group

PAPERS = Claims()
_WINDOWS = (6, 8, 10, 12)
_MODELS = 21
_REPEATED = 5
"""Models that the paper trained from several seeds."""


@PAPERS.say("At every window: linear ≈ coprime < learned < fixed", "linear, coprime, learned and fixed of one window")
def _order(group: Group) -> Judged:
    right, seen = [], []
    for window in _WINDOWS:
        names = [f"{schedule}-w{window}" for schedule in ("linear", "coprime", "learned", "fixed")]
        means = group.compared(names)
        if means.empty:
            continue
        linear, coprime, learned, fixed = (means[name] for name in names)
        right.append(abs(linear - coprime) < group.tie(*names) and max(linear, coprime) < learned < fixed)
        seen.append(
            f"W = {window}: coprime {percent(coprime - linear)}, learned {percent(learned - linear)}, "
            f"fixed {percent(fixed - linear)} against linear"
        )
    return so_far(right, len(_WINDOWS), "; ".join(seen), "windows")


@PAPERS.say("Power-of-two fixed, W = 8, is the worst of all", "pow2-fixed-w8 and four more of the 21")
def _power_of_two_fixed(group: Group) -> Judged:
    ranked = list(group.compared(group.papers).index)
    if "pow2-fixed-w8" not in ranked or len(ranked) < 5:
        return None
    place = ranked.index("pow2-fixed-w8") + 1
    evidence = f"place {place} of {len(ranked)}; the last is {group.label(ranked[-1])}"
    return so_far([place == len(ranked)] * len(ranked), _MODELS, evidence, "models")


@PAPERS.say("Power-of-two linear matches Fibonacci learned", "pow2-linear-w12, learned-w12")
def _power_of_two_linear(group: Group) -> Judged:
    gaps = {window: group.gap(f"pow2-linear-w{window}", f"learned-w{window}") for window in _WINDOWS}
    gaps = {window: gap for window, gap in gaps.items() if not math.isnan(gap)}
    evidence = ", ".join(f"W = {window}: {percent(gap)}" for window, gap in gaps.items()) + " (within 1 % counts)"
    return so_far([abs(gap) < math.log(1.01) for gap in gaps.values()], len(_WINDOWS), evidence, "windows")


@PAPERS.say("The best of the 21 is linear, W = 12", "five of the 21 or more")
def _best_sparse(group: Group) -> Judged:
    ranked = group.compared(group.papers)
    if len(ranked) < 5:
        return None
    best, second = ranked.index[:2]
    evidence = f"the best is {best}, ahead of {second} by {percent(ranked[second] - ranked[best])}"
    return so_far([best == "linear-w12"] * len(ranked), _MODELS, evidence, "models")


@PAPERS.say("At the training length dense is ahead of the best of them (there by 26 %)", "dense, linear-w12")
def _dense_ahead(group: Group) -> Judged:
    ranked = group.compared(group.papers)
    best = "" if ranked.empty else str(ranked.index[0])
    gap = group.gap(best, "dense")
    if math.isnan(gap):
        return None
    evidence = f"{group.label(best)} is {percent(gap)} against dense here (other text, other budget)"
    return verdict_over([gap > group.tie("dense", best)]), evidence


def _at_four(group: Group, name: str, counts: Callable[[float], bool], rule: str = "") -> Judged:
    """A claim about the change of a model's loss at four times its training length, in every seed of it."""
    length = 4 * group.trained_at
    if name not in group.models.index or length not in group.lengths:
        return None
    changes = (group.loss(length)[name] - group.loss(group.trained_at)[name]).dropna()
    seeds = f"seed{'s' * (len(changes) > 1)} {', '.join(map(str, changes.index))}"
    evidence = f"{', '.join(map(percent, changes))} at four times{rule} ({seeds})"
    return verdict_over(map(counts, changes)), evidence


@PAPERS.say("Dense degrades past its training length: +201 % at four times", "dense")
def _dense_degrades(group: Group) -> Judged:
    return _at_four(group, "dense", lambda change: change > math.log(1.5), ", +50 % or more counts")


@PAPERS.say("Linear, W = 12 does not degrade: −1.3 % at four times", "linear-w12")
def _stagger_extrapolates(group: Group) -> Judged:
    return _at_four(group, "linear-w12", lambda change: change < 0.01)


@PAPERS.say(
    "Coprime, W = 12 loses a little: +2.8 % at four times, where its untrained rungs wake up",
    "coprime-w12",
)
def _coprime_extrapolates(group: Group) -> Judged:
    return _at_four(group, "coprime-w12", lambda change: math.log(1.005) < change < math.log(1.10))


@PAPERS.say("A learned α stays within about 0.05 of its start and never beats the stagger", "learned-w12, linear-w12")
def _learned_stays(group: Group) -> Judged:
    models = group.models.loc[group.papers]
    learned = models[models["kind"] == "learned"]
    if learned.empty:
        return None
    farthest = max(abs(alpha - 1) for alphas in learned["learned_alphas"] for alpha in alphas)
    gaps = [group.gap(name, f"linear-w{window}") for name, window in learned["window"].items()]
    behind = [gap > 0 for gap in gaps if not math.isnan(gap)]
    evidence = (
        f"farthest from 1: {farthest:.3f} (up to 0.08 counts); "
        f"behind the stagger in {sum(behind)} of {len(behind)} pairs"
    )
    return so_far([farthest <= 0.08, *behind], 1 + len(_WINDOWS), evidence, "checks")


@PAPERS.say("The stagger's gain over fixed is flat over the window, about 0.035 nats", "fixed-w12, linear-w12")
def _gain_is_flat(group: Group) -> Judged:
    gain = group.gaps_by_part("fixed-w12", "linear-w12", group.trained_at)[1:]
    if gain.empty:
        return None
    mean, low, high = gain.mean(), gain.min(), gain.max()
    evidence = (
        f"{mean:.3f} nats in the mean of parts 2 … 8, between {low:.3f} and {high:.3f} (a spread below the "
        "mean counts as flat; in part 1 most rungs reach before the text)"
    )
    return verdict_over([0 < mean > high - low]), evidence


@PAPERS.say("Seeds differ little: at W = 12 by 0.06 to 0.18 of a perplexity of 42, that is 0.1 to 0.4 %", "study seeds")
def _seeds(group: Group) -> Judged:
    seeds = group.loss(group.trained_at)[group.papers].count()
    repeated = [name for name in group.papers if name.endswith("-w12") and seeds[name] > 1]
    if not repeated:
        return None
    sigma = group.sigma(*repeated)
    evidence = f"{100 * math.expm1(sigma):.2f} % pooled (below 0.6 % counts)"
    return so_far([sigma < math.log(1.006)] * len(repeated), _REPEATED, evidence, "models")
