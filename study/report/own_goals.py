"""The project's own goals, each held against the results: does the default recipe do what it is meant to?"""

import statistics
from collections.abc import Sequence

from fibattn.progress import quantity
from fibattn.training.recipe import DEFAULT
from study.report.findings import Finding, judged, missing, percent, verdict_over
from study.report.recalled import recalled
from study.report.results import PLAIN, Group, Model, Probes, as_saved, in_words, losses, mean_loss
from study.store import ways


def own_goals(group: Group, probes: Probes) -> list[Finding]:
    """What the default recipe is meant to do, checked."""
    return [
        _better_everywhere(group),
        _no_worse_when_long(group),
        _helped_dense(group),
        _bounded(group),
        _trains_as_fast(group),
        _rungs_against_window(group),
        _copies_farther(group),
        _recalls_farther(probes),
    ]


def _better_everywhere(group: Group) -> Finding:
    claim = "The default recipe is better than dense at the training length on every domain"
    dense, ours = group.get("dense"), group.get(DEFAULT)
    if not (dense and ours and ours.beside(dense)):
        return missing(claim, group, "dense", DEFAULT)
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
    return Finding(claim, verdict_over(good), words)


def _no_worse_when_long(group: Group) -> Finding:
    ours, longest = group.get(DEFAULT), group.lengths[-1]
    factor = longest // group.trained_at
    claim = f"The default recipe gets no worse at {factor} times the training length"
    if ours is None:
        return missing(claim, group, DEFAULT)
    evidence, good = {}, []
    for run in ours.runs:
        way, near = as_saved(run), losses(run, group.trained_at)
        changes = {name: loss - near[name] for name, loss in losses(run, longest, way).items()}
        good += [change <= 0 for change in changes.values()]
        words = [f"{name} {percent(change)}" for name, change in changes.items()]
        best = min(group.lengths, key=lambda length: mean_loss(run, length, way))
        words.append(f"best at {best // group.trained_at}×")
        if best < longest:
            words.append(f"{percent(mean_loss(run, longest, way) - mean_loss(run, best, way))} from there")
        evidence[run["seed"]] = ", ".join([in_words(way), *words])
    return Finding(claim, verdict_over(good), _by_seed(evidence))


def _helped_dense(group: Group) -> Finding:
    claim = "The default recipe is ahead of dense past the training length, however dense is helped there"
    dense, ours = group.get("dense"), group.get(DEFAULT)
    pairs = [(own, theirs) for own, theirs in ours.beside(dense) if ways(theirs)] if dense and ours else []
    if not pairs:
        return missing(claim, group, "dense", DEFAULT)
    evidence, good = {}, []
    for own, theirs in pairs:
        words = []
        for length in (length for length in group.lengths if length > group.trained_at):
            best, way = min((mean_loss(theirs, length, way), way) for way in (PLAIN, *ways(theirs)))
            gap = mean_loss(own, length, as_saved(own)) - best
            good.append(gap < 0)
            words.append(f"{length // group.trained_at}×: {percent(gap)} ({in_words(way)})")
        evidence[own["seed"]] = ", ".join([in_words(as_saved(own)), *words])
    tried = ", ".join(dict.fromkeys(in_words(way) for _, theirs in pairs for way in ways(theirs)))
    against = f"against the best of {tried}: {_by_seed(evidence)}"
    helps = {"bounded": "bounded", "lengthened": "trained on in longer windows"}
    untried = [words for name, words in helps.items() if not all(theirs.get(name) for _, theirs in pairs)]
    if untried and good and all(good):
        return Finding(claim, "partly", f"{against}; not every run of dense was {' and '.join(untried)}")
    return Finding(claim, verdict_over(good), against)


def _bounded(group: Group) -> Finding:
    claim = "In the longest windows the default recipe is no worse for its bound, which makes its cost constant"
    ours, longest = group.get(DEFAULT), group.lengths[-1]
    runs = [run for run in ours.runs if run.get("bounded")] if ours else []
    if not runs:
        return Finding(claim, "not run", f"needs a run of {DEFAULT} that was evaluated so")
    evidence, good = {}, []
    for run in runs:
        gaps = {int(n): mean_loss(run, longest, n) - mean_loss(run, longest) for n in run["bounded"]}
        good.append(min(gaps.values()) <= 0)
        evidence[run["seed"]] = ", ".join(f"{n:,} tokens: {percent(gap)}" for n, gap in gaps.items())
    return Finding(claim, verdict_over(good), f"against no bound, in windows of {longest:,}: {_by_seed(evidence)}")


def _trains_as_fast(group: Group) -> Finding:
    claim = "The default recipe trains at least as fast as dense at the training length"
    dense, ours = group.get("dense"), group.get(DEFAULT)
    if not (dense and ours):
        return missing(claim, group, "dense", DEFAULT)
    theirs = dense.alone()
    pairs = [(own, other) for own in ours.alone() for other in theirs if own["hardware"] == other["hardware"]]
    if not pairs:
        return Finding(claim, "not run", "needs a run of each that had the same kind of GPU for itself")
    own, other = (run["training"]["tokens_per_second"] for run in pairs[-1])
    device = pairs[-1][0]["hardware"]["device"]
    return judged(claim, own >= other, f"{quantity(own)} tokens/s against {quantity(other)} on {device}")


def _control_pairs(group: Group) -> list[tuple[Model, Model]]:
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
    gaps = [
        (one, two, gap) for one, two in _control_pairs(group) if (gap := one.gap(two, group.trained_at)) is not None
    ]
    if not gaps:
        return Finding(claim, "not run", "needs stagger-w128 and window-w132, or another such pair")
    tie = group.tie(*(model for model in group.models if not model.is_papers))
    evidence = "; ".join(f"{one.label} {percent(gap)} against {two.label}" for one, two, gap in gaps)
    if all(abs(gap) < tie for *_, gap in gaps):
        return Finding(claim, "undecided", f"{evidence} (up to {percent(tie).lstrip('+')} may be the seeds)")
    return Finding(claim, verdict_over([gap < 0 for *_, gap in gaps]), evidence)


def _copies_farther(group: Group) -> Finding:
    claim = "From text alone the default recipe learns to copy from where a plain window of as many keys does not"
    ours, window = group.get(DEFAULT), group.plain_window
    asked = {model.name: _copied(model) for model in (ours, window, group.get("dense")) if model}
    if not (ours and window and asked[ours.name] and asked[window.name]):
        return missing(claim, group, DEFAULT, window.name if window else "window-w132")
    own, control = asked[ours.name], asked[window.name]
    far = [n for n in sorted(own) if ours.recipe["window"] < n <= group.trained_at // 2]
    good = [min(own[n]) - max(control[n]) >= 0.01 for n in far if n in control]
    evidence = [
        f"{name} " + ", ".join(f"{_share(parts)} at {n:,}" for n, parts in found.items() if n in far)
        for name, found in asked.items()
        if found
    ]
    return Finding(claim, verdict_over(good), f"random tokens named, by distance in tokens: {'; '.join(evidence)}")


def _copied(model: Model) -> dict[int, list[float]]:
    """The part of random tokens that each seed of a model copies, by distance; empty where none was asked."""
    found: dict[int, list[float]] = {}
    for run in model.runs:
        for distance, part in (run.get("copying") or {}).items():
            found.setdefault(int(distance), []).append(part)
    return found


def _share(parts: Sequence[float]) -> str:
    return _range([100 * part for part in parts], ".0f") + " %"


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
        return Finding(claim, "not run", "needs python -m study probe recall")
    return Finding(claim, verdict_over(farther), f"tokens up to which 9 in 10 are found; {'; '.join(seen)}")


def _by_seed(evidence: dict[int, str]) -> str:
    """What each seed says; one alone is said to be so."""
    return "; ".join(f"seed {seed}: {words}" for seed, words in evidence.items()) + (
        "" if len(evidence) > 1 else " (one seed)"
    )


def _range(values: Sequence[float], form: str = ",") -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
