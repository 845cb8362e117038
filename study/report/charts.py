"""The report's figures. Each function draws one, saves it with its numbers beside it, and returns its path."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fibattn.model.cost import mean_keys
from fibattn.pattern import Schedule, layer_alphas, layer_patterns, union_coverage
from fibattn.training.recipe import DEFAULT, ModelRecipe, Recipe
from fibattn.training.run import model_config
from study.report.drawing import LOOKS, QUIET, Page, drawn, look_of, powers_of_two
from study.report.recalled import recalled
from study.report.results import PLAIN, Group, Model, as_saved, mean_loss, papers_gain

_THIN = {"linewidth": 1, "marker": "", "alpha": 0.7}
"""How one seed of several looks beside the line of its model."""

_DASHES = ("--", ":", "-.", (0, (1, 4)))
"""How the other ways to evaluate a model look beside its own line."""

_NAMED_STEP = 0.02
"""As a part of the perplexity: of models closer than this the numbers would hide the points."""


def extrapolation(group: Group, path: Path) -> Path:
    """Perplexity over evaluation length, relative to dense of the same seed at the training length: all, and enlarged.

    Enlarged is what lies between the lowest of all and the highest at the training length.
    """
    curves = _curves(group)
    lowest, highest = min(min(curve.ratios) for curve in curves), max(curve.ratios[0] for curve in curves)
    margin = 0.1 * (highest - lowest)
    low, high = lowest - margin, highest + margin

    def draw(page: Page) -> Figure:
        figure, (everything, enlarged) = page.panels(2, 3.8)
        for axes in (everything, enlarged):
            _over_length(axes, group, curves)
        everything.set_yscale("log")
        _plain_log(everything)
        everything.axhspan(low, high, color=QUIET, alpha=0.3, linewidth=0)
        everything.set_title("everything, logarithmic", fontsize=page.font, loc="left")
        enlarged.set_ylim(low, high)
        enlarged.set_title("the grey part, enlarged", fontsize=page.font, loc="left")
        words = f"perplexity ÷ {_reference(group).label} at {group.trained_at:,}"
        page.name_axes((everything, enlarged), "evaluation length (tokens, times the training length)", words)
        page.legend(figure, _legend(curves))
        return figure

    rows = [(curve.label, n, x) for curve in curves for n, x in zip(group.lengths, curve.ratios, strict=True)]
    return drawn(draw, path, ("model", "length", "ratio"), rows)


def _over_length(axes: Axes, group: Group, curves: Sequence["_Curve"]) -> None:
    for curve in curves:
        axes.plot(group.lengths, curve.ratios, **curve.look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(group.lengths, [f"{n:,}\n{n // group.trained_at}×" for n in group.lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(curves: Sequence["_Curve"]) -> list[Artist]:
    """The curves in the order of their right ends, highest first; what thin ones are is said once."""
    named = sorted((curve for curve in curves if not curve.further), key=lambda curve: -curve.ratios[-1])
    handles: list[Artist] = [Line2D([], [], **curve.look, label=curve.label) for curve in named]
    if len(named) < len(curves):
        handles.append(Line2D([], [], color=QUIET, linewidth=1, label="thin: a further seed"))
    return handles


@dataclass(frozen=True)
class _Curve:
    """One run over the evaluation lengths."""

    label: str
    ratios: list[float]
    """Perplexity at each length, over that of dense with the same seed at the training length."""
    look: dict[str, Any]
    further: bool = False
    """Whether another seed of the same model is drawn in full."""


def _curves(group: Group) -> list[_Curve]:
    """The first run of each leading model, also in its other ways, and thin every other whose seed dense has.

    Its own way is the plain one, that of the default recipe the one in which it is saved.
    """
    reference = _reference(group)
    seeds = {run["seed"]: run for run in reference.runs}

    def ratios(run: dict[str, Any], way: str = PLAIN) -> list[float]:
        near = mean_loss(seeds.get(run["seed"], reference.first), group.trained_at)
        return [math.exp(mean_loss(run, n, way) - near) for n in group.lengths]

    curves = []
    for model in _leading(group):
        look = look_of(model) | {"linewidth": 2, "markersize": 5}
        own = as_saved if model.name == DEFAULT else lambda _: PLAIN
        main = own(model.first)
        curves.append(_Curve(model.label_of(main), ratios(model.first, main), look))
        others = [way for way in (PLAIN, *model.ways()) if way != main]
        for way, style in zip(others, itertools.cycle(_DASHES), strict=False):
            label = f"{model.label}, unbounded" if way == PLAIN else model.label_of_tried(way)
            curves.append(_Curve(label, ratios(model.tried(way), way), look | {"linestyle": style}))
        curves += [
            _Curve(f"{model.label}, seed {run['seed']}", ratios(run, own(run)), look | _THIN, further=True)
            for run in model.runs[1:]
            if run["seed"] in seeds
        ]
    return curves


def _reference(group: Group) -> Model:
    """What perplexities are divided by: dense, or what stands first without it."""
    return group.get("dense") or group.models[0]


def _leading(group: Group) -> list[Model]:
    """The models to draw where there is no room for all."""
    dense, linear, fixed, ours = (group.get(name) for name in ("dense", "linear-w12", "fixed-w12", DEFAULT))
    return [model for model in (dense, linear, fixed, group.plain_window, ours) if model] or list(group.models[:5])


def positions(group: Group, path: Path) -> Path | None:
    """The stagger's gain over fixed in each part of the window, beside the paper's; None without the runs."""
    fixed, linear = group.get("fixed-w12"), group.get("linear-w12")
    ours = fixed.gaps_by_part(linear, group.trained_at) if fixed and linear else []
    if not ours:
        return None
    papers = papers_gain()
    parts, models = range(1, len(ours) + 1), _leading(group)

    def draw(page: Page) -> Figure:
        figure, (losses, gains) = page.panels(2, 3.2)
        handles: list[Artist] = []
        for model in models:
            handles += losses.plot(
                parts, model.bins(group.trained_at), **look_of(model), markersize=5, label=model.label
            )
        gains.plot(parts, ours, **LOOKS["linear"], markersize=5)
        handles += gains.plot(parts, papers, "o--", color=QUIET, markersize=5, label="the paper's gain")
        gains.axhline(0, color="#78716c", linewidth=1)
        losses.set_title("loss", fontsize=page.font, loc="left")
        gains.set_title("what linear gains over fixed", fontsize=page.font, loc="left")
        page.name_axes((losses, gains), "eighth of the training window", "nats")
        page.legend(figure, handles)
        return figure

    rows = list(zip(parts, ours, papers, strict=True))
    return drawn(draw, path, ("part", "gain", "paper's gain"), rows)


def alphas(group: Group, path: Path) -> Path | None:
    """Learned scales over depth beside those of the stagger; None when no model learnt any."""
    learned = {model.label: one for model in group.models if (one := model.first["model"]["learned_alphas"])}
    if not learned:
        return None
    layers = len(next(iter(learned.values())))

    def draw(page: Page) -> Figure:
        figure, (axes,) = page.panels(1, 3.2)
        ramp = layer_alphas("linear", layers=layers)
        handles: list[Artist] = []
        handles += axes.plot(ramp, "--", **LOOKS["linear"], markersize=5, label="linear stagger")
        for (label, values), marker in zip(learned.items(), itertools.cycle("p^vX"), strict=False):
            handles += axes.plot(values, **{**LOOKS["learned"], "marker": marker}, markersize=5, label=label)
        axes.axhspan(0.95, 1.05, color=QUIET, alpha=0.3, linewidth=0)
        axes.annotate("0.95 … 1.05", (layers - 1, 1.06), ha="right", color="#57534e")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("scale α of the rungs")
        page.legend(figure, handles)
        return figure

    rows = [(label, layer, value) for label, values in learned.items() for layer, value in enumerate(values)]
    return drawn(draw, path, ("model", "layer", "alpha"), rows)


def coverage(path: Path, *, layers: int = 16, window: int = 8, context: int = 1024) -> Path:
    """Which distances some layer attends to, for three schedules at the paper's shape; the count beside each."""
    schedules: tuple[Schedule, ...] = ("fixed", "linear", "coprime")
    stacks = {one: layer_patterns("fibonacci", one, layers=layers, window=window) for one in schedules}
    rows = [
        (schedule, layer, d)
        for schedule, patterns in stacks.items()
        for layer, one in enumerate(patterns)
        for d in one.offsets
        if d < context
    ]

    def draw(page: Page) -> Figure:
        figure, panels = plt.subplots(3, 1, figsize=(page.width, 5.2), layout="constrained", sharex=True)
        for axes, (schedule, patterns) in zip(panels, stacks.items(), strict=True):
            colour = LOOKS[schedule]["color"]
            dots = [(d, layer) for name, layer, d in rows if name == schedule]
            axes.axvspan(0.8, window, color=QUIET, alpha=0.3, linewidth=0)
            axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=page.font / 4)
            words = f"{schedule}: {union_coverage(patterns, context)} distances, the window's {window + 1} included"
            axes.set_title(words, fontsize=page.font, loc="left", color=colour)
            axes.set_ylabel("layer")
            powers_of_two(axes)
            axes.set_xlim(0.8, context)
        panels[-1].set_xlabel("distance (grey: the window)")
        return figure

    return drawn(draw, path, ("schedule", "layer", "distance"), rows)


def frontier(group: Group, path: Path) -> Path:
    """Quality against cost: perplexity at the training length over the keys that a query reads, there and at the end.

    The line joins the models that no other beats in both. Numbers name those of them that are ahead of the last one
    named by more than `_NAMED_STEP`, dense and the default recipe.
    """
    base, ends = _reference(group).loss(group.trained_at), (group.trained_at, group.lengths[-1])
    ratios = {model.name: math.exp(model.loss(group.trained_at) - base) for model in group.models}
    points = {n: {model.name: (_keys(model, n), ratios[model.name]) for model in group.models} for n in ends}
    best = {n: _unbeaten(points[n]) for n in ends}
    wanted = {"dense", DEFAULT}.union(*(_steps(best[n], ratios) for n in ends))
    named = sorted((one for one in group.models if one.name in wanted), key=lambda model: ratios[model.name])

    def draw(page: Page) -> Figure:
        figure, panels = page.panels(2, 3.8, sharey=True)
        for axes, n in zip(panels, ends, strict=True):
            axes.step(*zip(*(points[n][name] for name in best[n]), strict=True), where="post", color=QUIET, linewidth=1)
            for model in group.models:
                fill = {} if model.name in wanted else {"markerfacecolor": "white"}
                axes.plot(*points[n][model.name], linestyle="", markersize=7, **{**look_of(model), **fill})
            powers_of_two(axes)
            axes.margins(x=0.1, y=0.15)
            axes.set_title(f"in windows of {n:,} tokens", fontsize=page.font, loc="left")
        words = f"perplexity ÷ {_reference(group).label}, at {group.trained_at:,}"
        page.name_axes(panels, "keys that a query reads (mean)", words)
        labels = [f"{number}  {model.label}" for number, model in enumerate(named, start=1)]
        handles = [
            Line2D([], [], linestyle="", **look_of(one), label=label) for one, label in zip(named, labels, strict=True)
        ]
        page.legend(figure, handles)
        figure.draw_without_rendering()
        for axes, n in zip(panels, ends, strict=True):
            _number(axes, list(points[n].values()), [points[n][model.name] for model in named])
        return figure

    rows = [(model.label, *(points[n][model.name][0] for n in ends), ratios[model.name]) for model in group.models]
    return drawn(draw, path, ("model", *(f"keys at {n}" for n in ends), "ratio"), rows)


def _keys(model: Model, length: int) -> float:
    """How many keys a query of the model reads in windows of `length`, the mean over layers and positions."""
    shape = ModelRecipe(**model.first["recipe"]["model"])
    # How many ids the tokenizer has does not matter here.
    config = model_config(Recipe(model=shape, sequence_length=model.first["trained_at"]), vocab_size=1, separator=0)
    return statistics.mean(mean_keys(config, length))


def _unbeaten(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other is below in one value without being above in the other, by the first."""
    found: list[str] = []
    for name in sorted(points, key=lambda name: points[name]):
        if not found or points[name][1] < points[found[-1]][1]:
            found.append(name)
    return found


def _steps(best: Sequence[str], ratios: dict[str, float]) -> list[str]:
    """The first of the unbeaten, and each that is ahead of the one before in this list by more than `_NAMED_STEP`."""
    found: list[str] = []
    for name in best:
        if not found or ratios[name] < ratios[found[-1]] * (1 - _NAMED_STEP):
            found.append(name)
    return found


def _number(axes: Axes, points: Sequence[tuple[float, float]], named: Sequence[tuple[float, float]]) -> None:
    """Write 1, 2, … beside the named points, each at a free place, one nearest to its own point if there is."""
    scale = 72 / axes.figure.dpi
    dots = [tuple(dot) for dot in axes.transData.transform(points) * scale]
    steps = [
        (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
        for radius in range(11, 99, 4)
        for angle in range(0, 360, 15)
    ]
    taken: list[tuple[float, float]] = []
    for number, (point, (x, y)) in enumerate(zip(named, axes.transData.transform(named) * scale, strict=True), start=1):
        free = [
            place
            for place in ((x + across, y + up) for across, up in steps)
            if all(math.dist(place, dot) > 10 for dot in dots)
            and all(math.dist(place, other) > 1.3 * plt.rcParams["font.size"] for other in taken)
        ]
        near = (place for place in free if math.dist(place, (x, y)) < min(math.dist(place, dot) for dot in dots) + 1)
        taken.append(next(near, free[0]))
        axes.annotate(
            str(number),
            point,
            xytext=(taken[-1][0] - x, taken[-1][1] - y),
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 5, "shrinkB": 3},
        )


def recall(probe: dict[str, Any], path: Path) -> Path:
    """Accuracy of recall over distance: one panel a task, one line a model, the median of its thin seeds."""
    models = recalled(probe)
    tasks = list(dict.fromkeys(one.task for one in models))

    def draw(page: Page) -> Figure:
        figure, panels = page.panels(len(tasks), 3.2, sharey=True)
        for axes, task in zip(panels, tasks, strict=True):
            for one in (one for one in models if one.task == task):
                look, median = LOOKS[one.variant], one.median
                axes.plot(list(median), list(median.values()), **look, label=one.variant)
                for accuracy in one.seeds:
                    axes.plot(list(accuracy), list(accuracy.values()), **look | _THIN)
            axes.axvline(probe["trained_at"], color=QUIET, linestyle="--", linewidth=1)
            axes.axhline(1 / probe["values"], color=QUIET, linestyle=":", linewidth=1)
            axes.set_ylim(-0.03, 1.03)
            powers_of_two(axes)
            axes.set_title(task, fontsize=page.font, loc="left")
        page.name_axes(panels, "distance (dashed: training length)", "accuracy (dotted: chance)")
        page.legend(figure, panels[0].get_legend_handles_labels()[0])
        return figure

    rows = [
        (row["variant"], row["seed"], row["task"], distance, value)
        for row in probe["rows"]
        for distance, value in row["accuracy"].items()
    ]
    return drawn(draw, path, ("model", "seed", "task", "distance", "accuracy"), rows)


def _plain_log(axes: Axes) -> None:
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if high < 6 * low else FuncFormatter(lambda *_: ""))
