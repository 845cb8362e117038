"""What the project set out to do, each claim held against the results: does the hybrid do it?"""

import math
from collections.abc import Iterable

import pandas as pd

from fibattn.progress import quantity
from study.report.claims import Claims, Finding, Judged, percent, verdict_over
from study.report.probe_tables import recalled, unbounded_recall
from study.report.results import PLAIN, Frame, Group, Probes, in_words
from study.rivals import OURS
from study.store import LENGTHENED

OWN = Claims()
_FOUND = 0.9
"""A distance is reached when so many of its values are found."""


def _pairs(group: Group) -> list[int]:
    """The seeds that both dense and the hybrid have."""
    if not {"dense", OURS} <= set(group.models.index):
        return []
    return list(group.loss(group.trained_at)[["dense", OURS]].dropna().index)


def _of_sets(group: Group, model: str, length: int, way: str = PLAIN) -> Frame:
    """The loss of a model on each held-out set: a row a seed."""
    losses = group.losses
    chosen = losses[(losses["model"] == model) & (losses["way"] == way) & (losses["length"] == length)]
    return chosen.pivot(index="seed", columns="set", values="nll")[group.sets]


def _by_seed(evidence: dict[int, str]) -> str:
    """What each seed says; one alone is said to be so."""
    words = "; ".join(f"seed {seed}: {words}" for seed, words in evidence.items())
    return words if len(evidence) > 1 else f"{words} (one seed)"


@OWN.say("The hybrid is better than dense at the training length on every domain", f"dense, {OURS}")
def _better_everywhere(group: Group) -> Judged:
    seeds = _pairs(group)
    if not seeds:
        return None
    gaps = (_of_sets(group, OURS, group.trained_at) - _of_sets(group, "dense", group.trained_at)).loc[seeds]
    gaps["together"] = gaps.mean(axis=1)
    words = _by_seed(
        {seed: ", ".join(f"{name} {percent(gap)}" for name, gap in row.items()) for seed, row in gaps.iterrows()}
    )
    if len(seeds) > 1:
        words += f"; over all seeds {percent(gaps['together'].mean())}"
    return verdict_over((gaps[group.sets] < 0).to_numpy().flat), words


@OWN.say("The hybrid gets no worse at {factor} times the training length", OURS)
def _no_worse_when_long(group: Group) -> Judged:
    if OURS not in group.models.index:
        return None
    mean = pd.DataFrame({length: group.saved(length) for length in group.lengths})
    plain = _of_sets(group, OURS, group.longest)
    far = _of_sets(group, OURS, group.longest, str(group.trained_at)) if group.bounded else plain.iloc[:0]
    changes = far.combine_first(plain)[group.sets] - _of_sets(group, OURS, group.trained_at)
    evidence = {}
    for seed, row in changes.iterrows():
        best, longest = mean.loc[seed].idxmin(), group.longest
        words = [in_words(str(group.trained_at) if seed in far.index else PLAIN)]
        words += [f"{name} {percent(change)}" for name, change in row.items()]
        words.append(f"best at {best // group.trained_at}×")
        if best < longest:
            words.append(f"{percent(mean.at[seed, longest] - mean.at[seed, best])} from there")
        evidence[seed] = ", ".join(words)
    return verdict_over((changes <= 0).to_numpy().flat), _by_seed(evidence)


@OWN.say(
    "The hybrid is ahead of dense past the training length, however dense is helped there",
    f"dense with another way to look past its length, {OURS}",
)
def _helped_dense(group: Group) -> Judged:
    helps, seeds = group.ways("dense"), _pairs(group)
    tried: Frame = pd.DataFrame({way: group.loss(group.trained_at, way)["dense"] for way in helps}).reindex(seeds)
    tried = tried.dropna(how="all").notna()
    if tried.empty:
        return None
    evidence, good = {}, []
    for seed in tried.index:
        own = in_words(str(group.trained_at) if group.bounded and seed in _bounds(group).index else PLAIN)
        words = [own]
        for length in (length for length in group.lengths if length > group.trained_at):
            theirs = {way: group.loss(length, way).at[seed, "dense"] for way in (PLAIN, *helps)}
            way, best = min(theirs.items(), key=lambda one: math.inf if math.isnan(one[1]) else one[1])
            gap = group.saved(length)[seed] - best
            good.append(gap < 0)
            words.append(f"{length // group.trained_at}×: {percent(gap)} ({in_words(way)})")
        evidence[seed] = ", ".join(words)
    known = [way for way in helps if tried[way].any()]
    against = f"against the best of {', '.join(map(in_words, known))}: {_by_seed(evidence)}"
    kinds = {
        "bounded": [way for way in known if way.isdigit()],
        "trained on in longer sequences": [way for way in known if way.startswith(LENGTHENED)],
    }
    untried = [words for words, several in kinds.items() if not tried[several].any(axis=1).all()]
    if untried and all(good):
        return "partly", f"{against}; not every run of dense was {' and '.join(untried)}"
    return verdict_over(good), against


def _bounds(group: Group) -> Frame:
    """What each bound changes in the loss of the hybrid at the longest length: a row a seed."""
    plain = group.loss(group.longest)
    bounds = [way for way in group.ways(OURS) if way.isdigit()]
    gaps = {int(way): group.loss(group.longest, way)[OURS] - plain[OURS] for way in bounds}
    return pd.DataFrame(gaps).dropna(how="all")


@OWN.say(
    "In the longest sequences the hybrid is no worse for its bound, which makes its cost constant",
    f"a run of {OURS} that was evaluated with a bound",
)
def _bounded(group: Group) -> Judged:
    gaps = _bounds(group)
    if gaps.empty:
        return None
    evidence = {
        seed: ", ".join(f"{n:,} tokens: {percent(gap)}" for n, gap in row.dropna().items())
        for seed, row in gaps.iterrows()
    }
    words = f"against no bound, in sequences of {group.longest:,}: {_by_seed(evidence)}"
    return verdict_over(gaps.min(axis=1) <= 0), words


@OWN.say(
    "The hybrid trains at least as fast as dense at the training length",
    "a run of both that had the same kind of GPU for itself",
)
def _trains_as_fast(group: Group) -> Judged:
    alone = group.runs[group.runs["alone"]]
    ours, dense = (alone[alone["model"] == name] for name in (OURS, "dense"))
    pairs = ours.merge(dense, on="hardware", suffixes=("", "_dense"))
    if pairs.empty:
        return None
    last = pairs.iloc[-1]
    words = f"{quantity(last['speed'])} tokens/s against {quantity(last['speed_dense'])} on {last['device']}"
    return verdict_over([last["speed"] >= last["speed_dense"]]), words


@OWN.say(
    "In perplexity, rungs earn more than the same number of keys added to a plain window",
    "stagger-w128 and window-w132, or another such pair",
)
def _rungs_against_window(group: Group) -> Judged:
    gaps = {pair: gap for pair in _control_pairs(group) if not math.isnan(gap := group.gap(*pair))}
    if not gaps:
        return None
    past = [name for name in group.current.index if name not in group.papers]
    tie = group.tie(*past)
    evidence = "; ".join(
        f"{group.label(one)} {percent(gap)} against {group.label(two)}" for (one, two), gap in gaps.items()
    )
    if all(abs(gap) < tie for gap in gaps.values()):
        return "undecided", f"{evidence} (up to {percent(tie).lstrip('+')} may be the seeds)"
    return verdict_over(gap < 0 for gap in gaps.values()), evidence


def _control_pairs(group: Group) -> list[tuple[str, str]]:
    """Each clipped stagger, and each such hybrid, with the plain window that reads about as many keys."""
    models = group.current
    windows = models[models["kind"].isin(["window", "window hybrid"])]
    pairs = []
    for name, own in models[models["kind"].isin(["stagger", "hybrid"]) & ~models["heads"]].iterrows():
        wider = windows.loc[windows["full_layers"] == own["full_layers"], "window"] - own["window"]
        near = wider[(wider > 0) & (wider < 16)]
        if not near.empty:
            pairs.append((name, near.idxmin()))
    return pairs


@OWN.say(
    "From text alone the hybrid learns to copy from where a plain window of as many keys does not",
    f"{OURS} and a plain window, asked to copy",
)
def _copies_farther(group: Group) -> Judged:
    window = group.plain_window
    asked = {name: _copied(group, name) for name in (OURS, window, "dense") if name}
    if window is None or asked[OURS].empty or asked[window].empty:
        return None
    near = group.models.at[OURS, "window"]
    far = [n for n in asked[OURS] if near < n <= group.trained_at // 2]
    good = [asked[OURS][n].min() - asked[window][n].max() >= 0.01 for n in far if n in asked[window]]
    evidence = [
        f"{name} " + ", ".join(f"{_range(100 * found[n], '.0f')} % at {n:,}" for n in found if n in far)
        for name, found in asked.items()
        if not found.empty
    ]
    return verdict_over(good), f"random tokens named, by distance in tokens: {'; '.join(evidence)}"


def _copied(group: Group, model: str) -> Frame:
    """The part of random tokens that each run of a model copies: a column a distance; empty where none was asked."""
    asked = group.runs.loc[group.runs["model"] == model, "copying"].dropna()
    return pd.DataFrame(list(asked)).rename(columns=int).sort_index(axis=1)


def recalls_farther(probes: Probes) -> Finding:
    """What the recall probe says of rungs."""
    claim = "With rungs a small model recalls from farther back than with a window of as many keys"
    farther, seen = [], []
    recall = unbounded_recall(probes)
    found = pd.DataFrame(columns=["task"]) if recall is None else recalled(recall)
    for task, rows in found.groupby("task", sort=False):
        reach = {str(name): _reach(one) for name, one in rows.groupby("variant", sort=False)}
        if {"window", "stagger"} <= set(reach):
            farther += [own > other for own in reach["stagger"] for other in reach["window"]]
            seen.append(f"{task}: " + ", ".join(f"{name} {_range(several)}" for name, several in reach.items()))
    if not farther:
        return Finding(claim, "not run", "needs python -m study probe recall")
    return Finding(claim, verdict_over(farther), f"tokens up to which 9 in 10 are found; {'; '.join(seen)}")


def _reach(rows: Frame) -> list[int]:
    """For each seed the farthest of the distances up to which values are found, 0 for none."""
    found = rows.pivot(index="seed", columns="distance", values="accuracy") >= _FOUND
    return [max(row.index[row], default=0) for _, row in found.cummin(axis=1).iterrows()]


def _range(values: Iterable[float], form: str = ",") -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
