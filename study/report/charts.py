"""The report's figures. Each function draws one, saves it with its numbers beside it, and returns its path."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from fibattn.pattern import Schedule, layer_alphas, layer_patterns, union_coverage
from fibattn.plotting import QUIET
from study.labels import label_ends
from study.report.drawing import LOOKS, legend, panels, plain_ticks, saved
from study.report.headline import Headline
from study.report.probe_tables import recalled
from study.report.recipes import keys_at
from study.report.results import PLAIN, Frame, Group, in_words, papers_gain
from study.rivals import OURS
from study.store import LENGTHENED

_THIN = {"linewidth": 1, "marker": "", "alpha": 0.7}
"""How one seed of several looks beside the line of its model."""
_STYLES = ("-", "--", ":", "-.", (0, (1, 4)))
"""How a model is drawn in its own way, and in the others."""


@dataclass(frozen=True)
class _Curve:
    """One run over the evaluation lengths."""

    label: str
    name: str
    """The same in few words, for the drawing; empty for a further seed."""
    ratios: Frame
    """Perplexity at each length, over that of dense with the same seed at the training length."""
    look: dict[str, Any]


def extrapolation(group: Group, path: Path) -> Path:
    """Perplexity over evaluation length, relative to dense of the same seed at the training length.

    The highest at the training length and the lowest of all are the limits; a curve that leaves them is named at the
    edge, with its end.
    """
    curves = _curves(group)
    low, high = min(one.ratios.min() for one in curves), max(one.ratios.iloc[0] for one in curves)
    margin = max(0.1 * (high - low), 0.02)
    up = f"perplexity ÷ {group.label(_reference(group))} at {group.trained_at:,}"
    figure, (axes,) = panels(1, 4.4, "evaluation length (tokens)", up)
    for one in curves:
        axes.plot(group.lengths, one.ratios, **one.look)
    _over_lengths(axes, group.lengths, group.trained_at)
    axes.set_ylim(low - margin, high + margin)
    ends = [(one, one.ratios.iloc[-1]) for one in curves if one.name]
    label_ends(axes, [(f"{one.name} {end:.2f}", end, one.look["color"]) for one, end in ends])
    rows = [(one.label, n, ratio) for one in curves for n, ratio in one.ratios.items()]
    return saved(figure, path, pd.DataFrame(rows, columns=["model", "length", "ratio"]))


def headline(shown: Headline, path: Path) -> Path:
    """Perplexity over evaluation length, a curve for each way of looking past the training length."""
    perplexities = pd.DataFrame({one.name: one.perplexities for one in shown.curves}).sort_index()
    figure, (axes,) = panels(1, 3.4, "evaluation length", "perplexity")
    for one in shown.curves:
        look = LOOKS[one.kind] | {"linewidth": 2.5, "markersize": 6, "linestyle": one.style}
        axes.plot(perplexities[one.name], **look)
    _over_lengths(axes, list(perplexities.index), shown.trained_at)
    axes.set_yscale("log")
    low, high = perplexities.min().min(), perplexities.max().max()
    ticks = [one for one in (10, 20, 30, 50, 100, 200, 300, 500, 1000) if 0.85 * low <= one <= 1.2 * high]
    axes.set_yticks(ticks, [f"{one:,}" for one in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0.85 * low, 1.2 * high)
    ends = []
    for one in shown.curves:
        last = max(one.perplexities)
        end, where = one.perplexities[last], "" if last == perplexities.index[-1] else f" at {last:,}"
        ends.append((f"{one.name} {end:.0f}{where}", end, LOOKS[one.kind]["color"]))
    label_ends(axes, ends)
    numbers = perplexities.astype(object).where(perplexities.notna(), "")
    return saved(figure, path, numbers.rename_axis("length").reset_index())


def _over_lengths(axes: Axes, lengths: list[int], trained_at: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}\n{n // trained_at}×" for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _curves(group: Group) -> list[_Curve]:
    """The first run of each leading model, also in its other ways, and thin every other whose seed dense has.

    Its own way is the plain one, that of the hybrid the one in which it is saved.
    """
    reference = group.loss(group.trained_at)[_reference(group)].dropna()
    curves = []
    for model, short in _leading(group).items():
        look = LOOKS[group.models.at[model, "kind"]] | {"linewidth": 2, "markersize": 5}
        as_saved = model == OURS and group.bounded
        own = str(group.trained_at) if as_saved else PLAIN
        ways = sorted((PLAIN, *group.ways(model)), key=lambda way: way != own)
        for way, style in zip(ways, itertools.cycle(_STYLES), strict=False):
            losses = pd.Series({n: group.first(n, way)[model] for n in group.lengths})
            seed = group.loss(group.trained_at, way)[model].first_valid_index()
            ratios = (losses - reference.get(seed, reference.iloc[0])).map(math.exp)
            words = f"{group.label(model)}, unbounded" if way == PLAIN != own else group.tried(model, way)
            curves.append(_Curve(words, f"{short}{_briefly(way, own)}", ratios, look | {"linestyle": style}))
        seeds = pd.DataFrame({n: group.saved(n) if as_saved else group.loss(n)[model] for n in group.lengths})
        further = seeds.drop(group.models.at[model, "seed"]).sub(reference, axis=0).dropna().map(math.exp)
        words = f"{group.label(model)}, seed"
        curves += [_Curve(f"{words} {seed}", "", row, look | _THIN) for seed, row in further.iterrows()]
    return curves


def _briefly(way: str, own: str) -> str:
    if way == PLAIN:
        return ", unbounded" if way != own else ""
    return ", bounded" if way.isdigit() else ", trained on" if way.startswith(LENGTHENED) else f", {in_words(way)}"


def _reference(group: Group) -> str:
    """What perplexities are divided by: dense, or what stands first without it."""
    return "dense" if "dense" in group.models.index else group.models.index[0]


def _leading(group: Group) -> dict[str, str]:
    """The models to draw where there is no room for all, each in a word."""
    words = {"dense": "dense", "linear-w12": "linear", "fixed-w12": "fixed", group.plain_window: "window"}
    words[OURS] = "hybrid"
    found = {str(name): word for name, word in words.items() if name in group.models.index}
    return found or {name: group.label(name) for name in group.models.index[:5]}


def positions(group: Group, path: Path) -> Path | None:
    """The stagger's gain over fixed in each part of the sequence, beside the paper's; None without the runs."""
    ours = group.gaps_by_part("fixed-w12", "linear-w12", group.trained_at)
    if ours.empty:
        return None
    papers, losses, parts = papers_gain(), group.by_part(group.trained_at), range(1, 9)
    figure, (above, below) = panels(2, 3, f"eighth of {group.trained_at:,} tokens", "nats")
    ends = []
    for model, word in _leading(group).items():
        look, curve = LOOKS[group.models.at[model, "kind"]], losses.loc[model].sort_index().iloc[0]
        above.plot(parts, curve, **look, markersize=5)
        ends.append((word, curve.iloc[-1], look["color"]))
    gains = (("here", ours, LOOKS["linear"]), ("paper", papers, {"color": QUIET, "marker": "o", "linestyle": "--"}))
    for _, gain, look in gains:
        below.plot(parts, gain, **look, markersize=5)
    below.axhline(0, color="#78716c", linewidth=1)
    above.set_title("loss", loc="left")
    below.set_title("what linear gains over fixed", loc="left")
    label_ends(above, ends)
    label_ends(below, [(word, gain.iloc[-1], look["color"]) for word, gain, look in gains])
    return saved(figure, path, pd.DataFrame({"part": parts, "gain": ours.array, "paper's gain": papers.array}))


def alphas(group: Group, path: Path) -> Path | None:
    """Learned scales over depth beside those of the stagger; None when no model learnt any."""
    learned = group.models[group.models["learned_alphas"].map(bool)].set_index("label")["learned_alphas"]
    if learned.empty:
        return None
    layers = len(learned.iloc[0])
    figure, (axes,) = panels(1, 3.4, "layer", "scale α of the rungs")
    axes.plot(layer_alphas("linear", layers=layers), "--", **LOOKS["linear"], markersize=5, label="linear stagger")
    for (label, values), marker in zip(learned.items(), itertools.cycle("p^vX"), strict=False):
        axes.plot(values, **{**LOOKS["learned"], "marker": marker}, markersize=5, label=label)
    axes.axhspan(0.95, 1.05, color=QUIET, alpha=0.3, linewidth=0)
    axes.annotate("0.95 … 1.05", (layers - 1, 1.06), ha="right", color="#57534e")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, axes.get_legend_handles_labels()[0])
    rows = [(label, layer, value) for label, values in learned.items() for layer, value in enumerate(values)]
    return saved(figure, path, pd.DataFrame(rows, columns=["model", "layer", "alpha"]))


def coverage(path: Path, *, layers: int = 16, window: int = 8, context: int = 1024) -> Path:
    """Which distances some layer attends to, for three schedules at the paper's shape; the count beside each."""
    schedules: tuple[Schedule, ...] = ("fixed", "linear", "coprime")
    figure, axes = panels(3, 1.8, "distance (grey: the window)", "layer")
    rows = []
    for one, schedule in zip(axes, schedules, strict=True):
        patterns = layer_patterns("fibonacci", schedule, layers=layers, window=window)
        dots = [(d, layer) for layer, pattern in enumerate(patterns) for d in pattern.offsets if d < context]
        rows += [(schedule, layer, d) for d, layer in dots]
        colour = LOOKS[schedule]["color"]
        one.axvspan(0.8, window, color=QUIET, alpha=0.3, linewidth=0)
        one.plot(*zip(*dots, strict=True), "o", color=colour, markersize=2.5)
        words = f"{schedule}: {union_coverage(patterns, context)} distances, the window's {window + 1} included"
        one.set_title(words, fontsize=11, loc="left", color=colour)
        plain_ticks(one)
        one.set_xlim(0.8, context)
    return saved(figure, path, pd.DataFrame(rows, columns=["schedule", "layer", "distance"]))


def frontier(group: Group, path: Path) -> Path:
    """Quality against cost: perplexity at the training length over the keys that a query reads, there and at the end.

    The line joins the models that no other beats in both; dense, the hybrid and the best are named.
    """
    losses = group.first(group.trained_at)
    points = group.models.assign(ratio=(losses - losses[_reference(group)]).map(math.exp))
    up = f"perplexity ÷ {group.label(_reference(group))}, at {group.trained_at:,}"
    figure, axes = panels(2, 3.2, "keys that a query reads (mean)", up)
    names = {"dense": "dense", OURS: "   hybrid", points["ratio"].idxmin(): "best   "}
    columns = {"model": points["label"]}
    for one, n in zip(axes, (group.trained_at, group.longest), strict=True):
        points["x"] = [keys_at(shape, group.trained_at, n) for shape in points["shape"]]
        columns[f"keys at {n}"] = points["x"]
        ordered = points.sort_values("x")
        unbeaten = ordered[ordered["ratio"] < ordered["ratio"].cummin().shift(fill_value=math.inf)]
        one.step(unbeaten["x"], unbeaten["ratio"], where="post", color=QUIET, linewidth=1)
        for kind, own in points.groupby("kind", sort=False):
            one.plot(own["x"], own["ratio"], **LOOKS[str(kind)], linestyle="", fillstyle="none", label=kind)
        for name, words in ((name, words) for name, words in names.items() if name in points.index):
            row, places = points.loc[name], {"dense": ("center", "top"), OURS: ("left", "center")}
            across, up = places.get(name, ("right", "top"))
            one.annotate(words, (row["x"], row["ratio"] - 0.012 * (name == "dense")), ha=across, va=up)
        plain_ticks(one)
        one.margins(x=0.15, y=0.15)
        one.set_title(f"over {n:,} tokens", loc="left")
    legend(figure, axes[0].get_legend_handles_labels()[0])
    return saved(figure, path, pd.DataFrame({**columns, "ratio": points["ratio"]}))


def recall(probe: dict[str, Any], path: Path) -> Path:
    """Accuracy of recall over distance: one panel a task, one line a model, the median of its thin seeds."""
    found = recalled(probe)
    tasks = found.groupby("task", sort=False)
    up = "accuracy (dotted: chance)"
    figure, axes = panels(len(tasks), 3, "distance (dashed: training length)", up)
    for one, (task, rows) in zip(axes, tasks, strict=True):
        for variant, own in rows.groupby("variant", sort=False):
            seeds = own.pivot(index="distance", columns="seed", values="accuracy")
            one.plot(seeds, **LOOKS[str(variant)] | _THIN)
            one.plot(seeds.median(axis=1), **LOOKS[str(variant)])
        one.axvline(probe["trained_at"], color=QUIET, linestyle="--", linewidth=1)
        one.axhline(1 / probe["values"], color=QUIET, linestyle=":", linewidth=1)
        one.set_ylim(-0.03, 1.03)
        plain_ticks(one)
        one.set_title(task, loc="left")
    legend(figure, [Line2D([], [], **LOOKS[one], label=one) for one in found["variant"].unique()])
    numbers = found[["variant", "seed", "task", "distance", "accuracy"]]
    return saved(figure, path, numbers.rename(columns={"variant": "model"}))
