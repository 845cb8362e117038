"""The report's figures. Each function draws one, saves it with its numbers beside it, and returns its path."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fibattn.pattern import layer_alphas, layer_patterns, union_coverage
from fibattn.plotting import COLOURS, STYLE, save
from fibattn.study.results import PLAIN, Group, Model, mean_loss, paper

_QUIET = "#a8a29e"
_LEADS = ("dense", "linear-w12", "hybrid", "fixed-w12", "window-w132", "window-w24")


def extrapolation(group: Group, path: Path) -> Path:
    """Perplexity over evaluation length, relative to dense of the same seed at the training length.

    The first seed in full colour with its label, the others thin.
    """
    dense = group.get("dense")
    leads = [model for name in _LEADS if (model := group.get(name))] or list(group.models[:5])
    base = (dense or leads[0]).loss(group.trained_at)
    curves: list[tuple[str, list[float], str, str]] = []
    for model, colour in zip(leads, COLOURS, strict=False):
        curves.append((model.label, [model.loss(n) - base for n in group.lengths], colour, "-"))
        for rope, style in zip(model.first["rope_scaling"], ("--", ":"), strict=False):
            name = {"yarn": "YaRN", "linear": "linear scaling"}[rope]
            losses = [model.loss(n, PLAIN if n == group.trained_at else rope) - base for n in group.lengths]
            curves.append((f"{model.label}, {name}", losses, colour, style))
    others = [
        (
            f"{model.label}, seed {run['seed']}",
            [mean_loss(run, n) - mean_loss(own, group.trained_at) for n in group.lengths],
            colour,
        )
        for model, colour in zip(leads, COLOURS, strict=False)
        for run, own in (model.beside(dense)[1:] if dense else ())
    ]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
        for _, losses, colour in others:
            axes.plot(group.lengths, [math.exp(x) for x in losses], "-", color=colour, linewidth=1, alpha=0.6)
        for _, losses, colour, style in curves:
            axes.plot(
                group.lengths, [math.exp(x) for x in losses], f"o{style}", color=colour, linewidth=2, markersize=4
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(group.lengths, [f"{n:,}\n{n // group.trained_at}×" for n in group.lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_log(axes)
        axes.set_xlabel("evaluation length (tokens, times the training length)")
        axes.set_ylabel("perplexity ÷ dense at the training length")
        _name_ends(axes, [(label, math.exp(losses[-1]), colour) for label, losses, colour, _ in curves], group.lengths)
        drawn = [(label, losses) for label, losses, *_ in (*curves, *others)]
        rows = [(label, n, math.exp(x)) for label, xs in drawn for n, x in zip(group.lengths, xs, strict=True)]
        return save(figure, path, ("model", "length", "ratio"), rows)


def positions(group: Group, path: Path) -> Path | None:
    """The stagger's gain over fixed in each part of the window, beside the paper's; None without the runs."""
    fixed, linear = group.get("fixed-w12"), group.get("linear-w12")
    if not (fixed and linear):
        return None
    published = paper()["position_nll_8_bins"]
    papers = [
        sum(one - other for one, other in zip(ones, others, strict=True)) / len(ones)
        for ones, others in zip(
            zip(*published["fibonacci/fixed/w12"].values(), strict=True),
            zip(*published["fibonacci/linear/w12"].values(), strict=True),
            strict=True,
        )
    ]
    ours = fixed.gaps_by_part(linear, group.trained_at)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.9), layout="constrained")
        parts = range(1, len(ours) + 1)
        for name, colour in zip(_LEADS, COLOURS, strict=True):
            if model := group.get(name):
                left.plot(parts, model.bins(group.trained_at), "o-", color=colour, markersize=4, label=model.label)
        left.set_ylabel("loss (nats)")
        figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower left", ncols=2)
        right.plot(parts, ours, "o-", color=COLOURS[1], label="here")
        right.plot(parts, papers, "o--", color=_QUIET, label="paper")
        right.axhline(0, color="#78716c", linewidth=1)
        right.set_ylabel("fixed − linear (nats)")
        right.legend(fontsize=9, frameon=False)
        for axes in (left, right):
            axes.set_xlabel("eighth of the training window")
        rows = [(part, one, other) for part, one, other in zip(parts, ours, papers, strict=True)]
        return save(figure, path, ("part", "gain", "paper's gain"), rows)


def alphas(group: Group, path: Path) -> Path | None:
    """Learned scales over depth beside those of the stagger; None when no model learnt any."""
    learned = [model for model in group.models if model.first["model"]["learned_alphas"]]
    if not learned:
        return None
    layers = learned[0].recipe["num_hidden_layers"]
    ramp = layer_alphas("linear", layers=layers)
    curves = [(model.label, model.first["model"]["learned_alphas"]) for model in learned]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
        axes.plot(ramp, "o--", color=_QUIET, markersize=4, label="linear stagger")
        for (label, values), colour in zip(curves, COLOURS, strict=False):
            axes.plot(values, "o-", color=colour, markersize=4, label=label)
        axes.axhspan(0.95, 1.05, color=COLOURS[1], alpha=0.12, linewidth=0)
        axes.annotate("0.95 … 1.05", (layers - 1, 1.06), ha="right", fontsize=9, color=COLOURS[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("scale α of the rungs")
        axes.legend(fontsize=9, frameon=False)
        rows = [(label, layer, value) for label, values in curves for layer, value in enumerate(values)]
        return save(figure, path, ("model", "layer", "alpha"), rows)


def coverage(path: Path, *, layers: int = 16, window: int = 8, context: int = 1024) -> Path:
    """Which distances some layer attends to, for three schedules at the paper's shape; the count beside each."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(3, 1, figsize=(7.4, 5.2), layout="constrained", sharex=True)
        rows = []
        for axes, schedule, colour in zip(panels, ("fixed", "linear", "coprime"), COLOURS, strict=False):
            patterns = layer_patterns("fibonacci", schedule, layers=layers, window=window)
            dots = [(d, layer) for layer, one in enumerate(patterns) for d in one.offsets if d < context]
            rows += [(schedule, layer, d) for d, layer in dots]
            axes.axvspan(0.8, window, color=_QUIET, alpha=0.4, linewidth=0)
            axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=3)
            axes.set_title(
                f"{schedule}: {union_coverage(patterns, context)} distances, the window's {window + 1} included",
                fontsize=10,
                loc="left",
                color=colour,
            )
            axes.set_ylabel("layer")
            axes.set_xscale("log", base=2)
            axes.set_xlim(0.8, context)
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panels[-1].set_xlabel("distance (grey: the window)")
        return save(figure, path, ("schedule", "layer", "distance"), rows)


def frontier(group: Group, path: Path) -> Path:
    """Quality against cost: perplexity relative to the best, over the keys that a query reads."""
    best = min(model.loss(group.trained_at) for model in group.models)
    points = [(m, m.first["model"]["keys"], math.exp(m.loss(group.trained_at) - best)) for m in group.models]
    kinds = {"full": COLOURS[0], "sliding": COLOURS[3], "hybrid": COLOURS[2], "paper": COLOURS[1], "other": COLOURS[4]}
    names = {
        "full": "dense",
        "sliding": "window only",
        "hybrid": "hybrid",
        "paper": "the paper's",
        "other": "stagger, clipped",
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
        for kind, colour in kinds.items():
            chosen = [(keys, ratio) for model, keys, ratio in points if _kind(model) == kind]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), "o", color=colour, markersize=6, label=names[kind])
        for model, keys, ratio in points:
            if model.name in ("dense", "hybrid", "linear-w12") or ratio == 1:
                # The cheap models are at the left, and their names have room at the right; the best is the lowest.
                place, side = (
                    ((0, -15), "center") if ratio == 1 else ((8, -3), "left") if keys < 64 else ((-8, -3), "right")
                )
                axes.annotate(model.label, (keys, ratio), xytext=place, textcoords="offset points", ha=side, fontsize=8)
        axes.set_xscale("log", base=2)
        axes.margins(x=0.12, y=0.15)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("keys that a query reads, the mean over layers and positions")
        axes.set_ylabel("perplexity ÷ the best")
        axes.legend(fontsize=9, frameon=False)
        rows = [(model.label, keys, ratio) for model, keys, ratio in points]
        return save(figure, path, ("model", "keys", "ratio"), rows)


def recall(probe: dict[str, Any], path: Path) -> Path:
    """Accuracy of recall over distance, one panel a task, one line a model."""
    tasks = list(dict.fromkeys(row["task"] for row in probe["rows"]))
    names = list(dict.fromkeys(row["variant"] for row in probe["rows"]))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(tasks), figsize=(7.4, 3.9), layout="constrained", sharey=True, squeeze=False
        )
        for axes, task in zip(panels[0], tasks, strict=True):
            for row in (row for row in probe["rows"] if row["task"] == task):
                colour = COLOURS[names.index(row["variant"]) % len(COLOURS)]
                distances = [int(distance) for distance in row["accuracy"]]
                axes.plot(
                    distances, list(row["accuracy"].values()), "o-", color=colour, markersize=4, label=row["variant"]
                )
            axes.axvline(probe["trained_at"], color=_QUIET, linestyle="--", linewidth=1)
            axes.axhline(1 / probe["values"], color=_QUIET, linestyle=":", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_ylim(-0.03, 1.03)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.tick_params(axis="x", labelsize=9)
            axes.set_title(task, fontsize=10, loc="left")
            axes.set_xlabel("distance (dashed: training length)")
        panels[0][0].set_ylabel("accuracy (dotted: chance)")
        figure.legend(
            *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False
        )
        rows = [
            (row["variant"], row["task"], distance, value)
            for row in probe["rows"]
            for distance, value in row["accuracy"].items()
        ]
        return save(figure, path, ("model", "task", "distance", "accuracy"), rows)


def _kind(model: Model) -> str:
    own = model.recipe
    if own["attention"] == "full":
        return "full"
    if own["full_layers"]:
        return "hybrid"
    return "sliding" if own["attention"] == "sliding" else "paper" if model.is_papers else "other"


def _plain_log(axes: Axes) -> None:
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if high < 6 * low else FuncFormatter(lambda *_: ""))


def _name_ends(axes: Axes, ends: Sequence[tuple[str, float, str]], lengths: Sequence[int]) -> None:
    """Write each curve's name at its right end, moved apart where they would overlap."""
    low, high = (math.log(value) for value in axes.get_ylim())
    gap, placed = (high - low) / 20, -math.inf
    for label, value, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(math.log(value), placed + gap)
        axes.annotate(
            label,
            (lengths[-1], value),
            xytext=(1.02, (placed - low) / (high - low)),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
